"""The arguments of training one model.

Shape letters: R replica, N training rows, M tuning rows.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sweet_jax.config import Config
from sweet_jax.data.batches import Tokens
from sweet_jax.models.pretrained import Checkpoint
from sweet_jax.objectives import SINGLE_LABEL, Objective
from sweet_jax.training.initialization import ModelSpec
from sweet_jax.training.probe import LinearClassifiers


class TuningRows(NamedTuple):
    """Holds the rows that choose a step, and the metric on them."""

    rows: np.ndarray  # int [R, M]
    metric: str


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingJob:
    """Holds what `fit` needs to train one model for all replicas.

    Attributes:
      config: resolved.
      checkpoint: of the encoder.
      model: which model.
      classes: number of classes.
      tokens: of the training rows.
      rows: for each replica the indices it trains on, int [N] each.
      workdir: where checkpoints and metrics go.
      tuning: rows of `tokens` by which the best state is kept, with `epochs="auto"`.
      probe: the start of the heads of all exits of the config; None for random ones.
      short: a run of a share of the steps, to its end (`rate_search`).
      objective: what the outputs of an exit are trained for.

    """

    config: Config
    checkpoint: Checkpoint
    model: ModelSpec
    classes: int
    tokens: Tokens
    rows: Sequence[np.ndarray]
    workdir: Path
    tuning: TuningRows | None = None
    probe: LinearClassifiers | None = None
    short: bool = False
    objective: Objective = SINGLE_LABEL
