"""The file of predictions: held by one process, resumed where it ends."""

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
from sweet_jax.files import atomic_write, read_json, write_json
from sweet_jax.inference.prediction_tables import TABLE_WRITERS

PREDICTED = ("label", "probability", "exit", "cost", "error")  # keys of a row of the output
_BEGINNINGS = (b'{"label": ', b'{"error": ')  # of a line of the output
_NOT_WRITTEN = (".tsv", ".xlsx", ".arrow", ".feather", ".gz", ".bz2", ".xz")  # but read
CHECKED = 32  # rows of an output that are computed again before it is resumed


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


class OutputFile:
    """The file of predictions that a command writes, or resumes where it ends.

    A table (.csv, .parquet) is made at the end of a JSONL file beside it. Anything that is no
    regular file, such as /dev/stdout, takes JSONL as it comes, and is not resumed.

    Attributes:
      path: that was asked for.
      streams: whether it is no regular file.

    """

    def __init__(self, path: Path):
        self.path = path
        self._standard = str(path) in ("/dev/stdout", "/dev/fd/1")
        # os.path: a name that is too long breaks Path's methods, and is refused by `open`.
        regular = os.path.isfile(path) or os.path.isdir(path) or not os.path.exists(path)
        self.streams = self._standard or not regular
        self._convert = None if self.streams else TABLE_WRITERS.get(path.suffix.lower())
        aside = path.with_name(f".{path.name}.unfinished.jsonl")
        self._rows = path if self._convert is None else aside
        self._note = self._rows.with_name(f".{path.name}.identity.json")

    @contextlib.contextmanager
    def open(self, sources: Sequence[Path]) -> Iterator[BinaryIO]:
        """Opens the rows to be read and resumed, and locks them for this process.

        Raises UserError where they cannot be written to, are the input, or are another process's,
        a table is there already, or the name is of a format that is not written.
        """
        if not self.streams and self.path.suffix.lower() in _NOT_WRITTEN:
            raise UserError(
                f"--output {str(self.path)!r} would not be a file of that kind: predictions are "
                "written as .jsonl, .csv or .parquet"
            )
        if self._convert is not None and os.path.exists(self.path):
            raise UserError(f"--output {str(self.path)!r} exists: choose another, or remove it")
        if any(os.path.exists(self._rows) and os.path.samefile(self._rows, s) for s in sources):
            raise UserError("--output must be another file than --input")
        try:
            self._rows.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._note.stat()  # an OSError now if its name, the longest, is too long
            if self.streams:
                file: Any = os.fdopen(os.dup(1), "wb") if self._standard else open(self.path, "wb")  # noqa: SIM115 - closed by the with below
            else:
                file = open(self._rows, "a+b")  # noqa: SIM115 - closed by the with below
        except OSError as error:
            raise UserError(
                f"--output {str(self.path)!r} cannot be written to ({error.strerror}): choose "
                "another"
            ) from error
        with file:
            if not self.streams:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise UserError(
                        f"--output {str(self.path)!r} is in use by another process"
                    ) from error
            yield file

    @contextlib.contextmanager
    def recorded(self, identity: Mapping[str, Any], file: BinaryIO) -> Iterator[bool]:
        """Keeps the identity of what makes the rows in a file beside them.

        Of finished rows without that of the input, to which rows may be added. A table needs none
        once it is made: it is not resumed. Rows whose identity is not known stay without one.

        Yields whether it is known what made the rows there are. Raises UserError if they have
        another identity.
        """
        if self.streams:
            yield True
            return
        ours = json.loads(json.dumps(identity))
        begins = not file.seek(0, os.SEEK_END)
        known = begins or self._note.exists()
        if begins:
            write_json(self._note, ours)
        elif known:
            theirs = read_json(self._note)
            if "input" not in theirs:
                del ours["input"]
            differing = [k for k in {**ours, **theirs} if theirs.get(k) != ours.get(k)]
            if differing:
                key = differing[0]
                raise UserError(
                    f"--output {str(self.path)!r} was made with another {key}, "
                    f"{theirs.get(key)!r}; here it is {ours.get(key)!r}: choose another, or remove "
                    f"{self._rows.name!r}"
                )
        yield known
        if self._convert is not None:
            self._note.unlink(missing_ok=True)
        elif known:
            ours.pop("input", None)
            write_json(self._note, ours)

    def read_existing(self, file: BinaryIO) -> tuple[Tally, list[dict[str, Any]], int]:
        """Reads the rows there are: their tally, the last ones, and where the last whole one ends.

        Raises UserError for a line that is not a row of an output.
        """
        tally, last, end = Tally(), collections.deque[dict[str, Any]](maxlen=CHECKED), 0
        if self.streams:
            return tally, [], 0
        file.seek(0)
        for number, line in enumerate(file, start=1):
            whole = line.endswith(b"\n")
            begun = any(key.startswith(line[: len(key)]) for key in _BEGINNINGS)
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TypeError("not an object")
                # Without its end even a row of an output is written again; another file's is not.
                (tally if whole else Tally()).add(row)
                if not whole:
                    break
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if isinstance(error, ValueError) and begun and not whole:
                    break  # a row cut short
                raise UserError(
                    f"--output {str(self.path)!r} exists, and line {number} is not an output of "
                    "this command: choose another, or remove it"
                ) from error
            last.append(row)
            end += len(line)
        return tally, list(last), end

    def check_same_rows(
        self, last: Sequence[Mapping[str, Any]], rows: Iterator[tuple[dict[str, Any], int]]
    ) -> None:
        """Compares the last rows of an output with the same rows computed again.

        The input may have been changed, and what made an output may be unknown. Raises UserError
        where they differ.

        Args:
          last: the last rows.
          rows: (row, position in the input), beginning with the first of these; as many are
            consumed.

        """
        for old in last:
            new, _ = next(rows, ({}, 0))
            if not (old.keys() == new.keys() and all(_equal(old[k], v) for k, v in new.items())):
                raise UserError(
                    f"--output {str(self.path)!r} exists, and was not made by this model, target "
                    f"and input: it has {json.dumps(dict(old))} where {json.dumps(new)} belongs; "
                    "choose another, or remove it"
                )

    def truncate(self, file: BinaryIO, end: int) -> None:
        """Drops a row that was cut short."""
        if not self.streams:
            file.truncate(end)

    def finish(self) -> None:
        """Makes the table of the rows, where one was asked for."""
        if self._convert is not None:
            with atomic_write(self.path) as aside:
                self._convert(self._rows, aside)
            self._rows.unlink()


def _equal(old: Any, new: Any) -> bool:
    both = isinstance(old, float) and isinstance(new, float)
    return abs(old - new) < 1e-3 if both else old == new
