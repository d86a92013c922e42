"""Classifies the texts of a file with a saved model, each at the first exit that is confident.

  sweet-jax predict --model=runs/x/model --input=new.csv --output=new.jsonl --cost=0.5
  sweet-jax predict --model=runs/x/model --measure

The input is a CSV, TSV, JSONL or Parquet file with the text columns that the model was trained on,
or a .txt file with a text in each line; it may be larger than memory. The output is JSONL, one
object for each row of the input, in its order: label, probability, exit (the layer it exited at)
and cost (share of the full model's layers), or error for a row without a text. An interrupted
command, run again, resumes where the output ends. Without a target, the cheapest threshold that
kept the full model's metric on calibration rows. Exit status: 0 done, 2 the input is wrong, 1
anything else.

"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from tqdm import tqdm

from sweet_jax.arguments import ArgumentParser, parse_targets, policy_help, run_command
from sweet_jax.config import UserError, split_names
from sweet_jax.data.records import last_position, read_records
from sweet_jax.data.tables import Columns, Record
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.inference.engine import DEFAULT_ENGINE, ENGINES, load_engine
from sweet_jax.inference.latency import measure_latency, write_latency
from sweet_jax.inference.prediction_file import (
    check_same_rows,
    open_output,
    read_existing,
    record_origin,
)
from sweet_jax.inference.predictions import InvalidRow


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    try:
        return run_command(lambda: _run(_parse(argv)))
    except KeyboardInterrupt:
        print("interrupted; the same command resumes where the output ends", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.predict", f"{__doc__}{policy_help()}")
    parser.add_model_arguments(ENGINES, DEFAULT_ENGINE)
    parser.add_argument("--input", help="file of texts")
    parser.add_argument("--output", help="JSONL file of the predictions")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="instead, time every stage on this machine, alone and in batches of --batch_size, and "
        "keep the table in the model's folder: --milliseconds reads it",
    )
    parser.add_argument(
        "--text_columns", help="the input's text columns, if not named as in training: a or a,b"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="texts computed at once, at most (default 32)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="dtype of parameters and activations: float32 (default) or bfloat16",
    )
    options = parser.parse_args(argv)
    parse_targets(options)
    if options.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1; got {options.batch_size}")
    if options.measure and (options.input or options.output):
        raise UserError("--measure times the model alone: leave --input and --output out")
    if not options.measure and not (options.input and options.output):
        raise UserError("give --input=FILE and --output=FILE, or --measure")
    return options


def _run(options: argparse.Namespace) -> None:
    if options.measure:
        _measure(options)
        return
    source, output = Path(options.input), Path(options.output)
    if not source.is_file():
        what = "is not a file" if source.exists() else "does not exist"
        raise UserError(f"input {options.input!r} {what}")
    classifier = _load_classifier(options)
    columns = split_names(options.text_columns or "") or classifier.text_columns
    if len(columns) != len(classifier.text_columns):
        raise UserError(
            f"this model takes {len(classifier.text_columns)} text column(s), as "
            f"{','.join(classifier.text_columns)}; got {','.join(columns)}"
        )
    identity = {
        "model": hashlib.sha256((classifier.model.folder / "exits.json").read_bytes()).hexdigest(),
        "policy": classifier.policy,
        "threshold": repr(classifier.threshold),
        "dtype": options.dtype,
        "columns": list(columns),
        "input": [str(source.resolve()), source.stat().st_size],
    }
    with contextlib.closing(read_records(source, Columns(columns))) as rows:
        first = list(itertools.islice(rows, 1))  # an unusable file must be known by now
        with open_output(output, source) as file, record_origin(output, identity, file):
            tally, last, end = read_existing(file, output)
            rest = itertools.islice(itertools.chain(first, rows), tally.rows - len(last), None)
            predicted = _predict_rows(classifier, rest, columns, options.batch_size)
            check_same_rows(output, last, predicted)
            file.truncate(end)
            began, start = time.perf_counter(), tally.rows
            with tqdm(total=last_position(source), unit_scale=True, disable=None) as bar:
                for row, position in predicted:
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    tally.add(row)
                    bar.update(position - bar.n)
            seconds = time.perf_counter() - began
        print(tally.summary((tally.rows - start) / max(seconds, 1e-9)))


def _load_classifier(options: argparse.Namespace) -> AdaptiveClassifier:
    target = parse_targets(options)
    return AdaptiveClassifier.from_pretrained(
        options.model,
        policy=options.policy,
        engine=options.engine,
        dtype=options.dtype,
        **target,  # type: ignore[arg-type] # mypy cannot tell a dict's keys
    )


def _measure(options: argparse.Namespace) -> None:
    model = open_model(options.model)
    engine = load_engine(options.engine, model, options.dtype)
    with tqdm(unit=" programs", disable=None) as bar:
        table = measure_latency(engine, model.max_length, [options.batch_size], bar.update)
    print("\n".join(table.lines(model.layers)))
    print(f"kept in {write_latency(model.folder, table)}")


def _predict_rows(
    classifier: AdaptiveClassifier, rows: Iterable[Record], columns: Sequence[str], batch_size: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields (an object of the output, the position in the input) of every row, in order."""
    positions: collections.deque[int] = collections.deque()  # of rows taken, not yet predicted

    def texts() -> Iterator[Any]:
        for row in rows:
            positions.append(row.position)
            missing = [n for n, v in zip(columns, row.values, strict=False) if v is None]
            error = f"column {missing[0]!r} is empty" if missing else row.error
            yield row.values if error is None else InvalidRow(error)

    for prediction in classifier.stream_rows(texts(), batch_size):
        if isinstance(prediction, InvalidRow):
            found: dict[str, Any] = {"error": prediction.reason}
        elif not math.isfinite(prediction.probability):
            found = {"error": "the model's answer is not a number: its training diverged"}
        else:
            found = {"label": prediction.label, "probability": round(prediction.probability, 6)}
            found |= {"exit": prediction.exit, "cost": prediction.cost}
        yield found, positions.popleft()


if __name__ == "__main__":
    sys.exit(main())
