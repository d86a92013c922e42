"""Records from files of all formats, read in the same way for training and for prediction.

Records are streamed: memory does not grow with the size of the file, except for spreadsheets and
for JSON files that are one object. Nothing is unpickled or executed.
"""

import contextlib
import csv
import lzma
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa

from sweet_jax.data.arrow_tables import ipc_table, parquet_rows, parquet_table
from sweet_jax.data.csv_rows import csv_table
from sweet_jax.data.json_objects import json_table
from sweet_jax.data.label_folders import folder_table
from sweet_jax.data.spreadsheets import excel_table
from sweet_jax.data.tables import ColumnError, Columns, Record, Table
from sweet_jax.data.text_files import TextFile, lines_table, open_text
from sweet_jax.errors import AbsentFileError, UserError, one_line

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".json", ".ndjson")
_ROWS = {".parquet": parquet_table, ".arrow": ipc_table, ".feather": ipc_table}
_COMPRESSED = (".gz", ".bz2", ".xz")
_DAMAGED = (  # errors that the readers of these formats raise for a damaged file
    *(OSError, EOFError, UnicodeError, OverflowError, csv.Error, pa.ArrowException),
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile, ElementTree.ParseError),
)
FORMATS = (*_SEPARATORS, *_JSON, *_ROWS, ".xlsx")  # formats of tables


def format_of(path: Path) -> str:
    """Returns the suffix of a file's format, such as ".csv" for "a.csv.gz"; "" if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        if not suffixes or suffixes[-1] not in (*_SEPARATORS, *_JSON, ".txt"):
            return ""
    return suffixes[-1] if suffixes and suffixes[-1] in (*FORMATS, ".txt") else ""


def last_position(path: Path) -> int | None:
    """Returns the largest `Record.position` of a file, or None if it is unknown before reading."""
    kind = format_of(path)
    if kind == ".parquet":
        return parquet_rows(path)
    return None if kind in (".arrow", ".feather", ".xlsx") else path.stat().st_size


def read_records(path: Path, columns: Columns) -> Generator[Record]:
    """Yields the records of a file in order.

    The file may be CSV, TSV, JSON (one object per line, an array, or an object of columns) or .txt,
    all of them optionally compressed (.gz, .bz2, .xz); or Parquet, Arrow or Excel. A .txt file has
    one text per line and no labels. With a label column, `path` may also be a folder of
    <label>/<name>.txt files, whose columns are "text" and "label".

    Text columns must hold text. Labels are the texts in the file; numbers, booleans and dates in
    JSON, Parquet and Excel are converted with str. An empty field in a CSV is a missing value.

    Raises UserError if the file is missing, cannot be read or has an unknown format, or if a column
    is unknown, occurs twice, or has a type that cannot be read.
    """
    with open_table(path, columns) as table:
        yield from table.records(columns)


def column_names(path: Path, text_columns: str = "") -> tuple[str, ...]:
    """Returns the names of a file's columns.

    `text_columns`, a list of column names, helps to find the separator of a CSV. Raises UserError
    as `read_records` does.
    """
    with open_table(path, Columns((text_columns,) if text_columns else ())) as table:
        return tuple(table.names)


def check_files(paths: Iterable[Path], columns: Columns) -> None:
    """Raises UserError as `read_records` does, for errors up to the first record of each file."""
    for path in paths:
        with contextlib.closing(read_records(path, columns)) as records:
            next(records, None)


@contextlib.contextmanager
def open_table(path: Path, columns: Columns) -> Iterator[Table]:
    """Opens a file of any format as a table, of which `columns` will be read.

    Raises UserError as `read_records` does, including for errors while the records are read.
    """
    kind = format_of(path)
    try:
        with contextlib.ExitStack() as stack:
            if path.is_dir() and columns.label is not None:
                yield folder_table(path)
                return
            if path.is_symlink() and not path.exists():
                raise AbsentFileError(f"{str(path)!r} is a link to a file that does not exist")
            if not path.exists():
                raise AbsentFileError(f"{str(path)!r} does not exist")
            if not kind or (kind == ".txt" and columns.label is not None):
                supported = ", ".join((*FORMATS, *(() if columns.label else (".txt",))))
                raise UserError(f"{str(path)!r} must end in one of {supported} (text also in .gz)")
            if kind in _ROWS:
                yield stack.enter_context(_ROWS[kind](path))
            elif kind == ".xlsx":
                yield stack.enter_context(excel_table(path))
            else:
                yield _text_table(stack.enter_context(open_text(path)), kind, columns)
    except ColumnError as error:
        raise UserError(f"{str(path)!r}: {error}") from error
    except _DAMAGED as error:
        raise UserError(f"could not read {str(path)!r}: {one_line(error)}") from error


def _text_table(file: TextFile, kind: str, columns: Columns) -> Table:
    if kind == ".txt":
        return lines_table(file)
    if kind in _JSON:
        return json_table(file)
    return csv_table(file, _SEPARATORS[kind], columns.names)
