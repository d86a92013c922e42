"""The file of predictions: locked by one process, and resumed where it ends."""

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sweet_jax.data.readers import COMPRESSED
from sweet_jax.data.records import format_of
from sweet_jax.errors import UserError
from sweet_jax.file_lock import check_locks, lock_file
from sweet_jax.files import atomic_write, read_json, write_json
from sweet_jax.inference.prediction_tables import TABLE_WRITERS

PREDICTED = ("label", "probability", "exit", "cost", "error")  # keys of a row of the output
_BEGINNINGS = (b'{"label": ', b'{"error": ')  # the beginnings of a line of the output
# Suffixes of input files under which rows are written as JSONL; other ones are refused.
_ROWS_AS_JSON = (".jsonl", ".json", ".ndjson", ".txt")
CHECKED = 32  # number of rows of an output that are computed again before it is resumed


@dataclasses.dataclass
class Tally:
    """Holds totals over the rows of an output."""

    rows: int = 0
    errors: int = 0  # rows without a prediction
    cost: float = 0.0  # sum over rows with a prediction, in shares of the full model's layers
    # Number of rows that exited at each layer.
    exits: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts a row. Raises KeyError or TypeError if it is not a row of an output."""
        self.rows += 1
        if "error" in row:
            self.errors += 1
        else:
            self.cost += row["cost"]
            self.exits[row["exit"]] += 1

    def summary(self, speed: float) -> str:
        """Formats the totals in one line; `speed` is in rows per second."""
        predicted = max(1, self.rows - self.errors)
        exits = sorted(self.exits.items())
        shares = [f"{count / predicted:.1%} at layer {layer}" for layer, count in exits]
        return (
            f"{self.rows} rows ({self.errors} with an error), {speed:.1f} rows/s, mean cost "
            f"{self.cost / predicted:.4f}, exits: {', '.join(shares) or 'none'}"
        )


class OutputFile:
    """Represents the file of predictions that a command writes, or resumes where it ends.

    For a table (.csv, .parquet), rows are written to a JSONL file next to it, which is converted at
    the end. Anything other than a regular file, such as /dev/stdout, is written as a stream of
    JSONL and is not resumed.

    Attributes:
      path: the requested path.
      streams: whether the path is something other than a regular file.

    """

    def __init__(self, path: Path):
        self.path = path
        self._standard = str(path) in ("/dev/stdout", "/dev/fd/1")
        # os.path, since Path's methods raise for a name that is too long; `open` reports that.
        regular = os.path.isfile(path) or os.path.isdir(path) or not os.path.exists(path)
        self.streams = self._standard or not regular
        self._convert = None if self.streams else TABLE_WRITERS.get(path.suffix.lower())
        aside = path.with_name(f".{path.name}.unfinished.jsonl")
        self._rows = path if self._convert is None else aside
        self._note = self._rows.with_name(f".{path.name}.identity.json")

    def _has_other_format(self) -> bool:
        """Returns whether the file's format is one of input files that is not written."""
        written = ("", *_ROWS_AS_JSON, *TABLE_WRITERS)
        return self.path.suffix.lower() in COMPRESSED or format_of(self.path) not in written

    @contextlib.contextmanager
    def open(self, sources: Sequence[Path]) -> Iterator[BinaryIO]:
        """Opens the file of rows for reading and appending, and locks it for this process.

        Raises UserError if the file cannot be written, is one of the input files `sources`, or is
        in use by another process, if a table already exists, or for a format that is not written.
        """
        written = [path for path in {self.path, self._rows} if os.path.exists(path)]
        if any(os.path.samefile(path, source) for path in written for source in sources):
            raise UserError("--output and --input are the same file: choose another --output")
        if not self.streams:
            check_locks()  # before a file is left behind
        if not self.streams and self._has_other_format():
            raise UserError(
                f"--output {str(self.path)!r} has a format that predictions are not written in: "
                "choose .jsonl, .csv or .parquet"
            )
        if self._convert is not None and os.path.exists(self.path):
            raise UserError(
                f"--output {str(self.path)!r} exists: choose another file, or remove it"
            )
        try:
            self._rows.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._note.stat()  # raises OSError if its name, the longest one, is too long
            if self.streams:
                file: Any = os.fdopen(os.dup(1), "wb") if self._standard else open(self.path, "wb")  # noqa: SIM115 - closed by the with below
            else:
                file = open(self._rows, "a+b")  # noqa: SIM115 - closed by the with below
        except OSError as error:
            raise UserError(
                f"--output {str(self.path)!r} cannot be written ({error.strerror}): choose "
                "another file"
            ) from error
        with file:
            if not self.streams:
                try:
                    lock_file(file)
                except OSError as error:
                    raise UserError(
                        f"--output {str(self.path)!r} is in use by another process: wait for it, "
                        "or choose another file"
                    ) from error
            yield file

    @contextlib.contextmanager
    def recorded(self, identity: Mapping[str, Any], file: BinaryIO) -> Iterator[bool]:
        """Records the identity of the model and input that produce the rows, in a separate file.

        Once the rows are finished, the input is removed from the identity, since rows may be added
        to it. A finished table keeps no identity, since it is not resumed. Existing rows without a
        recorded identity stay without one.

        Args:
          identity: identity of the model and the input, in values of JSON.
          file: the file from `open`.

        Yields:
          Whether the identity of the existing rows is known.

        Raises UserError if they have another identity, or if the file with it is damaged.

        """
        if self.streams:
            yield True
            return
        ours = json.loads(json.dumps(identity))
        begins = not file.seek(0, os.SEEK_END)
        has_identity = begins or self._note.exists()
        if begins:
            write_json(self._note, ours)
        elif has_identity:
            theirs = _read_identity(self._note)
            if "input" not in theirs:
                del ours["input"]
            differing = [k for k in {**ours, **theirs} if theirs.get(k) != ours.get(k)]
            if differing:
                key = differing[0]
                raise UserError(
                    f"--output {str(self.path)!r} was made with another {key}, "
                    f"{theirs.get(key)!r}; here it is {ours.get(key)!r}: choose another file, or "
                    f"remove {self._rows.name!r}"
                )
        yield has_identity
        if self._convert is not None:
            self._note.unlink(missing_ok=True)
        elif has_identity:
            ours.pop("input", None)
            write_json(self._note, ours)

    def read_existing(self, file: BinaryIO) -> tuple[Tally, list[dict[str, Any]], int]:
        """Reads the existing rows.

        Returns:
          (their tally, the last rows, the position in bytes where the last complete row ends).

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
                # A row without its newline is not counted, since it will be rewritten, but it must
                # be a row of an output.
                (tally if whole else Tally()).add(row)
                if not whole:
                    break
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if isinstance(error, ValueError) and begun and not whole:
                    break  # an incomplete row
                raise UserError(
                    f"--output {str(self.path)!r} exists, and its line {number} is not a "
                    "prediction of this command: choose another file, or remove it"
                ) from error
            last.append(row)
            end += len(line)
        return tally, list(last), end

    def check_same_rows(
        self, last: Sequence[Mapping[str, Any]], rows: Iterator[tuple[dict[str, Any], int]]
    ) -> None:
        """Compares the last rows of an output with the same rows computed again.

        This is needed because the input may have changed, and the output's identity may be unknown.

        Args:
          last: last rows of the output.
          rows: iterator of (row, position in the input) that begins at the first of these; as many
            items are consumed.

        Raises UserError if the rows differ.

        """
        for old in last:
            new, _ = next(rows, ({}, 0))
            if not (old.keys() == new.keys() and all(_equal(old[k], v) for k, v in new.items())):
                raise UserError(
                    f"--output {str(self.path)!r} exists, but was not made with this model, target "
                    f"and input: it has {json.dumps(dict(old))} instead of {json.dumps(new)}: "
                    "choose another file, or remove it"
                )

    def truncate(self, file: BinaryIO, end: int) -> None:
        """Removes an incomplete row at the end."""
        if not self.streams:
            file.truncate(end)

    def finish(self) -> None:
        """Converts the rows to a table, if the path is that of a table."""
        if self._convert is not None:
            with atomic_write(self.path) as aside:
                self._convert(self._rows, aside)
            self._rows.unlink()


def _read_identity(path: Path) -> dict[str, Any]:
    """Reads a recorded identity. Raises UserError if the file is damaged."""
    try:
        identity = read_json(path)
    except ValueError:
        identity = None
    if not isinstance(identity, dict):
        # Without it, the last rows of the output are compared.
        raise UserError(f"{str(path)!r} is damaged: remove it")
    return identity


def _equal(old: Any, new: Any) -> bool:
    both = isinstance(old, float) and isinstance(new, float)
    return abs(old - new) < 1e-3 if both else old == new
