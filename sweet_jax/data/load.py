"""Labelled texts from the hub, from a directory of GLUE files, or from a user's own files.

Shape letters: N examples.
"""

import dataclasses
import hashlib
import json
import re

import numpy as np

from sweet_jax.config import Config, UserError, check_choice
from sweet_jax.data.column_names import parse_names
from sweet_jax.data.label_checks import check_label_column, without_fraction
from sweet_jax.data.sources import SourceRows, naming_source, read_sources, source_names
from sweet_jax.data.splits import Split, split_off_validation
from sweet_jax.data.tasks import GLUE, Task


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Holds the training and validation rows of a task, under one list of class names."""

    task: Task
    classes: tuple[str, ...]
    train: Split
    validation: Split
    left_out: int = 0  # training rows that repeat a text of the validation rows split off

    def digest(self) -> str:
        """Returns the SHA-256 of all texts and labels: equal for two runs on the same data."""
        sha = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (self.train, self.validation):
            sha.update(json.dumps(split.texts).encode())
            sha.update(split.labels.tobytes())
        return sha.hexdigest()


def load_dataset(config: Config) -> Dataset:
    """Reads the data that a config names.

    Raises UserError for an unknown task or column, a file that is absent, unreadable or of another
    format, a row without text or label, no rows, a single class, or a validation label that no
    training row has.
    """
    task, sources = read_sources(config, task_of(config))
    places = source_names(len(sources))
    for rows, place in zip(sources, places, strict=True):
        if not rows.labels:
            raise UserError(f"{place} has no rows")
    names = _class_names(sources[0])
    check_label_column(sources[0].labels, task.label_column)
    splits = []
    for rows, place in zip(sources, places, strict=True):
        with naming_source(place):
            splits.append(_split(rows, names))
    if len(splits) == 1:
        splits = split_off_validation(splits[0], config.validation_fraction, config.split_seed)
    train, validation = splits
    _check_labels(train, validation, names, task)
    left_out = 0
    if len(sources) == 1:
        left_out = len(sources[0].labels) - len(train.labels) - len(validation.labels)
    return Dataset(task, names, train, validation, left_out)


def task_of(config: Config) -> Task:
    """Returns the task that a config names, with its metric and the columns that it names.

    Raises UserError for an unknown task.
    """
    if config.data_files or config.dataset:
        task = GLUE.get(config.task, Task(config.task, ()))
    else:
        check_choice("task", config.task, GLUE)
        task = GLUE[config.task]
    columns = parse_names(config.text_columns) or task.text_columns
    metric = config.metric or task.metric
    return dataclasses.replace(
        task, text_columns=columns, label_column=config.label_column, metric=metric
    )


def _class_names(rows: SourceRows) -> tuple[str, ...]:
    """Returns the class names that the file declares, else the training labels in order."""
    found = set(rows.labels)
    numeric = all(re.fullmatch("-?[0-9]{1,18}", name) for name in found)
    in_order = sorted(found, key=lambda name: (int(name), name)) if numeric else sorted(found)
    return rows.declared or tuple(in_order)


def _split(rows: SourceRows, names: tuple[str, ...]) -> Split:
    index = {name: number for number, name in enumerate(names)}
    # 1 in one file and 1.0 in another are one label, unless one file has both.
    whole = {without_fraction(name): number for name, number in index.items()}
    whole = whole if len(whole) == len(index) else {}
    labels = [index.get(name, whole.get(without_fraction(name), -1)) for name in rows.labels]
    if -1 in labels:
        row = labels.index(-1)
        count = rows.labels.count(rows.labels[row])
        raise UserError(
            f"label {rows.labels[row]!r} ({count} row{'s' * (count > 1)}, the text "
            f"{rows.texts[row][0]!r:.40}) is not among the training labels "
            f"{', '.join(map(repr, names[:10]))}: correct it, or add such training rows"
        )
    return Split(rows.texts, np.asarray(labels, np.int32))


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
