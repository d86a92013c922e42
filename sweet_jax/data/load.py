"""Labelled texts from the hub, from a directory of GLUE files, or from a user's own files.

Shape letters: N examples.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import pyarrow as pa

from sweet_jax.config import Config, UserError, check_choice, split_names
from sweet_jax.data.read import one_line, read_table, resolve_path
from sweet_jax.data.tasks import GLUE, Task


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of one split, in file order."""

    texts: list[tuple[str, ...]]  # N tuples of one text, or of two for pairs
    labels: np.ndarray  # int32 [N], indices into Dataset.classes


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A task's training and validation rows under one list of class names."""

    task: Task
    classes: tuple[str, ...]
    train: Split
    validation: Split
    left_out: int = 0  # training rows that repeat a text of the validation rows split off

    def digest(self) -> str:
        """SHA-256 over every text and label: whether two runs read the same data."""
        sha = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (self.train, self.validation):
            sha.update(json.dumps(split.texts).encode())
            sha.update(split.labels.tobytes())
        return sha.hexdigest()


def load_dataset(config: Config) -> Dataset:
    """Reads the data a config names.

    Raises:
      UserError: unknown task or column, a file that is absent, of another format or unreadable, a
        row without text or label, no rows, one class only, or a validation label that training
        rows never have.

    """
    task = task_of(config)
    if config.data_files and config.data_dir:
        raise UserError(
            f"data_files is {config.data_files!r} and data_dir {config.data_dir!r}: give one of "
            "the two"
        )
    if config.data_files:
        tables = _from_files(config.data_files, task)
    elif config.data_dir:
        tables = _from_directory(config.data_dir, task)
    else:
        tables = _from_hub(task)
    places = ("the training file", "the validation file") if len(tables) > 1 else ("the data",)
    for table, place in zip(tables, places, strict=True):
        if not len(table):
            raise UserError(f"{place} has no rows")
    with _naming(places[0]):
        names = _class_names(tables[0], task)
    splits = []
    for table, place in zip(tables, places, strict=True):
        with _naming(place):
            splits.append(_split(table, task, names))
    if len(splits) == 1:
        splits = _split_off(splits[0], config.validation_fraction, config.split_seed)
    train, validation = splits
    _check_labels(train, validation, names, task)
    left_out = 0 if len(tables) > 1 else len(tables[0]) - len(train.labels) - len(validation.labels)
    return Dataset(task, names, train, validation, left_out)


def stratified_split(
    labels: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Splits indices 0..N-1 at random, every class in proportion (largest remainders).

    Returns (kept, held out), both ascending; round(fraction * N) indices are held out.
    """
    order = rng.permutation(len(labels))
    counts = np.bincount(labels)
    wanted = counts * fraction
    quota = np.floor(wanted).astype(int)
    missing = round(fraction * len(labels)) - quota.sum()
    quota[np.argsort(-(wanted - quota), kind="stable")[:missing]] += 1
    held = np.concatenate([order[labels[order] == c][:n] for c, n in enumerate(quota)])
    return np.setdiff1d(np.arange(len(labels)), held), np.sort(held)


def task_of(config: Config) -> Task:
    """The task that a config names, with its columns and metric.

    Raises UserError for one that there is not, or text_columns that are not one or two.
    """
    if config.data_files:
        task = GLUE.get(config.task, Task(config.task, ()))
    else:
        check_choice("task", config.task, GLUE)
        task = GLUE[config.task]
    columns = split_names(config.text_columns) or task.text_columns
    if not 1 <= len(columns) <= 2:
        raise UserError(
            f"text_columns must name one column, or two for pairs; got {config.text_columns!r}"
        )
    metric = config.metric or task.metric
    return dataclasses.replace(
        task, text_columns=columns, label_column=config.label_column, metric=metric
    )


def _from_files(data_files: str, task: Task) -> list[pa.Table]:
    names = split_names(data_files)
    if len(names) > 2:
        raise UserError(
            f"data_files takes a training file and at most one validation file; got {data_files!r}"
        )
    return [read_table(resolve_path(name), task.text_columns, task.label_column) for name in names]


def _from_directory(data_dir: str, task: Task) -> list[pa.Table]:
    folder = resolve_path(data_dir) / task.name
    validation = folder / f"{task.validation}.parquet"
    if not validation.exists():
        validation = folder / "validation.parquet"
    return [read_table(path, task.text_columns) for path in (folder / "train.parquet", validation)]


def _from_hub(task: Task) -> list[pa.Table]:
    try:
        loaded = datasets.load_dataset("nyu-mll/glue", task.name)
    except Exception as error:  # the hub client raises many kinds; each means the same to a user
        raise UserError(
            f"could not read task {task.name!r} (nyu-mll/glue) from the hub: {one_line(error)}; "
            "check the network, or give a local copy with --config.data_dir"
        ) from error
    tables = []
    for name in ("train", task.validation):
        split = loaded[name]
        table = split.with_format("arrow")[:]
        tables.append(table.replace_schema_metadata(split.features.arrow_schema.metadata))
    return tables


def _check_column(table: pa.Table, name: str) -> None:
    check_choice("column", name, table.column_names)
    if table.column_names.count(name) > 1:
        raise UserError(f"column {name!r} occurs more than once: rename all but one")


def _column(table: pa.Table, name: str, *, may_be_blank: bool = False) -> list:
    """The values of a column. Raises UserError where one is missing, or blank if it may not be."""
    _check_column(table, name)
    values = table[name]
    if pa.types.is_nested(values.type):
        raise UserError(f"column {name!r} holds values of type {values.type}, not single ones")
    try:
        found = values.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"column {name!r} holds text that is not UTF-8: {error}") from error
    empty = values.is_null(nan_is_null=True).to_pylist()
    if not may_be_blank:
        empty = [
            e or (isinstance(v, str) and not v.strip()) for e, v in zip(empty, found, strict=True)
        ]
    if any(empty):
        raise UserError(
            f"column {name!r} is empty in row {empty.index(True) + 1}, the header not counted"
            f"{f', and in {sum(empty) - 1} more' if sum(empty) > 1 else ''}: fill it, or remove "
            "such rows"
        )
    return found


def _texts(table: pa.Table, name: str, *, may_be_blank: bool) -> list[str]:
    _check_column(table, name)
    kind = table.schema.field(name).type
    if pa.types.is_dictionary(kind):  # a categorical column of pandas
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise UserError(f"column {name!r} holds values of type {kind}, not text")
    return _column(table, name, may_be_blank=may_be_blank)


def _class_names(table: pa.Table, task: Task) -> tuple[str, ...]:
    """Names of the classes: those the file declares, else the training labels in order."""
    values = _column(table, task.label_column)
    found = {str(value) for value in values}
    numeric = all(re.fullmatch("-?[0-9]+", name) for name in found)
    in_order = sorted(found, key=lambda name: (int(name), name)) if numeric else sorted(found)
    return _declared(table, task.label_column) or tuple(in_order)


def _declared(table: pa.Table, name: str) -> tuple[str, ...]:
    """The class names that a file gives to the numbers in a column; none: ()."""
    schema = table.select([name]).schema
    feature = datasets.Features.from_arrow_schema(schema)[name]
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def _split(table: pa.Table, task: Task, names: tuple[str, ...]) -> Split:
    # Of a pair one text may be: some of GLUE's (QQP) are.
    pair = len(task.text_columns) == 2
    columns = [_texts(table, name, may_be_blank=pair) for name in task.text_columns]
    values = _column(table, task.label_column)
    index = {name: number for number, name in enumerate(names)}
    if declared := _declared(table, task.label_column):
        values = [declared[v] if 0 <= v < len(declared) else v for v in values]
    labels = [index.get(str(value), -1) for value in values]
    for row, label in enumerate(labels):
        if label < 0:
            raise UserError(
                f"label {values[row]!r} (row {row + 1}) is not among the training labels "
                f"{', '.join(map(repr, names[:10]))}: mend it, or add such training rows"
            )
    return Split(list(zip(*columns, strict=True)), np.asarray(labels, np.int32))


def _split_off(rows: Split, fraction: float, seed: int) -> list[Split]:
    """Training and validation rows by seed; rows that repeat a validation text are left out."""
    kept, held = stratified_split(rows.labels, fraction, np.random.default_rng(seed))
    texts = {rows.texts[i] for i in held}
    distinct = [i for i in kept if rows.texts[i] not in texts]
    return [select_rows(rows, distinct), select_rows(rows, held)]


def select_rows(rows: Split, indices: Sequence[int] | np.ndarray) -> Split:
    """The rows of those indices, in their order."""
    picked = np.asarray(indices, int)
    return Split([rows.texts[i] for i in picked], rows.labels[picked])


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Says of a UserError where the rows stand that are wrong."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _check_labels(train: Split, validation: Split, names: tuple[str, ...], task: Task) -> None:
    for rows, what in ((train, "training"), (validation, "validation")):
        if not len(rows.labels):
            raise UserError(
                f"the data has too few distinct texts to split: no {what} rows are left"
            )
    present = set(train.labels.tolist())
    if len(present) < 2:
        raise UserError(
            f"all training rows have the label {names[train.labels[0]]!r} (column "
            f"{task.label_column!r}): a classifier needs two classes or more"
        )
    unseen = sorted(set(validation.labels.tolist()) - present)
    if unseen:
        raise UserError(
            f"label {names[unseen[0]]!r} occurs in validation rows but in no training row: "
            "give training rows of it, or remove it"
        )
    if task.metric == "f1" and len(names) != 2:
        raise UserError(f"metric 'f1' is for two classes; this task has {len(names)}")
