"""Records of files of every format: the one reader for training and for prediction.

Records are streamed: memory does not grow with the file. Nothing is unpickled or executed.
"""

import dataclasses
import io
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet

from sweet_jax.config import UserError, check_choice
from sweet_jax.data.csv_rows import read_rows
from sweet_jax.data.json_objects import LabelTexts, check_keys, read_objects
from sweet_jax.files import one_line

_TABLES = (".csv", ".tsv", ".jsonl", ".json", ".ndjson", ".parquet")
_BATCH = 1024  # rows of a Parquet file that are held at once


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """Holds the wanted values of one row of a file, or its error."""

    values: tuple[str | None, ...]  # of the wanted columns, None if missing; () for an error
    error: str | None
    position: int  # bytes of the file read so far; of Parquet, rows; of a folder, files
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


def last_position(path: Path) -> int:
    """Returns the largest `Record.position`: a file's size in bytes; of Parquet, its rows."""
    if path.suffix.lower() == ".parquet":
        return pa.parquet.ParquetFile(path).metadata.num_rows
    return path.stat().st_size


def read_records(path: Path, columns: Columns) -> Generator[Record]:
    """Yields the records of a CSV, TSV, JSON lines or Parquet file in order.

    Without a label column also those of a .txt file, one text in a line; with one also those of a
    folder of <label>/<name>.txt files, whose columns are "text" and "label".

    Text columns must hold text. A label is the text that stands in the file; numbers, booleans and
    dates of JSON and Parquet are converted by str. An empty field of a CSV or TSV is missing.

    Raises UserError for a file that is absent, unreadable or of another format, or a column that is
    unknown, occurs twice, or is of a type that cannot be read.
    """
    suffix = path.suffix.lower()
    allowed = _TABLES if columns.label is not None else (*_TABLES, ".txt")
    try:
        if columns.label is not None and path.is_dir():
            yield from _folder_records(path, columns)
            return
        if not path.exists():
            raise UserError(f"{str(path)!r} does not exist")
        if suffix not in allowed:
            raise UserError(f"{str(path)!r} must end in one of {', '.join(allowed)}")
        if suffix == ".parquet":
            with pa.parquet.ParquetFile(path) as file:
                check_schema(file.schema_arrow, columns)
                names = list(dict.fromkeys(columns.names))
                yield from arrow_records(file.iter_batches(_BATCH, columns=names), columns)
            return
        # A byte that is not UTF-8 becomes a lone surrogate, which `_record` reports.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            if suffix == ".txt":
                yield from _line_records(text, columns)
            elif suffix in (".csv", ".tsv"):
                yield from _csv_records(text, path, columns)
            else:
                yield from _json_records(text, path, columns)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"could not read {str(path)!r}: {one_line(error)}") from error


def check_schema(schema: pa.Schema, columns: Columns) -> None:
    """Raises UserError unless a table has each column once, and of a type that can be read."""
    for name in columns.names:
        _check_column(name, schema.names)
        kind = schema.field(name).type
        if name == columns.label:
            if pa.types.is_nested(kind):
                raise UserError(f"column {name!r} holds values of type {kind}, not single ones")
        elif not _is_text(kind):
            raise UserError(f"column {name!r} holds values of type {kind}, not text")


def arrow_records(batches: Iterable[pa.RecordBatch], columns: Columns) -> Iterator[Record]:
    """Yields the records of Arrow batches whose schema passed `check_schema`."""
    row = 0
    for batch in batches:
        found = [_arrow_values(batch[name]) for name in columns.names]
        for values in zip(*found, strict=True):
            row += 1
            yield _record(values, columns, row, row, 0)


def _check_column(name: str, present: Sequence[str]) -> None:
    check_choice("column", name, present)
    if present.count(name) > 1:
        raise UserError(f"column {name!r} occurs more than once: rename all but one")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # a categorical column of pandas
        kind = kind.value_type
    return any(
        test(kind)
        for test in (
            *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
            *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
            pa.types.is_null,
        )
    )


def _arrow_values(column: pa.Array) -> list[str | None]:
    """Returns the values of a column as text, None for null and NaN."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        found = column.to_pylist()
    except UnicodeDecodeError:  # `_record` reports in which row
        found = column.cast(pa.large_binary()).to_pylist()
    if _is_text(column.type):
        return [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in found]
    return [None if v is None or v != v else str(v) for v in found]


def _position(text: io.TextIOWrapper) -> int:
    return cast(io.BufferedReader, text.buffer).tell()  # TextIOWrapper's own is slow, or refuses


def _line_records(text: io.TextIOWrapper, columns: Columns) -> Iterator[Record]:
    if len(columns.texts) != 1:
        raise UserError("a .txt file has one text in a row, and this model takes pairs: give a CSV")
    for row, line in enumerate(text, start=1):
        yield _record((line.rstrip("\r\n"),), columns, _position(text), row, row)


def _csv_records(text: io.TextIOWrapper, path: Path, columns: Columns) -> Iterator[Record]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = read_rows(text, delimiter)
    header = next(rows, None)
    wrong = "no first line with the names of its columns" if header is None else header.error
    if header is not None and re.search("[\ud800-\udfff]", "".join(header.fields)):
        wrong = "its first line is not UTF-8; save it as UTF-8"
    if header is None or wrong:
        raise UserError(f"could not read {str(path)!r}: {wrong}")
    places = _places(header.fields, path, delimiter, columns)
    for row, (fields, error, line) in enumerate(rows, start=1):
        if error is not None:
            yield Record((), error, _position(text), row, line)
        else:
            # An empty field is a missing text; the words "NA" or "null" are texts.
            values = tuple([fields[place] or None for place in places])
            yield _record(values, columns, _position(text), row, line)


def _places(header: list[str], path: Path, delimiter: str, columns: Columns) -> list[int]:
    """Returns the indices of the columns in a header, where blanks around names do not count."""
    other = set(header[0]) & set(",;\t|") if len(header) == 1 else set()
    if other and delimiter not in other and "\n" not in header[0]:
        raise UserError(
            f"{str(path)!r} names one column, {header[0]!r:.60}: fields must be separated by "
            f"{delimiter!r} in a {path.suffix.lower()} file, not by {min(other)!r}"
        )
    stripped = [name.strip() for name in header]
    places = []
    for name in columns.names:
        names = header if name in header else stripped
        _check_column(name, names)
        places.append(names.index(name))
    return places


def _json_records(text: io.TextIOWrapper, path: Path, columns: Columns) -> Iterator[Record]:
    label_texts = LabelTexts()
    objects = check_keys(read_objects(text, str(path), lambda: _position(text)), columns.names)
    for row, (values, error, line, position) in enumerate(objects, start=1):
        found = [] if values is None else [values.get(name) for name in columns.names]
        if values is not None and columns.label is not None:
            found[-1], wrong = label_texts(found[-1])
            error = wrong and f"column {columns.label!r} {wrong}"
        if error is None:
            yield _record(tuple(found), columns, position, row, line)
        else:
            yield Record((), error, position, row, line)


def _folder_records(path: Path, columns: Columns) -> Iterator[Record]:
    for name in columns.names:
        _check_column(name, ("text", "label"))
    files = [f for f in sorted(path.glob("*/*.txt")) if not _is_hidden(f)]
    if not files:
        raise UserError(f"folder {str(path)!r} has no <label>/<name>.txt files")
    for row, file in enumerate(files, start=1):
        found = {"text": _read_text(file), "label": file.parent.name}
        if not found["text"].strip():
            blank = sum(not _read_text(other).strip() for other in files[row:])
            more = f", and {blank} more such files" if blank else ""
            raise UserError(f"{str(file)!r} is empty{more}: fill it, or remove it")
        yield _record(tuple(found[name] for name in columns.names), columns, row, row, 0)


def _is_hidden(file: Path) -> bool:
    """Returns whether an editor, a file manager or an archive left a file among the texts."""
    label = file.parent.name
    return file.name.startswith(".") or label.startswith(".") or label == "__MACOSX"


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")  # what older corpora are written in


def _record(values: tuple, columns: Columns, position: int, row: int, line: int) -> Record:
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
