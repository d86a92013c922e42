"""The arguments of training one model.

Shape letters: R replica, N training rows, M tuning rows.
"""

import dataclasses
from pathlib import Path

import numpy as np

from sweet_jax.config import Config
from sweet_jax.data.batches import Tokens
from sweet_jax.models.pretrained import Checkpoint
from sweet_jax.training.growth import BaseRun
from sweet_jax.training.initialization import ModelSpec
from sweet_jax.training.probe import LinearClassifiers


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingJob:
    """Holds what `fit` needs to train one model for all replicas.

    Attributes:
      config: resolved.
      checkpoint: of the encoder.
      model: which of the method's models.
      classes: number of classes.
      tokens: of the training and tuning rows.
      rows: int [R, N], rows of `tokens` that each replica trains on.
      tuning: int [R, M], rows by which the best state is kept with `epochs="auto"`.
      metric: on the tuning rows.
      workdir: where checkpoints and metrics go.
      base: the run that this one grows from.
      probe: the start of the heads of all exits of the config; None for random ones.
      short: a run of a share of the steps, to its end (`rate_search`).

    """

    config: Config
    checkpoint: Checkpoint
    model: ModelSpec
    classes: int
    tokens: Tokens
    rows: np.ndarray
    tuning: np.ndarray
    metric: str
    workdir: Path
    base: BaseRun | None = None
    probe: LinearClassifiers | None = None
    short: bool = False
