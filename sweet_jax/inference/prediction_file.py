"""The file of answers that predict writes: for one process alone, gone on with where it ends."""

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

_BEGINNINGS = (b'{"label": ', b'{"error": ')  # of a row of the output
_CHECKED = 32  # rows of an output that are computed again before it is gone on with


@dataclasses.dataclass
class Tally:
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


@contextlib.contextmanager
def open_output(path: Path, source: Path) -> Iterator[BinaryIO]:
    """The output, to be read and gone on with, for this process alone.

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


def read_existing(file: BinaryIO, path: Path) -> tuple[Tally, list[dict[str, Any]], int]:
    """What stands in an output: its tally, its last rows, and where the last whole row ends.

    Raises UserError for a line that is no answer.
    """
    tally, last, end = Tally(), collections.deque[dict[str, Any]](maxlen=_CHECKED), 0
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


def check_same_rows(
    path: Path, there: Sequence[Mapping[str, Any]], answers: Iterator[tuple[dict[str, Any], int]]
) -> None:
    """Compares the first answers with the last ones of an output: the rows may have been changed,
    and a finished output says nothing of what made it. Raises UserError where they differ.
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
