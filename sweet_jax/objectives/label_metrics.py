"""Metrics for rows with any number of labels.

They are computed from sums over rows, so that curves can accumulate them.

Shape letters: N rows, C labels.
"""

from collections.abc import Callable

import numpy as np

from sweet_jax.objectives.class_metrics import macro_f1
from sweet_jax.objectives.objective import Array, Metric, accuracy_metric, ratio


def same_labels(pred: Array, others: Array) -> Array:
    """Returns whether two sets of labels, bool [..., C], are equal, bool [...]."""
    return (pred == others).all(axis=-1)


MICRO_F1 = Metric(
    "micro_f1",
    lambda pred, targets, labels: np.stack([(pred & targets).sum(-1), pred.sum(-1)], axis=-1),
    lambda targets, labels: targets.sum(axis=-1, keepdims=True),
    lambda sums, totals: ratio(2.0 * sums[..., 0], sums[..., 1] + totals[..., 0]),
)

MACRO_F1 = Metric(
    "macro_f1",
    lambda pred, targets, labels: np.concatenate(
        [
            pred & targets,
            np.broadcast_to(pred, np.broadcast_shapes(pred.shape, targets.shape)),
        ],
        axis=-1,
    ),
    lambda targets, labels: targets,
    macro_f1,
)


def share_of_same_labels(pred: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the share of labels in which two sets, bool [..., C], agree, float64 [...]."""
    return (pred == others).mean(axis=-1)


# The share of wrong labels over all rows and labels, negated.
NEG_HAMMING_LOSS = Metric(
    "neg_hamming_loss",
    lambda pred, targets, labels: (pred != targets).sum(axis=-1)[..., None],
    lambda targets, labels: np.full((len(targets), 1), targets.shape[-1]),
    lambda sums, totals: 0.0 - sums[..., 0] / totals[..., 0],  # no negative zero
    is_error=True,
    credit=share_of_same_labels,
)


def as_measure(metric: Metric, sign: float = 1.0) -> Callable[[np.ndarray, np.ndarray], float]:
    """Returns a metric times `sign` as a function of predictions and targets, bool [N, C] each."""

    def measure(pred: np.ndarray, targets: np.ndarray) -> float:
        sums = metric.row_statistics(pred, targets, targets.shape[-1]).sum(axis=0)
        totals = metric.target_statistics(targets, targets.shape[-1]).sum(axis=0)
        return sign * float(metric.value(sums, totals))

    return measure


SUBSET_ACCURACY = accuracy_metric(same_labels, "subset_accuracy")
