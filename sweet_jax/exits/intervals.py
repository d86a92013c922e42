"""Confidence intervals of a metric, and of the difference of two on the same rows.

Shape letters: N examples, C classes, K distinct (label, ours, theirs) among the examples.
"""

import numpy as np

from sweet_jax.exits.metrics import (
    bootstrap_interval,
    compute_metric,
    metric_from_counts,
    wilson_interval,
)

_DRAWS = 1000  # of the paired bootstrap


def score_interval(
    metric: str, predictions: np.ndarray, labels: np.ndarray, classes: int, level: float = 0.95
) -> tuple[float, float]:
    """Computes the interval of a metric over rows: (low, high).

    Wilson's (1927) for accuracy, a bootstrap over rows for Matthews and F1.

    Args:
      metric: "accuracy", "matthews" or "f1".
      predictions, labels: int [N], from 0 to classes - 1.
      classes: how many there are.
      level: of confidence.

    """
    if metric == "accuracy":
        low, high = wilson_interval((predictions == labels).sum(), len(labels), level)
    else:
        low, high = bootstrap_interval(metric, predictions, labels, classes, level)
    return float(low), float(high)


def paired_difference(
    metric: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    labels: np.ndarray,
    classes: int,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Computes the metric of `ours` minus that of `theirs` on one set of rows.

    Returns (difference, low, high).

    For accuracy Newcombe's interval for paired proportions: Wilson's intervals of both, squared
    and added with the correlation of the two, its numerator corrected for continuity (Newcombe
    1998, Statistics in Medicine 17, 2635-2650, method 10). For Matthews and F1 the percentile
    interval of a bootstrap over rows, 1,000 draws, the same at every call.

    Args:
      metric: "accuracy", "matthews" or "f1".
      ours, theirs, labels: int [N], from 0 to classes - 1.
      classes: how many there are.
      level: of confidence.

    """
    difference = compute_metric(metric, ours, labels, classes) - compute_metric(
        metric, theirs, labels, classes
    )
    if metric == "accuracy":
        low, high = _newcombe(ours == labels, theirs == labels, level)
    else:
        low, high = _bootstrap(metric, ours, theirs, labels, classes, level)
    return difference, low, high


def _newcombe(ours: np.ndarray, theirs: np.ndarray, level: float) -> tuple[float, float]:
    """Computes the interval of mean(ours) - mean(theirs), bool [N] each."""
    count = len(ours)
    right = np.asarray([ours.sum(), theirs.sum()], np.float64)
    share = right / count
    below, above = np.abs(wilson_interval(right, count, level) - share[:, None]).T  # [2] each
    both, neither = float((ours & theirs).sum()), float((~ours & ~theirs).sum())
    excess = both * neither - (right[0] - both) * (right[1] - both)
    if excess > 0:
        excess = max(excess - count / 2, 0.0)
    spread = np.sqrt(np.prod(right * (count - right)))
    phi = excess / spread if spread > 0 else 0.0
    down = below[0] ** 2 - 2 * phi * below[0] * above[1] + above[1] ** 2
    up = above[0] ** 2 - 2 * phi * above[0] * below[1] + below[1] ** 2
    difference = share[0] - share[1]
    return float(difference - np.sqrt(down)), float(difference + np.sqrt(up))


def _bootstrap(
    metric: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    labels: np.ndarray,
    classes: int,
    level: float,
) -> tuple[float, float]:
    """Computes the percentile interval of the difference over rows drawn with replacement.

    Rows that agree in all three are drawn as one.
    """
    codes, counts = np.unique((labels * classes + ours) * classes + theirs, return_counts=True)
    truth, first, second = codes // classes**2, codes // classes % classes, codes % classes  # [K]
    rng = np.random.default_rng(0)
    values = []
    for _ in range(_DRAWS):
        drawn = rng.multinomial(len(labels), counts / len(labels))  # [K]
        pair = [_weighted(metric, given, truth, drawn, classes) for given in (first, second)]
        values.append(pair[0] - pair[1])
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def _weighted(
    metric: str, given: np.ndarray, truth: np.ndarray, weights: np.ndarray, classes: int
) -> float:
    """Computes the metric of predictions [K], each as often as its weight [K]."""

    def count(of: np.ndarray, use: np.ndarray) -> np.ndarray:
        return np.bincount(of, use, minlength=classes)  # [C]

    right = np.where(given == truth, weights, 0)
    whole, hits = count(given, weights)[None], count(given, right)[None]
    total = right.sum(keepdims=True)
    return float(metric_from_counts(metric, total, whole, hits, count(truth, weights))[0])
