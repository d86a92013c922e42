"""Times predictions of pairs of texts with the poolings pair and aligned_pair, in turns.

    taskset -c 0 python -m experiments.benchmarks.pair_poolings --data_dir=DIR --workdir=DIR

Probes of the frozen MiniLM with exits 1, 2, 4 and 6 on 400 training rows of MRPC (they are kept in
--workdir), on its first 96 validation rows, with a threshold that no text reaches, so that all four
exits are computed. Prints milliseconds per pair, from strings to probabilities. Three minutes.
"""

import sys
from pathlib import Path

import numpy as np

from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.benchmarks.timing import time_in_turns
from sweet_jax import AdaptiveClassifier, train
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.data.records import read_records
from sweet_jax.data.tables import Columns

_COLUMNS = ("sentence1", "sentence2")
_POOLINGS = ("pair", "aligned_pair")


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each engine and batch size."""
    parser = ArgumentParser("experiments.benchmarks.pair_poolings", __doc__ or "")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of GLUE")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the two runs")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (default 9)")
    options = parser.parse_args(argv)
    files = [
        str(options.data_dir / "mrpc" / f"{split}.parquet") for split in ("train", "validation")
    ]
    records = read_records(Path(files[1]), Columns(_COLUMNS))
    texts = [record.values for record, _ in zip(records, range(96), strict=False)]
    for pooling in _POOLINGS:
        train(
            files[0],
            validation=files[1],
            text=_COLUMNS,
            label="label",
            workdir=options.workdir / pooling,
            pooling=pooling,
            train_size=400,
            epochs=0,
            learning_rates=(1e-4,),
            baselines="none",
        )
    print(
        f"{describe_machine('onnxruntime')}\n\n{table_head('engine', 'batch', *_POOLINGS, 'ratio')}"
    )
    for engine in ("onnxruntime", "jax"):
        classifiers = [
            AdaptiveClassifier.from_pretrained(
                options.workdir / pooling / "model", engine=engine, threshold=1.1
            )
            for pooling in _POOLINGS
        ]
        for size in (1, 32):
            sides = [lambda c=each, b=size: c.predict(texts, batch_size=b) for each in classifiers]
            for side in sides:
                side()  # compiles
            seconds = time_in_turns(sides, options.rounds)
            pair, aligned = (1e3 * float(np.median(own)) / len(texts) for own in seconds)
            print(table_row(engine, size, f"{pair:.2f}", f"{aligned:.2f}", f"{aligned / pair:.3f}"))


if __name__ == "__main__":
    sys.exit(run_command(main))
