"""The table of the formats of input files, by suffix."""

import contextlib
import csv
import dataclasses
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa

from sweet_jax.data.arrow_tables import ipc_table, parquet_rows, parquet_table
from sweet_jax.data.csv_rows import csv_table
from sweet_jax.data.json_objects import json_table
from sweet_jax.data.spreadsheets import excel_table
from sweet_jax.data.tables import Columns, Table
from sweet_jax.data.text_files import TextFile, lines_table, open_text
from sweet_jax.registry import Registry

COMPRESSED = (".gz", ".bz2", ".xz")  # suffixes that `open_text` decompresses


@dataclasses.dataclass(frozen=True)
class Reader:
    """Describes how files of one format are read.

    Attributes:
      open: function of a path and the columns that will be read, a context manager of a `Table`.
      errors: exceptions, in addition to OSError, EOFError, UnicodeError and OverflowError, that
        mean that the file is damaged, both when it is opened and while records are read.
      counts_bytes: whether `Record.position` is a number of bytes, so that the last one is the size
        of the file.
      count_rows: function that returns the last position of a file, if that is not its size and
        can be known before the file is read.
      has_columns: whether the file is a table with named columns, which may have labels.
      compressed: whether the file may also be compressed, with one of COMPRESSED as a second
        suffix; `open_text` decompresses it.

    """

    open: Callable[[Path, Columns], AbstractContextManager[Table]]
    errors: tuple[type[Exception], ...] = ()
    counts_bytes: bool = False
    count_rows: Callable[[Path], int] | None = None
    has_columns: bool = True
    compressed: bool = False


def _text_reader(
    make_table: Callable[[TextFile, Columns], Table], *, has_columns: bool = True
) -> Reader:
    """Returns the reader of a text format, from a function of the opened file."""

    @contextlib.contextmanager
    def open_table(path: Path, columns: Columns) -> Iterator[Table]:
        with open_text(path) as file:
            yield make_table(file, columns)

    errors = (csv.Error, zlib.error, lzma.LZMAError)
    return Reader(open_table, errors, counts_bytes=True, has_columns=has_columns, compressed=True)


_JSON = _text_reader(lambda file, columns: json_table(file))
_IPC = Reader(lambda path, columns: ipc_table(path), (pa.ArrowException,))

READERS = Registry(
    "format",
    Reader,
    {
        ".csv": _text_reader(lambda file, columns: csv_table(file, ",", columns.names)),
        ".tsv": _text_reader(lambda file, columns: csv_table(file, "\t", columns.names)),
        ".jsonl": _JSON,
        ".json": _JSON,
        ".ndjson": _JSON,
        ".parquet": Reader(
            lambda path, columns: parquet_table(path),
            (pa.ArrowException,),
            count_rows=parquet_rows,
        ),
        ".arrow": _IPC,
        ".feather": _IPC,
        ".xlsx": Reader(
            lambda path, columns: excel_table(path),
            (zipfile.BadZipFile, zlib.error, ElementTree.ParseError),
        ),
        ".txt": _text_reader(lambda file, columns: lines_table(file), has_columns=False),
    },
    "sweet_jax.readers",
)
