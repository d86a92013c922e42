"""The interface of an objective, and means over the rows of a batch that are not padding.

Shape letters: B batch, C outputs of an exit (of single-label classification, the classes).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Objective:
    """Defines what the outputs of an exit mean: loss, prediction, probabilities, metrics.

    Functions of logits float32 [..., B, C] and targets [B, ...] without the axes in front of B, as
    rows of a split have them; `...` may be the exits. They trace under `jax.jit`; `predict` and
    `probabilities` also take NumPy arrays, and return them then.

    Attributes:
      name: its key in OBJECTIVES.
      metrics: names of the metrics that it may be evaluated by, the default first.
      row_loss: (logits, targets) → float32 [..., B], the loss of each row.
      is_correct: (logits, targets) → bool [..., B], whether the prediction is right: the target of
        learning-to-exit.
      predict: logits → the predictions [..., B].
      probabilities: logits → float32 [..., B, C].
      batch_statistics: (logits, row_mask bool [B]) → arrays [...] by name, logged with every
        training step.

    """

    name: str
    metrics: tuple[str, ...]
    row_loss: Callable[[jax.Array, jax.Array], jax.Array]
    is_correct: Callable[[jax.Array, jax.Array], jax.Array]
    predict: Callable[[Any], Any]
    probabilities: Callable[[Any], Any]
    batch_statistics: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]

    def mean_loss(self, logits: jax.Array, targets: jax.Array, row_mask: jax.Array) -> jax.Array:
        """Returns the loss averaged over the rows of row_mask bool [B], float32 [...]."""
        return masked_mean(self.row_loss(logits, targets), row_mask)


def masked_mean(values: jax.Array, row_mask: jax.Array) -> jax.Array:
    """Returns the mean of values [..., B] over the rows of row_mask bool [B]; 0 of no rows."""
    present = jnp.broadcast_to(row_mask, values.shape)  # [..., B]
    return jnp.where(present, values, 0).sum(axis=-1) / jnp.maximum(present.sum(axis=-1), 1)
