"""Labelled rows of a user's files, of a directory of GLUE files or of the hub, in memory."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import datasets
import pyarrow as pa
import pyarrow.parquet

from sweet_jax.config import Config, UserError, split_names
from sweet_jax.data.records import Columns, Record, arrow_records, check_schema, read_records
from sweet_jax.data.tasks import Task
from sweet_jax.files import one_line, resolve_path


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """Holds the rows of one file or split, with labels as text."""

    texts: list[tuple[str, ...]]
    labels: list[str]
    declared: tuple[str, ...]  # class names of the labels 0, 1, ...; () if not declared


def read_sources(config: Config, task: Task) -> list[SourceRows]:
    """Returns the training rows and, if they are a source of their own, the validation rows."""
    if config.data_files and config.data_dir:
        raise UserError(
            f"data_files is {config.data_files!r} and data_dir {config.data_dir!r}: give one of "
            "the two"
        )
    if not config.data_files and not config.data_dir:
        return _read_hub(task)
    if config.data_files:
        names = split_names(config.data_files)
        if len(names) > 2:
            raise UserError(
                "data_files takes a training file and at most one validation file; got "
                f"{config.data_files!r}"
            )
        paths = [resolve_path(name) for name in names]
    else:
        folder = resolve_path(config.data_dir) / task.name
        validation = folder / f"{task.validation}.parquet"
        if not validation.exists():
            validation = folder / "validation.parquet"
        paths = [folder / "train.parquet", validation]
    found = []
    for path, place in zip(paths, source_names(len(paths)), strict=True):
        with naming_source(place):
            found.append(_read_file(path, task))
    return found


def source_names(count: int) -> tuple[str, ...]:
    """Returns what messages call each of one or two sources."""
    return ("the training file", "the validation file") if count > 1 else ("the data",)


def _read_file(path: Path, task: Task) -> SourceRows:
    columns = Columns(task.text_columns, task.label_column)
    declared: tuple[str, ...] = ()
    records = read_records(path, columns)
    first = list(itertools.islice(records, 1))  # raises before the schema is read
    if path.suffix.lower() == ".parquet" and not path.is_dir():
        declared = _declared(pa.parquet.read_schema(path), task.label_column)
    return _collect(itertools.chain(first, records), columns, declared, repr(str(path)))


def _read_hub(task: Task) -> list[SourceRows]:
    try:
        loaded = datasets.load_dataset("nyu-mll/glue", task.name)
    except Exception as error:  # the hub client raises many kinds; each means the same to a user
        raise UserError(
            f"could not read task {task.name!r} (nyu-mll/glue) from the hub: {one_line(error)}; "
            "check the network, or give a local copy with --config.data_dir"
        ) from error
    columns, found = Columns(task.text_columns, task.label_column), []
    for name in ("train", task.validation):
        split = loaded[name]
        schema = split.features.arrow_schema
        check_schema(schema, columns)
        records = arrow_records(split.with_format("arrow")[:].to_batches(), columns)
        declared = _declared(schema, task.label_column)
        found.append(_collect(records, columns, declared, f"{task.name!r} of the hub"))
    return found


def _declared(schema: pa.Schema, name: str) -> tuple[str, ...]:
    """Returns the class names that a schema declares for a column, or ()."""
    feature = datasets.Features.from_arrow_schema(
        pa.schema([schema.field(name)], metadata=schema.metadata)
    )[name]
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def _collect(
    records: Iterable[Record], columns: Columns, declared: tuple[str, ...], source: str
) -> SourceRows:
    """Returns the rows of a source. Raises UserError for a record with an error or a missing value.

    Blank text counts as missing, except in pairs: some of GLUE's QQP have one blank text.
    """
    values = []
    for record in records:
        if record.error is not None:
            line = f" (line {record.line})" if record.line else ""
            raise UserError(f"could not read {source}: row {record.row}{line}: {record.error}")
        values.append(record.values)
    for place, name in enumerate(columns.names):
        may_be_blank = len(columns.texts) > 1 and name != columns.label
        empty = [
            row
            for row, found in enumerate(values, start=1)
            if (text := found[place]) is None or not (may_be_blank or text.strip())
        ]
        if empty:
            more = f", and in {len(empty) - 1} more" if len(empty) > 1 else ""
            raise UserError(
                f"column {name!r} is empty in row {empty[0]}, the header not counted{more}: fill "
                "it, or remove such rows"
            )
    rows = cast(list[tuple[str, ...]], values)
    labels = [row[-1] for row in rows]
    if declared:
        numbers = {str(number): name for number, name in enumerate(declared)}
        labels = [numbers.get(label, label) for label in labels]
    return SourceRows([row[:-1] for row in rows], labels, declared)


@contextlib.contextmanager
def naming_source(place: str) -> Iterator[None]:
    """Prefixes the message of a UserError with the name of a source."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
