"""Times inference of the JAX engine on any device: full, with early exits, and with pooling.

    python -m experiments.benchmarks.pools --model=runs/sst2/model --data_dir=DIR --dtype=bfloat16

Classifies the first validation texts (DIR/<task>/validation.parquet, repeated if there are too few)
at half of the layers' cost, from strings to predictions, including tokenization. In "latency", each
batch is finished before the next one begins. In "pooled", texts that continue wait for others until
a batch is full. The sides are timed in turns on the same texts, after a round that compiles. Prints
milliseconds per text, from the median round; "counted" is the mean cost in layers. Takes a minute
on a GPU, and five on 2 cores with --batch=1 --batch=8.
"""

import functools
import statistics
import sys
from pathlib import Path

from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.benchmarks.timing import time_in_turns
from experiments.benchmarks.validation_texts import read_validation_texts
from sweet_jax import AdaptiveClassifier
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import DTYPES

_BATCHES, _COST = (1, 8, 64, 256), 0.5


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each batch size."""
    parser = ArgumentParser("experiments.benchmarks.pools", __doc__ or "")
    parser.add_argument("--model", required=True, help="model/ folder of a run")
    parser.add_argument(
        "--data_dir", required=True, help="folder with <task>/validation.parquet, such as GLUE's"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="(default float32)")
    parser.add_argument(
        "--batch", action="append", type=int, help="batch size; repeatable (default 1, 8, 64, 256)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument(
        "--batches", type=int, default=16, help="batches per round, of at least 64 texts in all"
    )
    options = parser.parse_args(argv)
    half = AdaptiveClassifier.from_pretrained(
        options.model, engine="jax", precision=options.dtype, cost=_COST
    )
    full = half.at(threshold=float("inf"))
    print(describe_machine())
    print(f"{Path(options.model).parent.name}, {half.model.task}, {options.dtype}: ms per text\n")
    names = ("full", "latency", "pooled")
    print(table_head("batch", *names, "counted", "latency / full", "pooled / full"), flush=True)
    for batch in options.batch or _BATCHES:
        count = max(64, batch * options.batches)
        texts = read_validation_texts(half.model, options.data_dir, count)[0]
        texts = (texts * -(-count // len(texts)))[:count]
        sides = [
            functools.partial(classifier.predict, texts, batch, mode)
            for classifier, mode in ((full, "latency"), (half, "latency"), (half, "throughput"))
        ]
        for side in sides:
            side()  # compiles
        times = [statistics.median(seconds) for seconds in time_in_turns(sides, options.rounds)]
        each = [f"{1e3 * seconds / count:.3f}" for seconds in times]
        cost = float(half.predict(texts, batch).cost.mean())
        shares = [f"{seconds / times[0]:.2f}" for seconds in times[1:]]
        print(table_row(batch, *each, f"{cost:.3f}", *shares), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
