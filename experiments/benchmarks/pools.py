"""Milliseconds per text on any device: the full model, and adaptive with and without pooling.

    python -m experiments.benchmarks.pools --model=runs/sst2/model --data_dir=DIR --dtype=bfloat16

Validation texts in their order (<task>/validation.parquet), from strings to answers, tokenisation
included, by the JAX engine at half the layers' cost. "latency": each batch is finished before the
next one begins. "pooled": texts that continue wait for others that do, until a batch is full. The
sides take turns over the same texts, after a round that compiles; the median round counts. counted
is the mean cost in layers. A minute on a GPU, five on 2 cores with --batch=1 --batch=8.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet

from experiments.benchmarks.shapes import head_line, parser, row, table_head
from sweet_jax import AdaptiveClassifier
from sweet_jax.config import DTYPES

BATCHES, COST = (1, 8, 64, 256), 0.5


def read_texts(model: Any, data_dir: Path, rows: int) -> list[Any]:
    """Returns validation texts of the model's task, pairs as tuples, repeated where too few."""
    table = pyarrow.parquet.read_table(data_dir / model.task / "validation.parquet")
    columns = [table[column].to_pylist() for column in model.text_columns]
    texts = list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
    return (texts * -(-rows // len(texts)))[:rows]


def timed(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each side; they take turns, after a round that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each batch size."""
    options = parser(__doc__)
    options.add_argument("--model", required=True, help="model/ of a run")
    options.add_argument("--data_dir", required=True, type=Path)
    options.add_argument("--dtype", default="float32", choices=DTYPES)
    options.add_argument("--batch", action="append", type=int, help="default: 1, 8, 64, 256")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--batches", type=int, default=16, help="in a round; at least 64 texts")
    chosen = options.parse_args(argv)
    half = AdaptiveClassifier.from_pretrained(
        chosen.model, engine="jax", precision=chosen.dtype, cost=COST
    )
    full = half.at(threshold=float("inf"))
    print(head_line())
    print(f"{Path(chosen.model).parent.name}, {half.model.task}, {chosen.dtype}: ms per text\n")
    names = ("full", "latency", "pooled")
    print(table_head("batch", *names, "counted", "latency / full", "pooled / full"), flush=True)
    for batch in chosen.batch or BATCHES:
        texts = read_texts(half.model, chosen.data_dir, max(64, batch * chosen.batches))

        def run(classifier, mode, texts=texts, batch=batch):
            return lambda: classifier.predict(texts, batch, mode)

        sides = {"full": run(full, "latency"), "latency": run(half, "latency")}
        found = timed(sides | {"pooled": run(half, "throughput")}, chosen.rounds)
        each = [f"{1e3 * found[name] / len(texts):.3f}" for name in names]
        counted = float(half.predict(texts, batch).cost.mean())
        shares = [f"{found[name] / found['full']:.2f}" for name in names[1:]]
        print(row(batch, *each, f"{counted:.3f}", *shares), flush=True)


if __name__ == "__main__":
    main()
