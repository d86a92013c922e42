"""Confidence intervals for a metric, and for the difference of two metrics on the same rows.

Shape letters: N rows, C outputs of an exit (classes), K distinct combinations of target and
predictions.
"""

import numpy as np

from sweet_jax.exits.metrics import (
    TAILS,
    bootstrap_interval,
    compute_metric,
    distinct_rows,
    draw_sums,
    wilson_interval,
)
from sweet_jax.objectives import SINGLE_LABEL, Metric


def score_interval(
    metric: str | Metric, predictions: np.ndarray, targets: np.ndarray, classes: int
) -> tuple[float, float]:
    """Computes the 95% interval of a metric over rows: (low, high).

    Uses Wilson's interval (1927) for a share of rows, such as accuracy, and a bootstrap over rows
    for other metrics. See `compute_metric` for the arguments.
    """
    metric = SINGLE_LABEL.metric(metric)
    if metric.is_share:
        right = metric.row_statistics(predictions, targets, classes).sum()
        low, high = wilson_interval(right, len(targets))
    else:
        low, high = bootstrap_interval(metric, predictions, targets, classes)
    return float(low), float(high)


def paired_difference(
    metric: str | Metric, ours: np.ndarray, theirs: np.ndarray, targets: np.ndarray, classes: int
) -> tuple[float, float, float]:
    """Computes the metric of `ours` minus that of `theirs` on the same rows.

    For a share of rows, the interval is Newcombe's for paired proportions: it combines the Wilson
    intervals of both shares with their correlation, whose numerator is corrected for continuity
    (Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10). For other metrics, it is the
    percentile interval of a bootstrap over rows, see `draw_sums`. See `compute_metric` for the
    arguments.

    Returns:
      (difference, low, high), where low and high are the bounds of the 95% interval.

    """
    metric = SINGLE_LABEL.metric(metric)
    values = [compute_metric(metric, side, targets, classes) for side in (ours, theirs)]
    if metric.is_share:
        right = [metric.row_statistics(side, targets, classes)[:, 0] for side in (ours, theirs)]
        low, high = _newcombe(*right)
    else:
        first, counts = distinct_rows(targets, ours, theirs)  # [K]
        drawn = targets[first]
        pair = [metric.row_statistics(side[first], drawn, classes) for side in (ours, theirs)]
        *sums, totals = draw_sums(counts, *pair, metric.target_statistics(drawn, classes))
        differences = metric.value(sums[0], totals) - metric.value(sums[1], totals)
        low, high = np.quantile(differences, TAILS)
    return values[0] - values[1], float(low), float(high)


def _newcombe(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Computes the 95% interval of mean(ours) - mean(theirs), bool [N] each."""
    count = len(ours)
    right = np.asarray([ours.sum(), theirs.sum()], np.float64)
    share = right / count
    below, above = np.abs(wilson_interval(right, count) - share[:, None]).T  # [2] each
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
