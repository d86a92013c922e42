"""Labeled texts from the hub, from a directory of GLUE files, or from a user's own files.

Shape letters: N examples.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from sweet_jax.config import Config
from sweet_jax.data.column_names import parse_names
from sweet_jax.data.sources import naming_source, read_sources, read_unlabeled, source_names
from sweet_jax.data.splits import Split, split_off_validation
from sweet_jax.data.tasks import GLUE, Task
from sweet_jax.errors import UserError, check_choice
from sweet_jax.objectives import OBJECTIVES, Objective
from sweet_jax.objectives.label_column import LabelError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Holds the training and validation rows of a task, with a common list of class names."""

    task: Task
    classes: tuple[str, ...]
    train: Split
    validation: Split
    left_out: int = 0  # dropped training rows, whose texts are in the validation rows split off
    repeated: int = 0  # validation rows from a separate file whose texts are in the training rows
    unlabeled: Sequence[tuple[str, ...]] = ()  # texts of unlabeled rows, in file order

    @property
    def objective(self) -> Objective:
        """Returns the objective, which defines how labels are read and predicted."""
        return OBJECTIVES[self.task.objective]

    @property
    def strata(self) -> np.ndarray:
        """The strata of the training rows for stratified splits, int [N]."""
        return self.objective.column.strata(self.train.labels)

    def digest(self) -> str:
        """Returns the SHA-256 of all texts and labels, which is equal for runs on the same data."""
        sha = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (self.train, self.validation):
            sha.update(json.dumps(split.texts).encode())
            sha.update(split.labels.tobytes())
        if self.unlabeled:
            sha.update(json.dumps(self.unlabeled).encode())
        return sha.hexdigest()


def load_dataset(config: Config) -> Dataset:
    """Reads the data that a config names.

    Raises UserError for an unknown task or column; a file that is missing, cannot be read or has an
    unknown format; a row without a text or label; a source without rows; a single class; or a
    validation label that no training row has.
    """
    task, sources = read_sources(config, task_of(config))
    titles = source_names(len(sources))
    for rows, title in zip(sources, titles, strict=True):
        if not rows.labels:
            raise UserError(f"{title} has no rows")
    column, first = OBJECTIVES[task.objective].column, sources[0]
    names = column.read_names(first.labels, first.declared, task.label_column)
    splits = []
    for rows, title in zip(sources, titles, strict=True):
        with naming_source(title):
            try:
                targets = column.read(rows.labels, names, rows.texts)
            except LabelError as error:
                raise UserError(f"{rows.place(error.row)}: {error}") from error
            splits.append(Split(rows.texts, targets))
    if len(splits) == 1:
        strata, fraction = column.strata(splits[0].labels), config.validation_fraction
        splits = split_off_validation(splits[0], strata, fraction, config.split_seed)
    train, validation = splits
    _check_labels(train, validation, names, task)
    left_out = repeated = 0
    if len(sources) == 1:
        left_out = len(sources[0].labels) - len(train.labels) - len(validation.labels)
    else:
        train_texts = set(train.texts)
        repeated = sum(text in train_texts for text in validation.texts)
    unlabeled = read_unlabeled(config, task) if config.unlabeled_files else ()
    return Dataset(task, names, train, validation, left_out, repeated, unlabeled)


def task_of(config: Config) -> Task:
    """Returns the task that a config names, with the metric and the columns in the config.

    Raises UserError for an unknown task.
    """
    if config.data_files or config.dataset:
        task = GLUE.get(config.task, Task(config.task, ()))
    else:
        try:
            check_choice("task", config.task, GLUE)
        except UserError as error:
            raise UserError(
                f"{error} (to use your own data, pass --config.data_files=FILE)"
            ) from error
        task = GLUE[config.task]
    columns = parse_names(config.text_columns) or task.text_columns
    objective = OBJECTIVES[config.objective]
    named = [metric.name for metric in objective.metrics]
    usual = task.metric if task.metric in named else named[0]
    return dataclasses.replace(
        task,
        text_columns=columns,
        label_column=config.label_column,
        metric=objective.metric(config.metric or usual).name,
        objective=config.objective,
    )


def _check_labels(train: Split, validation: Split, names: tuple[str, ...], task: Task) -> None:
    for rows, what in ((train, "training"), (validation, "validation")):
        if not len(rows.labels):
            raise UserError(
                f"the data has too few distinct texts to split, since no {what} rows are left: add "
                "rows with other texts"
            )
    column = OBJECTIVES[task.objective].column
    column.check(train.labels, validation.labels, names, task.label_column)
    if task.metric == "f1" and len(names) != 2:
        raise UserError(
            f"metric='f1' applies only to two classes, but this task has {len(names)}: choose "
            "another metric"
        )
