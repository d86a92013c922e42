"""Tables from Parquet and Arrow files."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from sweet_jax.data.tables import ColumnError, Columns, Record, Table, find_column, make_record

_BATCH = 1024  # number of rows of a Parquet file that are in memory at once


@contextlib.contextmanager
def parquet_table(path: Path) -> Iterator[Table]:
    """Opens a Parquet file as a table."""
    with pa.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow

        def records(columns: Columns) -> Iterator[Record]:
            check_schema(schema, columns)
            names = [schema.names[find_column(name, schema.names)] for name in columns.names]
            batches = file.iter_batches(_BATCH, columns=list(dict.fromkeys(names)))
            return arrow_records(batches, columns)

        yield Table(schema.names, records, schema)


def parquet_rows(path: Path) -> int:
    """Returns the number of rows in a Parquet file."""
    return pa.parquet.ParquetFile(path).metadata.num_rows


@contextlib.contextmanager
def ipc_table(path: Path) -> Iterator[Table]:
    """Opens an Arrow IPC file or stream as a table; `datasets` saves streams."""
    with pa.memory_map(str(path)) as source:
        batches: Iterable[pa.RecordBatch]
        try:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:  # it is a stream
            source.seek(0)
            batches = reader = pa.ipc.open_stream(source)

        def records(columns: Columns) -> Iterator[Record]:
            check_schema(reader.schema, columns)
            return arrow_records(batches, columns)

        yield Table(reader.schema.names, records, reader.schema)


def check_schema(schema: pa.Schema, columns: Columns) -> None:
    """Raises ColumnError unless a table has each column once, with a type that can be read."""
    for name in columns.kept:
        find_column(name, schema.names)
    for name in columns.checked:
        kind = schema.field(find_column(name, schema.names)).type
        if name == columns.label:
            tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
            lists = any(test(kind) for test in tests)
            if pa.types.is_nested(kind) and not (columns.several_labels and lists):
                more = "; lists of labels require --config.objective=multi_label" if lists else ""
                raise ColumnError(
                    f"column {name!r} holds values of type {kind}, not single values{more}"
                )
        elif not is_text(kind):
            raise ColumnError(f"column {name!r} holds values of type {kind}, not text")


def arrow_records(batches: Iterable[pa.RecordBatch], columns: Columns) -> Iterator[Record]:
    """Yields the records of Arrow batches whose schema passed `check_schema`."""
    row = 0
    for batch in batches:
        indices = [find_column(name, batch.schema.names) for name in columns.names]
        count = len(columns.checked)
        by_column: list[list[Any]] = [_values(batch.column(index)) for index in indices[:count]]
        by_column += [batch.column(index).to_pylist() for index in indices[count:]]
        for values in zip(*by_column, strict=True):
            row += 1
            yield make_record(values, columns, row, row)


def is_text(kind: pa.DataType) -> bool:
    """Returns whether a type can hold text: strings, bytes, or dictionaries of these."""
    if pa.types.is_dictionary(kind):  # a categorical column of pandas
        kind = kind.value_type
    return any(
        test(kind)
        for test in (
            *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
            *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
            *(pa.types.is_fixed_size_binary, pa.types.is_null),
        )
    )


def _values(column: pa.Array) -> list[Any]:
    """Returns the values of a column as text, lists unchanged, and None for null and NaN."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # `make_record` reports the row
        values = column.cast(pa.large_binary()).to_pylist()
    if is_text(column.type):
        return [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values]
    if pa.types.is_nested(column.type):  # lists of labels, which `read_labels` joins
        return values
    return [None if v is None or v != v else str(v) for v in values]
