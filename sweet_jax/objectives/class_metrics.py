"""Metrics other than accuracy for rows with exactly one class.

They are computed from sums over rows, so that curves can accumulate them.

Shape letters: N rows, C classes.
"""

import numpy as np

from sweet_jax.objectives.objective import Metric, ratio


def one_hot(classes: np.ndarray, count: int) -> np.ndarray:
    """Returns whether each row has each class, bool [..., N, C]."""
    return classes[..., None] == np.arange(count)


def matthews(sums: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Computes Matthews' correlation for C classes (Gorodkin 2004, eq. 8), 0 where undefined.

    Args:
      sums: number of correct rows and of rows predicted as each class, [..., 1 + C].
      totals: number of rows of each class, [..., C].

    """
    right, pred = sums[..., 0], sums[..., 1:].astype(np.float64)
    true = totals.astype(np.float64)
    count = true.sum(axis=-1)
    covariance = right * count - (pred * true).sum(axis=-1)
    spread = (count**2 - (pred**2).sum(axis=-1)) * (count**2 - (true**2).sum(axis=-1))
    return ratio(covariance, np.sqrt(np.maximum(spread, 0)))


MATTHEWS = Metric(
    "matthews",
    lambda pred, labels, classes: np.concatenate(
        [(pred == labels)[..., None], one_hot(pred, classes)], axis=-1
    ),
    one_hot,
    matthews,
)

# The F1 of class 1. Its row statistics are the true positives and the predicted positives.
F1 = Metric(
    "f1",
    lambda pred, labels, classes: np.stack([(pred == labels) & (pred == 1), pred == 1], -1),
    lambda labels, classes: (labels == 1)[..., None],
    lambda sums, totals: ratio(2.0 * sums[..., 0], sums[..., 1] + totals[..., 0]),
)


def _right_of_class(pred: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns whether each row belongs to each class and is predicted as it, bool [..., N, C]."""
    return one_hot(pred, classes) & one_hot(labels, classes)


def macro_f1(sums: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Computes the mean F1 over the classes that occur among the targets or the predictions.

    Args:
      sums: number of correctly predicted rows of each class, followed by the number of rows
        predicted as each class, [..., 2 C].
      totals: number of rows of each class, [..., C].

    """
    right, pred = np.split(np.asarray(sums, np.float64), 2, axis=-1)
    count = pred + totals
    return ratio(ratio(2 * right, count).sum(axis=-1), (count > 0).sum(axis=-1))


MACRO_F1 = Metric(
    "macro_f1",
    lambda pred, labels, classes: np.concatenate(
        [_right_of_class(pred, labels, classes), one_hot(pred, classes)], axis=-1
    ),
    one_hot,
    macro_f1,
)

# The mean recall over the classes that occur among the targets.
BALANCED_ACCURACY = Metric(
    "balanced_accuracy",
    _right_of_class,
    one_hot,
    lambda sums, totals: ratio(
        ratio(sums.astype(np.float64), totals).sum(axis=-1), (np.asarray(totals) > 0).sum(axis=-1)
    ),
)
