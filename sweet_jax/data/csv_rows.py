"""Tables of CSV and TSV files, whose rows are recovered after a stray or unclosed quote.

The csv module reads a field with an unclosed quote up to the next quote, including whole rows. Here
a row of several lines must be quoted strictly (RFC 4180: a closing quote is followed by a separator
or the end of the line) and end within a number of lines, and its lines must not look like rows of
their own. Otherwise its first line is an error, and the lines after it are read again as rows.
"""

import collections
import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from sweet_jax.config import UserError
from sweet_jax.data.column_names import parse_names
from sweet_jax.data.tables import Columns, Record, Table, find_column, make_record
from sweet_jax.data.text_files import TextFile

_LONGEST = 1 << 24  # characters of a row
_MOST_LINES = 10_000  # of a row
_MOST_LINES_ALONE = 100  # of a row of one field, whose lines no separator tells from rows
_HEADER_LINES = 16  # that are searched for the header
_MIN_ROWS = 2  # lines with commas as in rows, from which a text is taken for rows

_OTHERS = (",", ";", "\t", "|")  # separators that spreadsheets of other countries write
_FIX = 'double the quote (""), remove it, or save the file as JSONL'


class CsvRow(NamedTuple):
    """Holds the fields of one row, the header included, or its error."""

    fields: list[str]  # [] for an error
    error: str | None
    line: int  # number of its first line, from 1


class _Lines:
    """Feeds the lines of a file to the csv module, one row at a time, and takes lines back."""

    def __init__(self, file: Iterable[str]):
        self._file = iter(file)
        self._again: collections.deque[str] = collections.deque()
        self._size = 0  # characters of `taken`
        self.taken: list[str] = []  # lines of the current row
        self.number = 0  # of the last line taken, from 1
        self.stopped = False  # whether the current row lacks its end: at the file's, or the limit

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
        """Takes back all lines of the current row but the first, to be read again."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1


def csv_table(file: TextFile, delimiter: str, wanted: Sequence[str]) -> Table:
    """Returns the table of a CSV or TSV file.

    Args:
      file: of the table.
      delimiter: the separator of fields that its suffix stands for.
      wanted: names of columns, or lists of them as `parse_names` reads. Another separator is used
        where a line "sep=" before the header names it, where the header has these columns only
        with it, or else more than one.

    Raises UserError for a file without a header.

    """
    csv.field_size_limit(_LONGEST)  # of the whole process
    begun = list(itertools.islice(file.lines, _HEADER_LINES))
    found = _find_delimiter(begun, delimiter, wanted)
    rows = read_rows(itertools.chain(begun, file.lines), found)
    header = next(rows, None)
    wrong = "no first line with the names of its columns" if header is None else header.error
    if header is not None and re.search("[\ud800-\udfff]", "".join(header.fields)):
        wrong = "its first line is not UTF-8; save it as UTF-8"
    if header is None or wrong:
        raise UserError(f"could not read {str(file.path)!r}: {wrong}")

    def records(columns: Columns) -> Iterator[Record]:
        places = [find_column(name, header.fields) for name in columns.names]
        for row, (fields, error, line) in enumerate(rows, start=1):
            if error is not None:
                yield Record((), error, file.position(), row, line)
            else:
                # An empty field is a missing text; the words "NA" or "null" are texts.
                values = tuple([fields[place] or None for place in places])
                yield make_record(values, columns, file.position(), row, line)

    return Table(header.fields, records)


def _find_delimiter(lines: Sequence[str], usual: str, wanted: Sequence[str]) -> str:
    """Returns the separator of the fields of a file that begins with these lines."""
    header = next((line.strip("\r\n") for line in lines if line.strip()), "")
    if named := re.fullmatch("sep=(.)", header):
        return named[1]
    fields = {d: next(csv.reader([header], delimiter=d), []) for d in (usual, *_OTHERS)}
    for delimiter, names in fields.items():
        known = {*names, *(name.strip() for name in names)}
        if wanted and all(known.issuperset(parse_names(name, names)) for name in wanted):
            return delimiter
    return next((delimiter for delimiter, names in fields.items() if len(names) > 1), usual)


def read_rows(file: Iterable[str], delimiter: str) -> Iterator[CsvRow]:
    """Yields the rows of a file in order, the header first. Empty lines are skipped.

    So is a line "sep=" before the header, by which Excel knows the separator. A row whose number of
    fields is not that of the header is an error.

    Args:
      file: lines with their ends, of a file opened with newline="".
      delimiter: the separator of fields.

    """
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
            if len(lines.taken) > 1:
                lines.put_back()
                rows = csv.reader(lines, delimiter=delimiter)
            yield CsvRow([], f"{len(fields)} fields where the header has {width}", start)
        else:
            width = len(fields)
            yield CsvRow(fields, None, start)


def _quote_error(lines: _Lines, fields: list[str], width: int, delimiter: str) -> str | None:
    """Returns the error of the quotes of a row of several lines, or None."""
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
            "each line has the fields of a row: close the quote, or, if this is one text, save the "
            "file as JSONL"
        )
    return None


def _are_separate(lines: Sequence[str], width: int, delimiter: str) -> bool:
    """Returns whether lines with as many separators each as the header are rows rather than prose.

    A comma in prose is mostly followed by a blank or the end of the line. Several lines must have
    other commas, so that a text of several lines is not taken for rows. Tabs are rare in prose.
    """
    if width < 2 or delimiter == "\t":
        return width > 1
    prose = re.compile(re.escape(delimiter) + r"(\s|$)")
    least = _MIN_ROWS + (width == 2)  # one comma in a line says less than several
    return sum(not prose.search(line) for line in lines) >= least
