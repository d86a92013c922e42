"""Rows of CSV and TSV files, where a stray quote swallows none.

The csv module reads a quote that nobody closes up to the next quote, whole rows with it. Here a row
of several lines must be quoted as RFC 4180 has it (a closing quote stands before a separator or the
end of the line), must end within a number of lines, and its lines must not look like rows of their
own. Otherwise its first line is an error, and the lines after it are read anew, each by itself.
"""

import collections
import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

_LONGEST = 1 << 24  # characters of a row
_MOST_LINES = 10_000  # of a row
_ROWS_BY_CHANCE = 3  # lines of prose that have the commas of a row: as many are hardly found

_FIX = 'double the quote (""), remove it, or save the file as JSONL'


class CsvRow(NamedTuple):
    """One row of a file, the header too."""

    fields: list[str]  # none where there is an error
    error: str | None
    line: int  # in which the row begins, from 1


class _Lines:
    """Lines of a file for the csv module: it takes those of one row, and some can be put back."""

    def __init__(self, file: Iterable[str]):
        self._file = iter(file)
        self._again: collections.deque[str] = collections.deque()
        self._size = 0  # characters of `taken`
        self.taken: list[str] = []  # lines of the row that is being read
        self.number = 0  # of the last line taken
        self.stopped = False  # whether the row asks for more lines than there are, or it may have

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.stopped = True
        if len(self.taken) >= _MOST_LINES or self._size > _LONGEST:
            raise StopIteration
        line = self._again.popleft() if self._again else next(self._file)
        self.stopped = False
        self.taken.append(line)
        self.number += 1
        self._size += len(line)
        return line

    def begin_row(self) -> None:
        """Forgets the lines of the row before."""
        self.taken, self._size = [], 0

    def put_back(self) -> None:
        """Puts all lines of a row back but its first."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1


def read_rows(file: Iterable[str], delimiter: str) -> Iterator[CsvRow]:
    """Yields the rows of a file in order, the header first; empty lines are none.

    A line "sep=," before the header, as Excel reads it, is left out. As many errors come as there
    are lines that cannot be read; one row of several lines has one.

    Args:
      file: lines with their ends, opened with newline="".
      delimiter: between two fields.

    """
    csv.field_size_limit(_LONGEST)
    lines, width = _Lines(file), 0  # fields of the header
    rows = csv.reader(lines, delimiter=delimiter)
    while True:
        lines.begin_row()
        start, fields, error = lines.number + 1, [], None
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as raised:
            error = f"not a row of CSV: {raised}"
        if not error and (len(lines.taken) > 1 or lines.stopped):
            error = _quote_error(lines, fields, width, delimiter)
        if error:
            lines.put_back()
            rows = csv.reader(lines, delimiter=delimiter)
            yield CsvRow([], error, start)
        elif not fields or (not width and fields == ["sep=", ""]):
            continue
        elif width and len(fields) != width:
            yield CsvRow([], f"{len(fields)} fields where the header has {width}", start)
        else:
            width = len(fields)
            yield CsvRow(fields, None, start)


def _quote_error(lines: _Lines, fields: list[str], width: int, delimiter: str) -> str | None:
    """Returns what is wrong with the quotes of a row of several lines; None where nothing is."""
    taken, last = lines.taken, lines.number
    start = last - len(taken) + 1
    try:
        collections.deque(csv.reader(taken, delimiter=delimiter, strict=True), maxlen=0)
    except csv.Error:
        end = "is not closed" if lines.stopped else f"is not closed properly before line {last}"
        return f"a quote in line {start} {end}: {_FIX}"
    counted = taken if len(fields) == width else taken[:-1]
    if all(line.count(delimiter) == width - 1 for line in counted) and _are_separate(
        taken[:-1], width, delimiter
    ):
        return (
            f"looks like several rows: a quote in line {start} is closed only in line {last}, and "
            f"each line has the fields of a row: {_FIX}"
        )
    return None


def _are_separate(lines: Sequence[str], width: int, delimiter: str) -> bool:
    """Returns whether lines that have the separators of a row each are rows, and not prose.

    A comma of prose mostly has a blank or the end of the line behind it: several lines must have
    other ones, for a text that may be one must not be refused. Tabs are rare in prose.
    """
    if width < 2 or delimiter == "\t":
        return width > 1
    prose = re.compile(re.escape(delimiter) + r"(\s|$)")
    return sum(not prose.search(line) for line in lines) >= _ROWS_BY_CHANCE
