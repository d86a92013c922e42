"""Tables of predictions, in CSV and Parquet, made from a finished JSONL file."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from sweet_jax.objectives.label_column import SEPARATOR

_AT_ONCE = 10_000  # number of rows of a Parquet file that are held in memory
_TYPES = {  # types of the columns of a prediction; `_schema` adapts them to other kinds of label
    "label": pa.string(),
    "probability": pa.float64(),
    "exit": pa.int64(),
    "cost": pa.float64(),
    "error": pa.string(),
}


def write_csv(rows: Path, table: Path) -> None:
    """Writes the rows of a JSONL file as CSV; missing values are empty."""
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _schema(rows).names)
        writer.writeheader()
        for row in _read(rows):
            if isinstance(row.get("label"), list):
                row["label"] = SEPARATOR.join(row["label"])
            writer.writerow(row)


def write_parquet(rows: Path, table: Path) -> None:
    """Writes the rows of a JSONL file as Parquet; missing values are null."""
    schema = _schema(rows)
    text = [field.name for field in schema if pa.types.is_string(field.type)]
    records = _read(rows)
    with pa.parquet.ParquetWriter(table, schema) as writer:
        while batch := list(itertools.islice(records, _AT_ONCE)):
            for row in batch:
                row |= {name: _as_text(row[name]) for name in text if name in row}
            writer.write_table(pa.Table.from_pylist(batch, schema))


TABLE_WRITERS: dict[str, Callable[[Path, Path], None]] = {
    ".csv": write_csv,
    ".parquet": write_parquet,
}


def _read(rows: Path) -> Iterator[dict[str, Any]]:
    with rows.open("rb") as file:
        yield from map(json.loads, file)


def _schema(rows: Path) -> pa.Schema:
    """Returns the columns of the rows: those of a prediction, then those kept from the input."""
    kinds: dict[str, set[type]] = {name: set() for name in _TYPES}
    for row in _read(rows):
        for name, value in row.items():
            # A float64 column cannot hold integers of more than 53 bits exactly.
            large = type(value) is int and abs(value) >= 1 << 53
            kinds.setdefault(name, set()).add(str if large else type(value))
    types = dict(_TYPES)
    if list in kinds["label"]:  # multi-label
        types["label"] = pa.list_(pa.string())
    elif float in kinds["label"]:  # regression, which has no probabilities
        types["label"] = pa.float64()
        del types["probability"], kinds["probability"]
    return pa.schema({name: types.get(name) or _type(seen) for name, seen in kinds.items()})


def _type(kinds: set[type]) -> pa.DataType:
    kinds = kinds - {type(None)}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
