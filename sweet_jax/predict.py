"""Answers the texts of a file with a saved model, each at the first exit that is sure.

  python -m sweet_jax.predict --model=runs/x/model --input=new.csv --output=new.jsonl --cost=0.5
  python -m sweet_jax.predict --model=runs/x/model --measure

The input is a CSV, TSV, JSONL or Parquet file with the text columns that the model was trained on,
or a .txt file with a text in each line; it may be larger than memory. The output is JSONL, one
object for each row of the input, in its order: label, probability, exit (the layer it left at) and
cost (share of the full model's layers), or error for a row without a text. The same command, once
interrupted, goes on where the output ends. Without a dial, the cheapest threshold that kept the
full model's score on calibration rows. Exit status: 0 done, 2 the input is wrong, 1 anything else.

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
from sweet_jax.data.records import Columns, Record, last_position, read_records
from sweet_jax.inference.prediction_file import (
    check_same_rows,
    open_output,
    read_existing,
    record_origin,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        return run_command(lambda: _run(_parse(argv)))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where the output ends", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.predict", f"{__doc__}{policy_help()}")
    parser.add_argument("--model", required=True, help="folder model/ of a run, or a hub id")
    parser.add_argument("--input", help="file of texts")
    parser.add_argument("--output", help="JSONL file of the answers")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="instead, time every stage on this machine, alone and in batches of --batch_size, and "
        "keep the table in the model's folder: --milliseconds reads it",
    )
    parser.add_target_arguments()
    parser.add_argument(
        "--text_columns", help="of the input, where they are not named as in training: a or a,b"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="texts computed at once, at most (default 32)"
    )
    parser.add_argument(
        "--dtype", default="float32", help="of parameters and activations: float32 or bfloat16"
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
    # They import JAX: not for --help, or a mistake.
    from sweet_jax.compilation_cache import enable_compilation_cache
    from sweet_jax.inference.artifact import open_model
    from sweet_jax.inference.classifier import AdaptiveClassifier

    if options.measure:
        _measure(options)
        return
    source, target = Path(options.input), Path(options.output)
    if not source.is_file():
        what = "is not a file" if source.exists() else "does not exist"
        raise UserError(f"input {options.input!r} {what}")
    model = open_model(options.model, options.dtype)
    enable_compilation_cache()
    classifier = AdaptiveClassifier(model, options.policy, parse_targets(options))
    columns = split_names(options.text_columns or "") or classifier.text_columns
    if len(columns) != len(classifier.text_columns):
        raise UserError(
            f"this model takes {len(classifier.text_columns)} text column(s), as "
            f"{','.join(classifier.text_columns)}; got {','.join(columns)}"
        )
    identity = {
        "model": hashlib.sha256((model.folder / "exits.json").read_bytes()).hexdigest(),
        "policy": classifier.policy,
        "threshold": repr(classifier.threshold),
        "dtype": options.dtype,
        "columns": list(columns),
        "input": [str(source.resolve()), source.stat().st_size],
    }
    with contextlib.closing(read_records(source, Columns(columns))) as rows:
        first = list(itertools.islice(rows, 1))  # a file that will not do must be known by now
        with open_output(target, source) as file, record_origin(target, identity, file):
            tally, last, end = read_existing(file, target)
            known = itertools.islice(itertools.chain(first, rows), tally.rows - len(last), None)
            answers = _answers(classifier, known, columns, options.batch_size)
            check_same_rows(target, last, answers)
            file.truncate(end)
            began, start = time.perf_counter(), tally.rows
            with tqdm(total=last_position(source), unit_scale=True, disable=None) as bar:
                for answer, position in answers:
                    file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
                    tally.add(answer)
                    bar.update(position - bar.n)
            seconds = time.perf_counter() - began
        print(tally.summary((tally.rows - start) / max(seconds, 1e-9)))


def _measure(options: argparse.Namespace) -> None:
    from sweet_jax.compilation_cache import enable_compilation_cache
    from sweet_jax.inference.artifact import open_model
    from sweet_jax.inference.latency import measure_latency, write_latency

    enable_compilation_cache()
    model = open_model(options.model, options.dtype)
    with tqdm(unit=" programs", disable=None) as bar:
        clock = measure_latency(model, [options.batch_size], bar.update)
    print("\n".join(clock.lines(model.layers)))
    print(f"kept in {write_latency(model, clock)}")


def _answers(
    classifier: Any, rows: Iterable[Record], columns: Sequence[str], batch_size: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """(an object of the output, the position in the input) of every row, in order."""
    from sweet_jax.inference.predictions import InvalidRow

    positions: collections.deque[int] = collections.deque()  # of rows taken, not yet answered

    def texts() -> Iterator[Any]:
        for row in rows:
            positions.append(row.position)
            missing = [n for n, v in zip(columns, row.values, strict=False) if v is None]
            error = f"column {missing[0]!r} is empty" if missing else row.error
            yield row.values if error is None else InvalidRow(error)

    for found in classifier.stream_rows(texts(), batch_size):
        if isinstance(found, InvalidRow):
            answer: dict[str, Any] = {"error": found.reason}
        elif not math.isfinite(found.probability):
            answer = {"error": "the model's answer is not a number: its training diverged"}
        else:
            answer = {"label": found.label, "probability": round(found.probability, 6)}
            answer |= {"exit": found.exit, "cost": found.cost}
        yield answer, positions.popleft()


if __name__ == "__main__":
    sys.exit(main())
