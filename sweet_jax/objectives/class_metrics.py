"""Metrics of one class a row, beside accuracy: from sums over rows, so that curves accumulate them.

Shape letters: N rows, C classes.
"""

import numpy as np

from sweet_jax.objectives.objective import Metric, ratio


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
