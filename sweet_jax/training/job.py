"""The arguments of training one model.

Shape letters: R replica, N training rows, M tuning rows.
"""

import dataclasses
from pathlib import Path

import numpy as np

from sweet_jax.config import Config
from sweet_jax.data.batches import Tokens
from sweet_jax.models.pretrained import Checkpoint
from sweet_jax.objectives import SINGLE_LABEL, Objective
from sweet_jax.training.growth import BaseRun
from sweet_jax.training.initialization import ModelSpec
from sweet_jax.training.probe import LinearClassifiers


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingJob:
    """Holds what `fit` needs to train one model for all replicas."""

    config: Config  # resolved
    checkpoint: Checkpoint  # pretrained checkpoint of the encoder
    model: ModelSpec  # one of the method's models
    classes: int
    tokens: Tokens  # tokenized training and tuning rows
    rows: np.ndarray  # int [R, N], rows of `tokens` that each replica trains on
    tuning: np.ndarray  # int [R, M], rows that select the best state with `epochs="auto"`
    metric: str  # metric on the tuning rows
    workdir: Path  # directory for checkpoints and metrics
    base: BaseRun | None = None  # run that this run grows from
    probe: LinearClassifiers | None = None  # initial heads of all exits in the config
    unlabeled: Tokens | None = None  # tokenized rows that are used only for distillation
    short: bool = False  # whether this is a short run of a learning-rate search (`rate_search`)
    objective: Objective = SINGLE_LABEL  # training objective of the exits
    # Work of the run's trainings that follow, in steps times layers times replicas, which the
    # expected time includes; None if the expected time was already logged.
    following: float | None = 0.0

    @property
    def step_work(self) -> int:
        """Returns the work of a step, in layers times replicas."""
        return self.model.exits[-1] * len(self.rows)
