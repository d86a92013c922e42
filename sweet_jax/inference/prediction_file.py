"""The JSONL file of predictions: held by one process, resumed where it ends."""

import collections
import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sweet_jax.config import UserError
from sweet_jax.files import write_json

_BEGINNINGS = (b'{"label": ', b'{"error": ')  # of a line of the output
_CHECKED = 32  # rows of an output that are computed again before it is resumed


@dataclasses.dataclass
class Tally:
    """Holds totals over the rows of an output."""

    rows: int = 0
    errors: int = 0  # rows without a prediction
    cost: float = 0.0  # sum over the others, in shares of the full model's layers
    # How many exited at each layer.
    exits: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts a row. Raises KeyError or TypeError for one that is not of an output."""
        self.rows += 1
        if "error" in row:
            self.errors += 1
        else:
            self.cost += row["cost"]
            self.exits[row["exit"]] += 1

    def summary(self, speed: float) -> str:
        """Formats the totals in one line; `speed` is in rows a second."""
        predicted = max(1, self.rows - self.errors)
        exits = sorted(self.exits.items())
        shares = [f"{count / predicted:.1%} at layer {layer}" for layer, count in exits]
        return (
            f"{self.rows} rows ({self.errors} with an error), {speed:.1f} rows/s, mean cost "
            f"{self.cost / predicted:.4f}, exits: {', '.join(shares) or 'none'}"
        )


@contextlib.contextmanager
def open_output(path: Path, source: Path) -> Iterator[BinaryIO]:
    """Opens the output to be read and resumed, and locks it for this process.

    Raises UserError where it cannot be written to, is the input, or is another process's.
    """
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
def record_origin(path: Path, identity: Mapping[str, Any], file: BinaryIO) -> Iterator[None]:
    """Keeps the identity of what makes an output in a file beside it, until it is finished.

    Raises UserError if an unfinished output has another identity.
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


def read_existing(file: BinaryIO, path: Path) -> tuple[Tally, list[dict[str, Any]], int]:
    """Reads an output: its tally, its last rows, and where the last whole row ends, in bytes.

    Raises UserError for a line that is not a row of an output.
    """
    tally, last, end = Tally(), collections.deque[dict[str, Any]](maxlen=_CHECKED), 0
    file.seek(0)
    for number, line in enumerate(file, start=1):
        whole = line.endswith(b"\n")
        if not whole and any(key.startswith(line[: len(key)]) for key in _BEGINNINGS):
            break  # a row cut short
        try:
            row = json.loads(line) if whole else None
            if not isinstance(row, dict):
                raise TypeError("not an object")
            tally.add(row)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"--output {str(path)!r} exists, and line {number} is not an output of this "
                "command: choose another, or remove it"
            ) from error
        last.append(row)
        end += len(line)
    return tally, list(last), end


def check_same_rows(
    path: Path, last: Sequence[Mapping[str, Any]], rows: Iterator[tuple[dict[str, Any], int]]
) -> None:
    """Compares the last rows of an output with the same rows computed again.

    The input may have been changed, and a finished output does not record what made it. `rows`,
    (row, position in the input) each, begin with the first of the last ones; so many are consumed.
    Raises UserError where they differ; `path` is for its message.
    """
    for old in last:
        new, _ = next(rows, ({}, 0))
        same = old.keys() == new.keys() and all(
            abs(old[k] - v) < 1e-3 if isinstance(v, float) else old[k] == v for k, v in new.items()
        )
        if not same:
            raise UserError(
                f"--output {str(path)!r} exists, and was not made by this model, target and input: "
                f"it has {json.dumps(dict(old))} where {json.dumps(new)} belongs; choose another, "
                "or remove it"
            )
