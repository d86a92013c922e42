"""Metrics of predictions, and their intervals.

Shape letters: E exit, N rows, C outputs of an exit (classes), K distinct rows, D draws, S
statistics of a row.
"""

import numpy as np

from sweet_jax.objectives import SINGLE_LABEL, Metric
from sweet_jax.objectives.objective import share_standard_error

_DRAWS = 1000  # number of bootstrap draws
_LEVEL = 0.95  # confidence level of all intervals
TAILS = (0.5 - _LEVEL / 2, 0.5 + _LEVEL / 2)  # quantiles of a percentile interval


def compute_metric(
    metric: str | Metric, predictions: np.ndarray, targets: np.ndarray, classes: int
) -> float:
    """Computes a metric of predictions [N, ...] for targets [N, ...].

    Args:
      metric: the metric, or the name of a metric of single-label classification ("accuracy",
        "matthews", "f1", "macro_f1" or "balanced_accuracy"), for which predictions and targets are
        int [N].
      predictions: predictions of the objective, [N, ...].
      targets: targets of the objective, [N, ...].
      classes: number of outputs of an exit, C.

    """
    metric = SINGLE_LABEL.metric(metric)
    sums = metric.row_statistics(predictions, targets, classes).sum(axis=0)  # [S]
    totals = metric.target_statistics(targets, classes).sum(axis=0)  # [U]
    return float(metric.value(sums, totals))


def jackknife_error(
    metric: Metric, predictions: np.ndarray, targets: np.ndarray, classes: int
) -> float:
    """Computes the standard error of the mean metric of several exits on the same rows.

    The jackknife recomputes the metric without each row (Efron and Stein 1981, "The jackknife
    estimate of variance", eq. 1.4). If the result is 0, as when all rows are right, or if there is
    a single row, returns the standard error of a share of 1 instead, see `share_standard_error`.

    Args:
      metric: the metric of each exit.
      predictions: predictions of the exits, [E, N, ...].
      targets: targets of the rows, [N, ...].
      classes: number of outputs of an exit, C.

    """
    count = len(targets)
    if count < 2:
        return float(share_standard_error(np.ones(()), count))
    rows = metric.row_statistics(predictions, targets, classes).astype(np.float64)  # [E, N, S]
    fixed = metric.target_statistics(targets, classes).astype(np.float64)  # [N, U]
    sums, totals = rows.sum(axis=1, keepdims=True), fixed.sum(axis=0)  # [E, 1, S], [U]
    without = metric.value(sums - rows, totals - fixed).mean(axis=0)  # [N]
    error = float(np.sqrt((count - 1) * without.var()))
    return error or float(share_standard_error(np.ones(()), count))


def wilson_interval(right: np.ndarray, total: int) -> np.ndarray:
    """Computes Wilson's (1927) 95% interval of right / total, float64 [..., 2].

    `right` is an integer array of any shape.
    """
    from scipy import stats  # imported here because a served model does not need SciPy

    counts = np.asarray(right, np.int64)
    each = [
        stats.binomtest(count, int(total)).proportion_ci(_LEVEL, "wilson")
        for count in counts.ravel().tolist()
    ]
    return np.asarray([(ci.low, ci.high) for ci in each]).reshape(*counts.shape, 2)


def bootstrap_interval(
    metric: str | Metric, predictions: np.ndarray, targets: np.ndarray, classes: int
) -> np.ndarray:
    """Computes the 95% percentile bootstrap interval of a metric over rows, float64 [2].

    See `compute_metric` for the arguments and `draw_sums` for the draws.
    """
    metric = SINGLE_LABEL.metric(metric)
    first, counts = distinct_rows(targets, predictions)  # [K]
    last = np.append(targets[first[-1]], predictions[first[-1]])
    if (last != classes - 1).any():
        # The draws are then the same as for a whole confusion matrix, whose last cell may be empty.
        first, counts = np.append(first, first[-1]), np.append(counts, 0)
    predictions, targets = predictions[first], targets[first]
    rows = metric.row_statistics(predictions, targets, classes)  # [K, S]
    sums, totals = draw_sums(counts, rows, metric.target_statistics(targets, classes))
    return np.quantile(metric.value(sums, totals), TAILS)


def distinct_rows(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first index and the count of each distinct row of columns [N, ...], int [K] each.

    Distinct rows are sorted lexicographically.
    """
    table = np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)
    _, first, counts = np.unique(table, axis=0, return_index=True, return_counts=True)
    return first, counts


def draw_sums(counts: np.ndarray, *statistics: np.ndarray) -> list[np.ndarray]:
    """Resamples rows with replacement, as many as there are, and sums their statistics.

    Only the counts of distinct rows are drawn, whereas `scipy.stats.bootstrap` would draw each row.
    Every call uses the same draws.

    Args:
      counts: number of rows equal to each distinct row, int [K].
      statistics: statistics of the distinct rows, bool or numbers [K, S] each.

    Returns:
      The sums of each of the statistics over each draw, float64 [D, S] each.

    """
    rng, share = np.random.default_rng(0), counts / counts.sum()
    table = np.concatenate(statistics, axis=1).astype(np.float64)
    sums = np.stack([rng.multinomial(counts.sum(), share) @ table for _ in range(_DRAWS)])
    return np.split(sums, np.cumsum([s.shape[1] for s in statistics])[:-1], axis=1)


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Computes the mean over the first axis and the half width of Student's 95% interval.

    The half width is None for a single value.
    """
    count = len(values)
    if count < 2:
        return values.mean(axis=0), None
    from scipy import stats  # imported here because a served model does not need SciPy

    half = stats.t.ppf(TAILS[1], count - 1) * stats.sem(values, axis=0)
    return values.mean(axis=0), half
