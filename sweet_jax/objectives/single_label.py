"""Classification where every row has exactly one class.

Shape letters: B batch, C classes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sweet_jax.config import METRICS
from sweet_jax.objectives.objective import Array, Objective


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each row, float32 [..., B], of labels int32 [B]."""
    labels = jnp.broadcast_to(labels, logits.shape[:-1])  # [..., B]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns whether the class of each row is its label, bool [..., B]."""
    return logits.argmax(axis=-1) == jnp.broadcast_to(labels, logits.shape[:-1])


def predicted_class(logits: Array) -> Array:
    """Returns the class with the largest logit, int [..., B]."""
    return logits.argmax(axis=-1)


def softmax(logits: Array) -> Array:
    """Returns the probabilities of the classes, [..., B, C], in the dtype of the logits."""
    exponentials = (np if isinstance(logits, np.ndarray) else jnp).exp(
        logits - logits.max(axis=-1, keepdims=True)
    )
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def single_predicted_class(logits: jax.Array, row_mask: jax.Array) -> jax.Array:
    """Returns the one class predicted for all rows of row_mask bool [B], or -1; int32 [...]."""
    classes = logits.argmax(axis=-1)  # [..., B]
    present = jnp.broadcast_to(row_mask, classes.shape)
    low = jnp.where(present, classes, logits.shape[-1]).min(axis=-1)
    high = jnp.where(present, classes, -1).max(axis=-1)
    return jnp.where(low == high, low, -1).astype(jnp.int32)


def batch_statistics(logits: jax.Array, row_mask: jax.Array) -> dict[str, jax.Array]:
    """Returns what a step logs: by it an exit that has collapsed to one class is found."""
    return {"predicted": single_predicted_class(logits, row_mask)}


SINGLE_LABEL = Objective(
    "single_label",
    METRICS,
    cross_entropy,
    is_correct,
    predicted_class,
    softmax,
    batch_statistics,
)
