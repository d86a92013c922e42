"""Classification where every row has exactly one class.

Shape letters: N rows (B in a batch), C classes.
"""

from typing import Any

import numpy as np

from sweet_jax.objectives.objective import (
    Array,
    CategoricalVariables,
    Metric,
    Objective,
    accuracy_metric,
    correlation_standard_error,
    ratio,
    softmax,
)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the cross-entropy of each row, float32 [..., B], of labels int32 [B]."""
    import jax.numpy as jnp  # here: curves and served models need no JAX
    import optax

    labels = jnp.broadcast_to(labels, logits.shape[:-1])  # [..., B]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def predicted_class(logits: Array) -> Array:
    """Returns the class with the largest logit, int [..., B]."""
    return logits.argmax(axis=-1)


def same_class(classes: Array, others: Array) -> Array:
    """Returns whether classes are the same, bool [..., B]."""
    return classes == others


def single_predicted_class(logits: Array, row_mask: Array) -> Array:
    """Returns the one class predicted for all rows of row_mask bool [B], or -1; int32 [...]."""
    xp = logits.__array_namespace__()
    classes = logits.argmax(axis=-1)  # [..., B]
    present = xp.broadcast_to(row_mask, classes.shape)
    low = xp.where(present, classes, logits.shape[-1]).min(axis=-1)
    high = xp.where(present, classes, -1).max(axis=-1)
    return xp.where(low == high, low, -1).astype("int32")


def read_labels(labels: Any, classes: int) -> np.ndarray:
    """Returns labels as int64. Raises ValueError for labels outside the classes."""
    labels = np.asarray(labels, np.int64)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be from 0 to {classes - 1}")
    return labels


def one_hot(classes: np.ndarray, count: int) -> np.ndarray:
    """Returns whether each row has each class, bool [..., N, C]."""
    return classes[..., None] == np.arange(count)


def matthews(sums: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Computes Matthews' correlation for C classes (Gorodkin 2004, eq. 8), 0 where not defined.

    Args:
      sums: [..., 1 + C]: rows that are right, and rows predicted as each class.
      totals: [..., C], rows of each class.

    """
    right, given = sums[..., 0], sums[..., 1:].astype(np.float64)
    true = totals.astype(np.float64)
    count = true.sum(axis=-1)
    covariance = right * count - (given * true).sum(axis=-1)
    spread = (count**2 - (given**2).sum(axis=-1)) * (count**2 - (true**2).sum(axis=-1))
    return ratio(covariance, np.sqrt(np.maximum(spread, 0)))


MATTHEWS = Metric(
    "matthews",
    lambda given, labels, classes: np.concatenate(
        [(given == labels)[..., None], one_hot(given, classes)], axis=-1
    ),
    one_hot,
    matthews,
    standard_error=correlation_standard_error,
)

# Of class 1: rows correctly predicted so, and rows predicted so.
F1 = Metric(
    "f1",
    lambda given, labels, classes: np.stack([(given == labels) & (given == 1), given == 1], -1),
    lambda labels, classes: (labels == 1)[..., None],
    lambda sums, totals: ratio(2.0 * sums[..., 0], sums[..., 1] + totals[..., 0]),
)


def _right_of_class(given: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns whether each row is of each class and predicted so, bool [..., N, C]."""
    return one_hot(given, classes) & one_hot(labels, classes)


def macro_f1(sums: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Computes the mean F1 over the classes that rows have, or are predicted as.

    Args:
      sums: [..., 2 C]: rows of each class predicted so, then rows predicted as each class.
      totals: [..., C], rows of each class.

    """
    right, given = np.split(np.asarray(sums, np.float64), 2, axis=-1)
    count = given + totals
    return ratio(ratio(2 * right, count).sum(axis=-1), (count > 0).sum(axis=-1))


MACRO_F1 = Metric(
    "macro_f1",
    lambda given, labels, classes: np.concatenate(
        [_right_of_class(given, labels, classes), one_hot(given, classes)], axis=-1
    ),
    one_hot,
    macro_f1,
)

# The mean recall over the classes that rows have.
BALANCED_ACCURACY = Metric(
    "balanced_accuracy",
    _right_of_class,
    one_hot,
    lambda sums, totals: ratio(
        ratio(sums.astype(np.float64), totals).sum(axis=-1), (np.asarray(totals) > 0).sum(axis=-1)
    ),
)

SINGLE_LABEL = Objective(
    "single_label",
    (accuracy_metric(same_class), MATTHEWS, F1, MACRO_F1, BALANCED_ACCURACY),
    cross_entropy,
    predicted_class,
    same_class,
    softmax,
    single_predicted_class,
    lambda predicted, classes: f"class {str(classes[int(predicted)])!r}",
    read_labels,
    categorical=CategoricalVariables(
        logits=lambda logits: logits[..., None, :],
        outcomes=lambda labels: labels[..., None],
    ),
)
