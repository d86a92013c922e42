"""Classifies the texts of a file with a saved model, each at the first confident exit.

  sweet-jax predict --model=runs/x/model --input=a.csv --output=b.csv --cost=0.5
  sweet-jax predict --model=runs/x/model --measure

The input has the text columns that the model was trained on, in any format supported for training,
or is a .txt file with one text per line; it may be larger than memory. The output is JSONL, with
one object per row of the input, in the same order: label, probability, exit (the layer at which the
text left) and cost (fraction of the full model's layers), or error for a row whose text is missing
or blank (for pairs: missing). If its name ends in .csv or .parquet, it is a table instead. An
interrupted command that is run again resumes where the output ends. Without a target, the threshold
is the cheapest one that kept the full model's metric on calibration rows. Exit status: 0 done, 2
the input is wrong or no row of it could be classified, 1 anything else.

"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import stat
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from tqdm import tqdm

from sweet_jax.arguments import ArgumentParser, parse_targets, policy_help, run_command
from sweet_jax.data.column_names import columns_for_model, parse_names
from sweet_jax.data.file_lists import expand_files
from sweet_jax.data.records import check_files, column_names, last_position, read_records
from sweet_jax.data.tables import Columns, Record, missing_column
from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.inference.engine import load_engine, takes_threads
from sweet_jax.inference.engine_choice import (
    available_engines,
    check_available,
    describe_default,
)
from sweet_jax.inference.engine_table import ENGINES
from sweet_jax.inference.latency import (
    TABLE_NOTE,
    describe_fastest,
    measure_latency,
    measured_lengths,
)
from sweet_jax.inference.latency_table import LatencyTable, check_model_writable, write_tables
from sweet_jax.inference.prediction_file import CHECKED, PREDICTED, OutputFile
from sweet_jax.inference.predictions import InvalidRow
from sweet_jax.inference.warm_up import warm_up


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    resumes = "the same command resumes where the output ends"
    return run_command(lambda: _run(_parse(argv)), resumes)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.predict", f"{__doc__ or ''}{policy_help()}")
    parser.add_model_arguments(ENGINES)
    parser.add_argument(
        "--input", help='file of texts; also a folder, a glob pattern, or several joined by "+"'
    )
    parser.add_argument(
        "--output", help="file of the predictions: .jsonl, .csv or .parquet, or /dev/stdout"
    )
    parser.add_argument(
        "--keep",
        help="input columns to copy to the output, such as id,text; label becomes input_label",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="instead of predicting, time every stage on this machine, for single texts and "
        "batches of --batch_size, with every available engine and precision or those that are set, "
        "and save the tables in the model's folder for --milliseconds and the choice of the engine",
    )
    parser.add_argument(
        "--warm_up", action="store_true", help="compile every program before the first text"
    )
    parser.add_argument(
        "--text_columns",
        help="text columns of the input if they are not named as in training: a or a,b",
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="maximum texts per batch (default 32)"
    )
    options = parser.parse_args(argv)
    parse_targets(options)
    if options.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1; got {options.batch_size}")
    if options.measure and (options.input or options.output):
        raise UserError("--measure times the model without a file: remove --input and --output")
    if options.output and os.path.isdir(options.output):
        raise UserError(f"--output {options.output!r} is a folder: name a file in it")
    if not options.measure and not (options.input and options.output):
        raise UserError("pass --input=FILE and --output=FILE, or --measure")
    return options


def _run(options: argparse.Namespace) -> int:
    if options.measure:
        _measure(options)
        return 0
    sources, output = _input_files(options.input), OutputFile(Path(options.output))
    classifier = _load_classifier(options)
    columns = _columns(options, classifier, sources[0])
    identity: dict[str, Any] = {
        "model": hashlib.sha256((classifier.model.folder / "exits.json").read_bytes()).hexdigest(),
        "policy": classifier.policy,
        "threshold": repr(classifier.threshold),
        "dtype": options.precision or "float32",
        "columns": list(columns.texts),
        "input": [value for p in sources for value in (str(p.resolve()), p.stat().st_size)],
    }
    if columns.kept:
        identity["keep"] = list(columns.kept)
    check_files(sources, columns)  # before an output is started
    with contextlib.closing(_read_all(sources, columns)) as rows:
        with output.open(sources) as file, output.recorded(identity, file) as known:
            tally, last, end = output.read_existing(file)
            rest = itertools.islice(rows, tally.rows - len(last), None)
            predicted = _predict_rows(classifier, rest, columns, options.batch_size)
            output.check_same_rows(last, predicted)
            output.truncate(file, end)
            if options.engine is None:  # printed only after the checks of the input
                precision = options.precision or "float32"
                print(describe_default(classifier.model, precision), file=sys.stderr, flush=True)
            if options.warm_up:
                warm_up(classifier, options.batch_size)
            began, start = time.perf_counter(), tally.rows
            sizes = [last_position(path) for path in sources]
            total = None if None in sizes else sum(size or 0 for size in sizes)
            with tqdm(total=total, unit_scale=True, disable=None) as bar:
                for row, position in predicted:
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    tally.add(row)
                    bar.update(position - bar.n)
            seconds = time.perf_counter() - began
        output.finish()
    # If the predictions are streamed to stdout, the summary must not be mixed with them.
    summary = tally.summary((tally.rows - start) / max(seconds, 1e-9))
    print(summary, file=sys.stderr if output.streams else sys.stdout)
    if start and start == tally.rows:
        compared = "its model, target and" if known else "only its"
        print(
            f"note: {str(output.path)!r} already contains every row, so nothing was predicted; "
            f"{compared} last {CHECKED} rows were compared. Delete it to predict everything again",
            file=sys.stderr,
        )
    if tally.rows and tally.errors == tally.rows:
        raise UserError(
            f"none of the {tally.rows:,} rows of {options.input!r} could be classified, see the "
            f"errors in {str(output.path)!r}: check the text columns ({', '.join(columns.texts)})"
        )
    return 0


def _input_files(name: str) -> list[Path]:
    """Returns the files of --input.

    Raises UserError for one that does not exist or is no file, and PermissionError for one in a
    folder without permission.
    """
    files = expand_files(name)
    for path in files:
        try:
            is_file = stat.S_ISREG(os.stat(path).st_mode)
        except PermissionError:  # the file may exist
            raise
        except OSError as error:  # also for a name that is too long
            raise UserError(f"input {str(path)!r} does not exist") from error
        if not is_file:
            raise UserError(f"input {str(path)!r} is not a file of texts")
    return files


def _columns(options: argparse.Namespace, classifier: AdaptiveClassifier, source: Path) -> Columns:
    """Returns the columns to read.

    Raises UserError as `columns_for_model` does, or if two columns to keep have the same key in the
    output.
    """
    asked = [text for text in (options.text_columns, options.keep) if text]
    listed = [text for text in asked if "," in text]  # a list, or one name that contains a comma
    present = [name for text in listed for name in column_names(source, text)]
    texts = columns_for_model(options.text_columns, present, classifier.text_columns)
    kept = parse_names(options.keep or "", present)
    for name in kept:
        key = _output_key(name)
        if key != name and key in kept:
            raise UserError(
                f"--keep has {name!r} and {key!r}, which would both be {key!r} in the output: "
                "remove one of them, or rename it in the input"
            )
    return Columns(texts, kept=kept)


def _output_key(name: str) -> str:
    """Returns the key in the output of a kept column of the input."""
    return f"input_{name}" if name in PREDICTED else name


def _read_all(sources: Sequence[Path], columns: Columns) -> Generator[Record]:
    """Yields the records of several files, with positions that increase across files."""
    before = 0
    for path in sources:
        for record in read_records(path, columns):
            yield dataclasses.replace(record, position=before + record.position)
        before += last_position(path) or 0


def _load_classifier(options: argparse.Namespace) -> AdaptiveClassifier:
    target = parse_targets(options)
    return AdaptiveClassifier.from_pretrained(
        options.model,
        policy=options.policy,
        engine=options.engine,
        precision=options.precision,
        threads=options.threads,
        **target,  # type: ignore[arg-type] # mypy cannot tell a dict's keys
    )


def _measure(options: argparse.Namespace) -> None:
    """Times every available engine and precision, or only those set by the options.

    Raises UserError if none of them runs.
    """
    model, refused = open_model(options.model), []
    check_model_writable(model.folder)  # before minutes of measuring
    check_available(model, options.engine, options.precision)
    tables: list[LatencyTable] = []
    for choice in available_engines(model, options.engine, options.precision):
        try:
            # Of an engine that is not named, an option that it lacks is no error.
            asked = options.engine is not None or takes_threads(choice.engine)
            threads = options.threads if asked else None
            engine = load_engine(choice.engine, model, choice.precision, threads=threads)
        except UserError as error:
            refused.append(f"{choice.engine}, {choice.precision}: {error}")
            continue
        lengths, name = measured_lengths(model), " ".join(choice)
        with tqdm(desc=name, unit=" programs", disable=None) as bar:
            table = measure_latency(engine, choice, lengths, [options.batch_size], bar.update)
        if not tables:
            print(TABLE_NOTE)
        print("\n".join(table.lines(model.layers)))
        tables.append(table)
    if not tables:
        raise UserError("; ".join(refused))
    for reason in refused:
        print(f"not measured: {reason}")
    print("\n".join(describe_fastest(model, tables)))
    print(f"saved in {write_tables(model.folder, tables)}")
    print(f"without --engine and --precision, predict and serve use {describe_default(model)}")


def _predict_rows(
    classifier: AdaptiveClassifier, rows: Iterable[Record], columns: Columns, batch_size: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields (object for the output, position in the input) of every row, in order."""
    taken: collections.deque[Record] = collections.deque()  # not yet predicted
    count = len(columns.texts)
    kept = [_output_key(name) for name in columns.kept]

    def texts() -> Iterator[Any]:
        for row in rows:
            taken.append(row)
            missing, error = missing_column(row.values, columns), row.error
            if error is None and missing is not None:
                error = f"column {missing!r} is empty"
            yield row.values[:count] if error is None else InvalidRow(error)

    for prediction in classifier.stream_rows(texts(), batch_size):
        if isinstance(prediction, InvalidRow):
            found: dict[str, Any] = {"error": prediction.reason}
        elif not prediction.is_finite:
            found = {"error": "the model's output is not finite: its training diverged"}
        else:
            found = {"label": prediction.label}
            if prediction.probability is not None:
                found["probability"] = round(prediction.probability, 6)
            found |= {"exit": prediction.exit, "cost": round(prediction.cost, 6)}
        row = taken.popleft()
        yield found | dict(zip(kept, row.values[count:], strict=False)), row.position


if __name__ == "__main__":
    sys.exit(main())
