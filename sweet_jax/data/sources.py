"""Labeled rows from a user's files, from a directory of GLUE files, or from a data set."""

import array
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa

from sweet_jax.config import Config
from sweet_jax.data.arrow_tables import arrow_records, check_schema
from sweet_jax.data.column_names import choose_columns, parse_names
from sweet_jax.data.data_set import DataSplit, read_data_set
from sweet_jax.data.file_lists import expand_files, split_files
from sweet_jax.data.labels import read_labels
from sweet_jax.data.records import open_table
from sweet_jax.data.tables import Columns, Record, find_column, missing_column
from sweet_jax.data.tasks import Task
from sweet_jax.errors import UserError
from sweet_jax.objectives import OBJECTIVES
from sweet_jax.objectives.label_checks import without_fraction
from sweet_jax.objectives.label_column import SEPARATOR, split_labels
from sweet_jax.paths import resolve_path

log = logging.getLogger(__name__)

_LISTED = 3  # maximum number of invalid rows that a warning names


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """Holds the rows of one split, with labels as text."""

    texts: list[tuple[str, ...]]
    labels: list[str]
    declared: tuple[str, ...]  # declared class names of the labels 0, 1, ...; () if there are none
    places: tuple[tuple[str, Sequence[int]], ...]  # name of each file, numbers of its rows

    def place(self, index: int) -> str:
        """Returns where a row is, for example "row 3 of 'rows.csv'"."""
        for name, numbers in self.places:
            if index < len(numbers):
                return f"row {numbers[index]} of {name}"
            index -= len(numbers)
        raise IndexError(index)


def read_sources(config: Config, task: Task) -> tuple[Task, list[SourceRows]]:
    """Reads the training rows and, if they have a separate source, the validation rows.

    Returns the task, including columns that the config does not name, and one or two sources.
    Raises UserError for invalid rows, unless the config has `skip_invalid`.
    """
    options = {key: getattr(config, key) for key in ("data_files", "data_dir", "dataset")}
    options = {key: value for key, value in options.items() if value}
    if len(options) > 1:
        named = " and ".join(f"{key} is {value!r}" for key, value in options.items())
        raise UserError(f"{named}: set only one of them")
    if config.data_files:
        patterns = split_files(config.data_files)
        if not 1 <= len(patterns) <= 2:
            raise UserError(
                "data_files takes a source of training rows and at most one source of validation "
                f'rows (join several files of a source with "+"); got {config.data_files!r}'
            )
        splits = [expand_files(pattern) for pattern in patterns]
    elif config.data_dir:
        folder = resolve_path(config.data_dir) / task.name
        validation = folder / f"{task.validation}.parquet"
        if not validation.exists():
            validation = folder / "validation.parquet"
        splits = [[folder / "train.parquet"], [validation]]
    else:
        return _from_data_set(config, task)
    task = _with_columns(config, task, splits[0][0])
    sources = []
    for paths, name in zip(splits, source_names(len(splits)), strict=True):
        with naming_source(name):
            file_rows = [_read_file(path, task, config.skip_invalid) for path in paths]
            sources.append(_join(file_rows))
    return task, sources


def read_unlabeled(config: Config, task: Task) -> list[tuple[str, ...]]:
    """Reads the task's text columns of `unlabeled_files`, which need no labels.

    Raises UserError for invalid rows, unless the config has `skip_invalid`.
    """
    columns, texts = Columns(task.text_columns), []
    with naming_source("unlabeled_files"):
        for path in expand_files(config.unlabeled_files):
            with open_table(path, columns) as table:
                records = table.records(columns)
                texts += _collect(records, columns, repr(str(path)), config.skip_invalid)[0]
    return texts


def source_names(count: int) -> tuple[str, ...]:
    """Returns the names of one or two sources in messages."""
    return ("the training file", "the validation file") if count > 1 else ("the data",)


def _with_columns(config: Config, task: Task, path: Path) -> Task:
    """Returns the task with the text columns, found in its first file if not named."""
    names: Sequence[str] = ()
    if not task.text_columns or "," in config.text_columns:
        with open_table(path, Columns((), task.label_column)) as table:
            names = table.names
            if not names:  # the first row may have an error that explains this
                for record in itertools.islice(table.records(Columns(())), 1):
                    if record.error is not None:
                        raise UserError(
                            f"could not read {str(path)!r}: {_location(record)}: {record.error}"
                        )
    texts = parse_names(config.text_columns, names) or task.text_columns
    return choose_columns(dataclasses.replace(task, text_columns=texts), names)


def _read_file(path: Path, task: Task, skip_invalid: bool) -> SourceRows:
    columns = label_columns(task)
    with open_table(path, columns) as table:
        records = table.records(columns)
        rows, numbers = _collect(records, columns, repr(str(path)), skip_invalid)
        declared = () if table.schema is None else _declared(table.schema, task.label_column)
    return _with_labels(rows, declared, columns.several_labels, (repr(str(path)), numbers))


def _from_data_set(config: Config, task: Task) -> tuple[Task, list[SourceRows]]:
    splits = read_data_set(config, task)
    task = choose_columns(task, splits[0].names, splits[0].class_columns)
    columns = label_columns(task)
    return task, [_read_split(split, columns, config.skip_invalid) for split in splits]


def _read_split(split: DataSplit, columns: Columns, skip_invalid: bool) -> SourceRows:
    check_schema(split.schema, columns)
    records = read_labels(arrow_records(split.batches(), columns), columns)
    rows, numbers = _collect(records, columns, split.title, skip_invalid)
    assert columns.label is not None
    declared = _declared(split.schema, columns.label)
    return _with_labels(rows, declared, columns.several_labels, (split.title, numbers))


def _declared(schema: pa.Schema, name: str) -> tuple[str, ...]:
    """Returns the class names that a schema declares for a column, or ()."""
    field = schema.field(find_column(name, schema.names))
    try:
        described = pa.schema([field], metadata=schema.metadata)
        feature = datasets.Features.from_arrow_schema(described)[field.name]
    except (KeyError, TypeError, ValueError):  # metadata that another program wrote
        return ()
    feature = getattr(feature, "feature", feature)  # the feature of a list's elements
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def label_columns(task: Task) -> Columns:
    """Returns the columns with a task's texts and label."""
    several = OBJECTIVES[task.objective].column.several
    return Columns(task.text_columns, task.label_column, several_labels=several)


def _with_labels(
    rows: list[tuple[str, ...]],
    declared: tuple[str, ...],
    several: bool,
    place: tuple[str, Sequence[int]],
) -> SourceRows:
    labels = [row[-1] for row in rows]
    if declared:
        numbers = {str(number): name for number, name in enumerate(declared)}

        def named(label: str) -> str:
            if several:
                return SEPARATOR.join(numbers.get(part, part) for part in split_labels(label))
            return numbers.get(label, label)

        labels = [named(label) for label in labels]
    return SourceRows([row[:-1] for row in rows], labels, declared, (place,))


def _join(files: Sequence[SourceRows]) -> SourceRows:
    """Joins the files of one split; class names are declared only if all files declare the same."""
    declared = {file.declared for file in files}
    # 1 in one file and 1.0 in another are the same label, written as in the first file.
    first = {without_fraction(label): label for label in dict.fromkeys(files[0].labels)}
    first_labels = set(files[0].labels)
    labels = files[0].labels + [
        label if label in first_labels else first.get(without_fraction(label), label)
        for file in files[1:]
        for label in file.labels
    ]
    return SourceRows(
        [text for file in files for text in file.texts],
        labels,
        declared.pop() if len(declared) == 1 else (),
        tuple(place for file in files for place in file.places),
    )


def _location(record: Record) -> str:
    """Returns, for example, "row 3 (line 4)"; formats without lines have only rows."""
    return f"row {record.row}" + (f" (line {record.line})" if record.line else "")


def _collect(
    records: Iterable[Record], columns: Columns, source: str, skip_invalid: bool
) -> tuple[list[tuple[str, ...]], array.array]:
    """Returns the values and row numbers of the records without an error or a missing value.

    Raises UserError for invalid records unless `skip_invalid` is set.
    """
    rows: list[tuple[str, ...]] = []
    numbers = array.array("q")
    invalid: list[tuple[str, str, bool]] = []  # location, what is wrong, whether a value is missing
    for record in records:
        missing = missing_column(record.values, columns)
        if record.error is not None:
            invalid.append((_location(record), record.error, False))
        elif missing is not None:
            invalid.append((_location(record), f"column {missing!r} is empty", True))
        else:
            rows.append(tuple(value or "" for value in record.values))
            numbers.append(record.row)
    if invalid and not skip_invalid:
        # The first row that cannot be read, or else the first one with a missing value.
        location, wrong, is_missing = min(invalid, key=lambda each: each[2])
        others = len(invalid) - 1
        if not is_missing:  # an error may say itself how to correct it
            more = f"{others} more invalid rows; " if others else ""
            raise UserError(
                f"could not read {source}: {location}: {wrong} "
                f"({more}--config.skip_invalid=True skips such rows)"
            )
        more = f", and {others} more invalid rows" if others else ""
        raise UserError(
            f"{wrong} in {location} of {source}{more}: fill it, remove "
            "such rows, or skip them with --config.skip_invalid=True"
        )
    if invalid:
        listed = "; ".join(f"{location}: {wrong}" for location, wrong, _ in invalid[:_LISTED])
        log.warning("skipped %d invalid rows of %s: %s …", len(invalid), source, listed)
    return rows, numbers


@contextlib.contextmanager
def naming_source(name: str) -> Iterator[None]:
    """Prefixes the message of a UserError with the name of a source."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{name}: {error}") from error
