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
    checkpoint: Checkpoint  # of the encoder
    model: ModelSpec  # which of the method's models
    classes: int
    tokens: Tokens  # of the training and tuning rows
    rows: np.ndarray  # int [R, N], rows of `tokens` that each replica trains on
    tuning: np.ndarray  # int [R, M], rows by which the best state is kept with `epochs="auto"`
    metric: str  # on the tuning rows
    workdir: Path  # of checkpoints and metrics
    base: BaseRun | None = None  # that this run grows from
    probe: LinearClassifiers | None = None  # the start of the heads of all exits of the config
    unlabeled: Tokens | None = None  # of rows that are distilled on alone
    short: bool = False  # a run of a share of the steps, to its end (`rate_search`)
    objective: Objective = SINGLE_LABEL  # what the outputs of an exit are trained for
    # The trainings of the run that follow, in steps times layers times replicas, for the expected
    # time; None where that has been said before.
    following: float | None = 0.0

    @property
    def step_work(self) -> int:
        """Returns the work of a step, in layers times replicas."""
        return self.model.exits[-1] * len(self.rows)
