"""Texts of a file one after the other, however large it is; a row that is none says why."""

import csv
import io
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet

from sweet_jax.config import UserError, check_choice
from sweet_jax.data.read import looks_like_several_rows, one_line

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt")

_LONGEST = 1 << 24  # characters of a field: a stray quote must not swallow the rest of a file


class TextRow(NamedTuple):
    """One row of a file."""

    texts: tuple[str, ...]  # one, or two for pairs; () where there is an error
    error: str | None
    position: int  # bytes of the file read so far; of Parquet, rows


def last_position(path: Path) -> int:
    """The last position there can be: the size of a file in bytes; of Parquet, its rows."""
    if path.suffix.lower() == ".parquet":
        return pa.parquet.ParquetFile(path).metadata.num_rows
    return path.stat().st_size


def stream_texts(path: Path, columns: Sequence[str]) -> Generator[TextRow]:
    """The rows of a CSV, TSV, JSONL, Parquet or text file (a text in each line), in order.

    A row whose text is absent, empty in a CSV, or no text gives an error and the rest goes on.

    Args:
      path: of the file.
      columns: names of the text columns, one or two. A .txt file has one, without a name.

    Raises UserError for a file that is absent or no such file, or has no such column.

    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(f"input {str(path)!r} must end in one of {', '.join(_SUFFIXES)}")
    try:
        if suffix == ".parquet":
            yield from _parquet(path, columns)
            return
        with path.open("rb") as raw:
            # A byte that is no UTF-8 becomes half of a surrogate pair, which `_checked` finds.
            text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
            with text:
                readers: dict[str, Callable] = {".txt": _lines, ".csv": _csv, ".tsv": _csv}
                yield from readers.get(suffix, _jsonl)(text, columns, suffix)
    except FileNotFoundError as error:
        raise UserError(f"input {str(path)!r} does not exist") from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"could not read {str(path)!r}: {one_line(error)}") from error


def _position(text: io.TextIOWrapper) -> int:
    return cast(io.BufferedReader, text.buffer).tell()  # TextIOWrapper's own is slow, or refuses


def _lines(text: io.TextIOWrapper, columns: Sequence[str], _: str) -> Iterator[TextRow]:
    if len(columns) != 1:
        raise UserError("a .txt file has one text in a row, and this model takes pairs: give a CSV")
    for line in text:
        yield _checked([line.rstrip("\r\n")], columns, _position(text))


def _csv(text: io.TextIOWrapper, columns: Sequence[str], suffix: str) -> Iterator[TextRow]:
    csv.field_size_limit(_LONGEST)
    rows = csv.reader(text, delimiter="\t" if suffix == ".tsv" else ",")
    header = next(rows, [])
    if not header:
        raise UserError("the input has no first line with the names of its columns")
    places = [_place(name, header) for name in columns]
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield TextRow((), f"not a row of CSV: {error}", _position(text))
            continue
        if not row:
            continue  # an empty line
        if len(row) != len(header):
            found = f"{len(row)} fields where the header has {len(header)}"
            yield TextRow((), found, _position(text))
            continue
        if suffix == ".tsv" and any(looks_like_several_rows(row[place]) for place in places):
            found = "looks like several rows: it begins with a quote that is not closed in its line"
            yield TextRow((), found, _position(text))
            continue
        yield _checked([row[place] or None for place in places], columns, _position(text))


def _place(name: str, header: Sequence[str]) -> int:
    check_choice("column", name, header)
    return header.index(name)


def _jsonl(text: io.TextIOWrapper, columns: Sequence[str], _: str) -> Iterator[TextRow]:
    known = False  # whether a row had the columns
    for line in text:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield TextRow((), f"not JSON: {one_line(error)}", _position(text))
            continue
        if not isinstance(row, dict):
            yield TextRow((), f"not an object but {line.strip()!a:.40}", _position(text))
            continue
        if not known:
            for name in columns:
                check_choice("column", name, list(row))
            known = True
        yield _checked([row.get(name) for name in columns], columns, _position(text))


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[TextRow]:
    with pa.parquet.ParquetFile(path) as file:
        for name in columns:
            check_choice("column", name, file.schema_arrow.names)
        position = 0
        for batch in file.iter_batches(1024, columns=list(dict.fromkeys(columns))):
            values = [_values(batch[name]) for name in columns]
            for texts in zip(*values, strict=True):
                position += 1
                yield _checked(texts, columns, position)


def _values(column: pa.Array) -> list:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # By way of bytes: what is no UTF-8 must not end the reading.
        found = column.cast(pa.large_binary()).to_pylist()
        return [None if v is None else v.decode("utf-8", "surrogateescape") for v in found]
    return column.to_pylist()


def _checked(texts: Sequence, columns: Sequence[str], position: int) -> TextRow:
    for text, name in zip(texts, columns, strict=True):
        if text is None:
            return TextRow((), f"column {name!r} is empty", position)
        if not isinstance(text, str):
            return TextRow((), f"column {name!r} is not text but {text!a:.40}", position)
        try:
            text.encode()
        except UnicodeEncodeError:
            return TextRow((), f"column {name!r} is not UTF-8", position)
    return TextRow(tuple(texts), None, position)
