"""Tables from CSV and TSV files, with recovery after a stray or unclosed quote.

The csv module reads a field with an unclosed quote up to the next quote, even across rows. Here, a
row that spans several lines must be quoted strictly (RFC 4180: a closing quote is followed by a
separator or the end of the line), must end within a number of lines, and its lines must not look
like separate rows. Otherwise its first line is an error, and the other lines are read again as
rows.
"""

import collections
import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from sweet_jax.data.column_names import parse_names
from sweet_jax.data.tables import (
    LONGEST_TEXT,
    Columns,
    Record,
    Table,
    find_column,
    make_record,
)
from sweet_jax.data.text_files import TextFile
from sweet_jax.errors import UserError

_LONGEST = LONGEST_TEXT  # maximum number of characters in a row
_MOST_LINES = 10_000  # maximum number of lines in a row
_MOST_LINES_ALONE = 100  # the same with a single column, where no separator tells lines from rows
_HEADER_LINES = 16  # number of lines that are searched for the header
_MIN_ROWS = 2  # number of lines that look like rows, from which on a text is taken for rows

_OTHERS = (",", ";", "\t", "|")  # separators that spreadsheets write, depending on the country
_FIX = 'double the quote (""), remove it, or save the file as JSONL'


class CsvRow(NamedTuple):
    """Holds the fields of one row or of the header, or its error."""

    fields: list[str]  # [] if there is an error
    error: str | None
    line: int  # number of the row's first line, from 1


class _Lines:
    """Feeds the lines of a file to the csv module row by row, and can put lines back."""

    def __init__(self, file: Iterable[str]):
        self._file = iter(file)
        self._again: collections.deque[str] = collections.deque()
        self._size = 0  # number of characters in `taken`
        self.taken: list[str] = []  # lines of the current row
        self.number = 0  # number of the last line taken, from 1
        self.stopped = False  # whether the row is incomplete at the file's end or at a limit

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
        """Forgets the lines of the previous row."""
        self.taken, self._size = [], 0

    def put_back(self) -> None:
        """Puts back all lines of the current row except the first, to be read again."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1


def csv_table(file: TextFile, delimiter: str, column_names: Sequence[str]) -> Table:
    """Returns the table of a CSV or TSV file.

    The separator is the one in a line "sep=" before the header, if there is such a line. Otherwise
    it is the first separator, starting with `delimiter`, that gives the header all `column_names`;
    or else the first one that gives it more than one column.

    Args:
      file: file of the table.
      delimiter: field separator according to the suffix of the file.
      column_names: names of columns, or lists of names as in `parse_names`.

    Raises:
      UserError: if the file has no header.

    """
    csv.field_size_limit(_LONGEST)  # applies to the whole process
    begun = list(itertools.islice(file.lines, _HEADER_LINES))
    separator = _find_delimiter(begun, delimiter, column_names)
    rows = read_rows(itertools.chain(begun, file.lines), separator)
    header = next(rows, None)
    wrong = "no first line with the names of its columns" if header is None else header.error
    if header is not None and re.search("[\ud800-\udfff]", "".join(header.fields)):
        wrong = "its first line is not UTF-8; save it as UTF-8"
    if header is None or wrong:
        raise UserError(f"could not read {str(file.path)!r}: {wrong}")

    def records(columns: Columns) -> Iterator[Record]:
        indices = [find_column(name, header.fields) for name in columns.names]
        for row, (fields, error, line) in enumerate(rows, start=1):
            if error is not None:
                yield Record((), error, file.position(), row, line)
            else:
                # An empty field is a missing value; the words "NA" and "null" are texts.
                values = tuple([fields[index] or None for index in indices])
                yield make_record(values, columns, file.position(), row, line)

    return Table(header.fields, records)


def _find_delimiter(lines: Sequence[str], usual: str, column_names: Sequence[str]) -> str:
    """Returns the field separator of a file that begins with these lines."""
    header = next((line.strip("\r\n") for line in lines if line.strip()), "")
    if named := re.fullmatch("sep=(.)", header):
        return named[1]
    fields = {d: next(csv.reader([header], delimiter=d), []) for d in (usual, *_OTHERS)}
    for delimiter, names in fields.items():
        header_names = {*names, *(name.strip() for name in names)}
        if column_names and all(
            header_names.issuperset(parse_names(name, names)) for name in column_names
        ):
            return delimiter
    return next((delimiter for delimiter, names in fields.items() if len(names) > 1), usual)


def read_rows(file: Iterable[str], delimiter: str) -> Iterator[CsvRow]:
    """Yields the rows of a file in order, starting with the header.

    Empty lines are skipped, and so is a line "sep=" before the header, which tells Excel the
    separator. A row with another number of fields than the header is an error.

    Args:
      file: lines, including their ends, of a file opened with newline="".
      delimiter: field separator.

    """
    lines, width = _Lines(file), 0  # number of fields in the header
    rows = csv.reader(lines, delimiter=delimiter)
    while True:
        lines.begin_row()
        start, fields, error = lines.number + 1, [], None
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as raised:
            error = f"not a valid CSV row: {raised}"
        if not error and (len(lines.taken) > 1 or lines.stopped):
            error = _quote_error(lines, fields, width, delimiter)
        if error:
            lines.put_back()
            rows = csv.reader(lines, delimiter=delimiter)
            yield CsvRow([], error, start)
        elif not fields or (not width and fields == ["sep=", ""]):
            continue
        elif width and len(fields) != width:
            if len(lines.taken) > 1:
                lines.put_back()
                rows = csv.reader(lines, delimiter=delimiter)
            found = f"{len(fields)} field" + "s" * (len(fields) != 1)
            yield CsvRow([], f"{found}, but the header has {width}", start)
        else:
            width = len(fields)
            yield CsvRow(fields, None, start)


def _quote_error(lines: _Lines, fields: list[str], width: int, delimiter: str) -> str | None:
    """Returns the quoting error of a row that spans several lines, or None."""
    taken, last = lines.taken, lines.number
    start = last - len(taken) + 1
    try:
        collections.deque(csv.reader(taken, delimiter=delimiter, strict=True), maxlen=0)
    except csv.Error:
        end = "is not closed" if lines.stopped else f"is not closed properly before line {last}"
        return f"a quote in line {start} {end}: {_FIX}"
    if width == 1 and len(taken) > _MOST_LINES_ALONE:
        return f"a quote in line {start} is closed only in line {last}: {_FIX}"
    counted = taken if len(fields) == width else taken[:-1]
    if all(line.count(delimiter) == width - 1 for line in counted) and _are_separate(
        taken[:-1], width, delimiter
    ):
        return (
            f"looks like several rows: a quote in line {start} is closed only in line {last}, and "
            "each line has as many fields as a row: close the quote or, if this is one text, save "
            "the file as JSONL"
        )
    return None


def _are_separate(lines: Sequence[str], width: int, delimiter: str) -> bool:
    """Returns whether lines with as many separators as the header are rows rather than prose.

    A comma in prose is mostly followed by a space or the end of the line. Several lines must have
    only other commas, so that a text of several lines is not taken for rows. Tabs are rare in
    prose.
    """
    if width < 2 or delimiter == "\t":
        return width > 1
    prose = re.compile(re.escape(delimiter) + r"(\s|$)")
    least = _MIN_ROWS + (width == 2)  # a single comma per line is weaker evidence
    return sum(not prose.search(line) for line in lines) >= least
