"""Records from files of all formats, read in the same way for training and for prediction.

Records are streamed: memory does not grow with the size of the file, except for spreadsheets and
for JSON files that are one object. Nothing is unpickled or executed.
"""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from sweet_jax.data.label_folders import folder_table
from sweet_jax.data.labels import read_labels
from sweet_jax.data.readers import COMPRESSED, READERS
from sweet_jax.data.tables import ColumnError, Columns, Record, Table
from sweet_jax.errors import AbsentFileError, UserError, one_line

_DAMAGED = (OSError, EOFError, UnicodeError, OverflowError)  # for a damaged file of any format


def format_of(path: Path) -> str:
    """Returns the suffix of a file's format, such as ".csv" for "a.csv.gz"; "" if unknown.

    Raises UserError if the format is of another package that cannot be imported.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    if compressed:
        suffixes.pop()
    if not suffixes:
        return ""
    reader = READERS.get(suffixes[-1])
    return "" if reader is None or (compressed and not reader.compressed) else suffixes[-1]


def is_table(path: Path) -> bool:
    """Returns whether the format of a file is known and has columns."""
    kind = format_of(path)
    return bool(kind) and READERS[kind].has_columns


def last_position(path: Path) -> int | None:
    """Returns the largest `Record.position` of a file, or None if it is unknown before reading."""
    reader = READERS.get(format_of(path))
    if reader is None or reader.counts_bytes:
        return path.stat().st_size
    return None if reader.count_rows is None else reader.count_rows(path)


def read_records(path: Path, columns: Columns) -> Generator[Record]:
    """Yields the records of a file in order.

    The file may be CSV, TSV, JSON (one object per line, an array, or an object of columns) or .txt,
    all of them optionally compressed (.gz, .bz2, .xz); or Parquet, Arrow or Excel. A .txt file has
    one text per line and no labels. With a label column, `path` may also be a folder of
    <label>/<name>.txt files, whose columns are "text" and "label".

    Text columns must hold text. Labels are the texts in the file, see `read_labels`; dates in
    Parquet and Excel are converted with str too. An empty field in a CSV is a missing value.

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
    reader = READERS.get(kind)
    damaged: tuple[type[Exception], ...] = (*_DAMAGED, *(reader.errors if reader else ()))
    try:
        if path.is_dir() and columns.label is not None:
            yield _labeled(folder_table(path))
            return
        if path.is_symlink() and not path.exists():
            raise AbsentFileError(f"{str(path)!r} is a link to a file that does not exist")
        if not path.exists():
            raise AbsentFileError(f"{str(path)!r} does not exist")
        if reader is None or not (reader.has_columns or columns.label is None):
            known = (suffix for suffix, each in READERS.items() if each.has_columns)
            supported = ", ".join((*known, *(() if columns.label else (".txt",))))
            raise UserError(f"{str(path)!r} must end in one of {supported} (text also in .gz)")
        with reader.open(path, columns) as table:
            yield _labeled(table)
    except ColumnError as error:
        raise UserError(f"{str(path)!r}: {error}") from error
    except UserError:  # which is a ValueError, as a reader's errors may be
        raise
    except damaged as error:
        raise UserError(f"could not read {str(path)!r}: {one_line(error)}") from error


def _labeled(table: Table) -> Table:
    """Returns a table whose records have their labels as text."""
    return table._replace(records=lambda columns: read_labels(table.records(columns), columns))
