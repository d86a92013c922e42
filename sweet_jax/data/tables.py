"""Tables: the columns of an opened file, and the records of the wanted ones."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from sweet_jax.config import UserError, check_choice


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """Holds the wanted values of one row of a file, or its error."""

    values: tuple[str | None, ...]  # of the wanted columns, None if missing; () for an error
    error: str | None
    position: int  # bytes of the file read so far; rows of Parquet, Arrow, Excel; files of a folder
    row: int  # from 1, the header not counted
    line: int  # number of its first line, from 1; 0 in formats without lines


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names the columns that are read."""

    texts: tuple[str, ...]
    label: str | None = None  # None: texts alone, for prediction

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the text columns, then the label column: the order of `Record.values`."""
        return self.texts if self.label is None else (*self.texts, self.label)


class Table(NamedTuple):
    """An opened file: its columns, and a function that yields its records.

    Attributes:
      names: of the columns; of JSON, the keys of the first 1,000 objects; of .txt, none.
      records: yields the records of some of the columns; once.
      schema: of a Parquet or Arrow file, which may declare the names of classes.

    """

    names: Sequence[str]
    records: Callable[[Columns], Iterator[Record]]
    schema: pa.Schema | None = None


def find_column(name: str, present: Sequence[str]) -> int:
    """Returns the index of a column; blanks around names do not count, unless both are present.

    Raises UserError for a name that is absent, or occurs more than once.
    """
    if name not in present:
        name, present = name.strip(), [other.strip() for other in present]
    check_choice("column", name, present)
    if present.count(name) > 1:
        raise UserError(f"column {name!r} occurs more than once: rename all but one")
    return present.index(name)


def make_record(
    values: tuple[Any, ...], columns: Columns, position: int, row: int, line: int = 0
) -> Record:
    """Returns a record of the values, or of the error that one is not text or not UTF-8."""
    for value, name in zip(values, columns.names, strict=True):
        if value is None:
            continue
        if not isinstance(value, str):
            error = f"column {name!r} is not text but {value!a:.40}"
            return Record((), error, position, row, line)
        try:
            value.encode()
        except UnicodeEncodeError:
            error = f"column {name!r} holds text that is not UTF-8, {value!a:.60}; save it as UTF-8"
            return Record((), error, position, row, line)
    return Record(values, None, position, row, line)
