"""The rows that each replica of a run trains on, tunes on and calibrates on.

Shape letters: R replica, N training rows, K calibration rows, M tuning rows.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sweet_jax.config import Config
from sweet_jax.data.load import Dataset
from sweet_jax.data.splits import drop_duplicates, split_calibration_rows, split_tuning_rows
from sweet_jax.errors import UserError
from sweet_jax.objectives.label_checks import cut_label

log = logging.getLogger(__name__)


class RunRows(NamedTuple):
    """Holds the rows of every replica by their use; the three sets are disjoint."""

    training: np.ndarray  # int [R, N]
    calibration: np.ndarray  # int [R, K]; K is 0 unless `calibration` is "held_out"
    tuning: np.ndarray  # int [R, M]; M is 0 if nothing is tuned


def draw_rows(config: Config, dataset: Dataset) -> RunRows:
    """Draws the rows of each replica, numbered as in the data set.

    Raises UserError if a class of the validation rows does not occur in the training rows drawn.
    """
    labels, texts, strata = dataset.train.labels, dataset.train.texts, dataset.strata
    seeds = [seed for seed, _ in config.replicas()]
    split = [split_calibration_rows(strata, config, seed, labels) for seed in seeds]
    split, repeats = drop_duplicates(texts, split, strata, seeds)
    training, calibration = zip(*split, strict=True)
    if repeats:
        message = "%d training rows that repeat a calibration text are dropped"
        if len(set(seeds)) > 1:
            message = "up to %d training rows repeat a calibration text: each seed drops this many"
        log.info(message, repeats)
    tuning = [np.empty(0, int)] * len(seeds)
    if config.tunes:
        training, tuning = _hold_out_tuning_rows(config, dataset, training)
    for seed, rows in zip(seeds, training, strict=True):
        present = dataset.objective.column.present
        unseen = np.setdiff1d(present(dataset.validation.labels), present(labels[rows]))
        if len(unseen):
            raise UserError(
                f"label {cut_label(dataset.classes[unseen[0]])!r} occurs in validation rows, "
                f"but in none of the {len(rows)} training rows drawn for seed {seed}: raise "
                "train_size, or add more distinct texts"
            )
    size = min(map(len, calibration))  # sizes differ if most classes have one row
    return RunRows(
        np.stack(training), np.stack([rows[:size] for rows in calibration]), np.stack(tuning)
    )


def _hold_out_tuning_rows(
    config: Config, dataset: Dataset, training: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Splits each replica's rows into training and tuning rows, as many for every replica."""
    strata, targets = dataset.strata, dataset.train.labels
    seeds = [seed for seed, _ in config.replicas()]
    split = [
        split_tuning_rows(strata, rows, config.tuning_fraction, seed, targets)
        for seed, rows in zip(seeds, training, strict=True)
    ]
    split, _ = drop_duplicates(dataset.train.texts, split, strata, seeds)
    size = min(len(tuning) for _, tuning in split)
    return [rows for rows, _ in split], [tuning[:size] for _, tuning in split]
