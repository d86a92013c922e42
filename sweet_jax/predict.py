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
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from tqdm import tqdm

from sweet_jax.config import UserError, split_names
from sweet_jax.data.stream import TextRow, count_positions, stream_rows
from sweet_jax.files import write_json
from sweet_jax.flags import Parser, command, dials, policy_lines

_BEGINNINGS = (b'{"label": ', b'{"error": ')  # of a row of the output
_CHECKED = 32  # rows of an output that are computed again before it is gone on with


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        return command(lambda: _run(_parse(argv)))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where the output ends", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("sweet_jax.predict", f"{__doc__}{policy_lines()}")
    parser.add_argument("--model", required=True, help="folder model/ of a run, or a hub id")
    parser.add_argument("--input", help="file of texts")
    parser.add_argument("--output", help="JSONL file of the answers")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="instead, time every stage on this machine, alone and in batches of --batch_size, and "
        "keep the table in the model's folder: --milliseconds reads it",
    )
    parser.add_dials()
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
    dials(options)
    if options.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1; got {options.batch_size}")
    if options.measure and (options.input or options.output):
        raise UserError("--measure times the model alone: leave --input and --output out")
    if not options.measure and not (options.input and options.output):
        raise UserError("give --input=FILE and --output=FILE, or --measure")
    return options


def _run(options: argparse.Namespace) -> None:
    # They import JAX: not for --help, or a mistake.
    from sweet_jax.compilation import keep_programs
    from sweet_jax.inference import AdaptiveClassifier
    from sweet_jax.serving.saved import open_model

    if options.measure:
        _measure(options)
        return
    source, target = Path(options.input), Path(options.output)
    if not source.is_file():
        what = "is not a file" if source.exists() else "does not exist"
        raise UserError(f"input {options.input!r} {what}")
    model = open_model(options.model, options.dtype)
    keep_programs()
    classifier = AdaptiveClassifier(model, options.policy, dials(options))
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
    with contextlib.closing(stream_rows(source, columns)) as rows:
        first = list(itertools.islice(rows, 1))  # a file that will not do must be known by now
        with _opened(target, source) as file, _made_by(target, identity, file):
            tally, last, end = _read_back(file, target)
            known = itertools.islice(itertools.chain(first, rows), tally.rows - len(last), None)
            answers = _answers(classifier, known, options.batch_size)
            _check_same(target, last, answers)
            file.truncate(end)
            began, start = time.perf_counter(), tally.rows
            with tqdm(total=count_positions(source), unit_scale=True, disable=None) as bar:
                for answer, position in answers:
                    file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
                    tally.add(answer)
                    bar.update(position - bar.n)
            seconds = time.perf_counter() - began
        print(tally.summary((tally.rows - start) / max(seconds, 1e-9)))


def _measure(options: argparse.Namespace) -> None:
    from sweet_jax.compilation import keep_programs
    from sweet_jax.serving.clock import measure, write_clock
    from sweet_jax.serving.saved import open_model

    keep_programs()
    model = open_model(options.model, options.dtype)
    with tqdm(unit=" programs", disable=None) as bar:
        clock = measure(model, [options.batch_size], bar.update)
    print("\n".join(clock.lines(model.layers)))
    print(f"kept in {write_clock(model, clock)}")


@dataclasses.dataclass
class _Tally:
    """What the rows of an output come to."""

    rows: int = 0
    errors: int = 0
    cost: float = 0.0
    exits: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def add(self, answer: Mapping[str, Any]) -> None:
        self.rows += 1
        if "error" in answer:
            self.errors += 1
        else:
            self.cost += answer["cost"]
            self.exits[answer["exit"]] += 1

    def summary(self, speed: float) -> str:
        """The last line; `speed` in rows a second."""
        answered = max(1, self.rows - self.errors)
        shares = [f"{n / answered:.1%} at {layer}" for layer, n in sorted(self.exits.items())]
        return (
            f"{self.rows} rows ({self.errors} with an error), {speed:.1f} rows/s, mean cost "
            f"{self.cost / answered:.4f}, left at layer: {', '.join(shares) or 'none'}"
        )


def _answers(
    classifier: Any, rows: Iterable[TextRow], batch_size: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """(an object of the output, the position in the input) of every row, in order."""
    from sweet_jax.serving.answers import NoText

    positions: collections.deque[int] = collections.deque()  # of rows taken, not yet answered

    def texts() -> Iterator[Any]:
        for row in rows:
            positions.append(row.position)
            yield row.texts if row.error is None else NoText(row.error)

    for found in classifier.stream_rows(texts(), batch_size):
        if isinstance(found, NoText):
            answer: dict[str, Any] = {"error": found.reason}
        elif not math.isfinite(found.probability):
            answer = {"error": "the model's answer is not a number: its training diverged"}
        else:
            answer = {"label": found.label, "probability": round(found.probability, 6)}
            answer |= {"exit": found.exit, "cost": found.cost}
        yield answer, positions.popleft()


@contextlib.contextmanager
def _opened(path: Path, source: Path) -> Iterator[BinaryIO]:
    """The output, to be read and gone on with, for this process alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise UserError(
            f"--output {str(path)!r} cannot be written to ({error.strerror}): choose another"
        ) from error
    with file:
        if os.path.samefile(path, source):
            raise UserError("--output must be another file than --input")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--output {str(path)!r} is in use by another process") from error
        yield file


@contextlib.contextmanager
def _made_by(path: Path, identity: Mapping[str, Any], file: BinaryIO) -> Iterator[None]:
    """Keeps beside an unfinished output what it is made by.

    Raises UserError if it was by another.
    """
    note = path.with_name(f".{path.name}.unfinished.json")
    ours = json.loads(json.dumps(identity))
    empty = not file.seek(0, os.SEEK_END)
    if empty:
        write_json(note, ours)
    elif note.exists():
        theirs = json.loads(note.read_text())
        differing = [k for k in ours if theirs.get(k) != ours[k]]
        if differing:
            key = differing[0]
            raise UserError(
                f"--output {str(path)!r} was begun with another {key}, {theirs.get(key)!r}; "
                f"here it is {ours[key]!r}: choose another, or remove it"
            )
    yield
    note.unlink(missing_ok=True)


def _read_back(file: BinaryIO, path: Path) -> tuple[_Tally, list[dict[str, Any]], int]:
    """What stands in an output: its tally, its last rows, and where the last whole row ends."""
    tally, last, end = _Tally(), collections.deque[dict[str, Any]](maxlen=_CHECKED), 0
    file.seek(0)
    for number, line in enumerate(file, start=1):
        whole = line.endswith(b"\n")
        if not whole and any(key.startswith(line[: len(key)]) for key in _BEGINNINGS):
            break  # a row cut short
        try:
            answer = json.loads(line) if whole else None
            if not isinstance(answer, dict):
                raise TypeError("not an answer")
            tally.add(answer)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"--output {str(path)!r} exists, and line {number} is no answer of this command: "
                "choose another, or remove it"
            ) from error
        last.append(answer)
        end += len(line)
    return tally, list(last), end


def _check_same(
    path: Path, there: Sequence[Mapping[str, Any]], answers: Iterator[tuple[dict[str, Any], int]]
) -> None:
    """Compares the first answers with the last ones of an output: the rows may have been changed,
    and a finished output says nothing of what made it.
    """
    for old in there:
        new, _ = next(answers, ({}, 0))
        same = old.keys() == new.keys() and all(
            abs(old[k] - v) < 1e-3 if isinstance(v, float) else old[k] == v for k, v in new.items()
        )
        if not same:
            raise UserError(
                f"--output {str(path)!r} exists, and was not made by this model, dial and input: "
                f"it has {json.dumps(dict(old))} where {json.dumps(new)} belongs; choose another, "
                "or remove it"
            )


if __name__ == "__main__":
    sys.exit(main())
