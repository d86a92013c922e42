"""Accuracy, Matthews correlation and F1 from counts, and intervals of them.

Shape letters: T thresholds (or any list of situations), N examples, C classes.
"""

import numpy as np
from scipy import stats


def compute_metric(metric: str, predictions: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Computes a metric, "accuracy", "matthews" or "f1", of predictions int [N], labels int [N]."""
    right = np.asarray([(predictions == labels).sum()])
    given = np.bincount(predictions, minlength=classes)[None]
    hits = np.bincount(labels[predictions == labels], minlength=classes)[None]
    return float(
        metric_from_counts(metric, right, given, hits, np.bincount(labels, minlength=classes))[0]
    )


def metric_from_counts(
    metric: str, right: np.ndarray, given: np.ndarray, hits: np.ndarray, true: np.ndarray
) -> np.ndarray:
    """Computes the metric in each of T situations, float64 [T].

    Matthews is Gorodkin's (2004, eq. 8) for C classes; F1 is of class 1, of two. Both are 0 where
    they are not defined.

    Args:
      metric: "accuracy", "matthews" or "f1".
      right: examples predicted correctly, [T].
      given: examples predicted as each class, [T, C]; not read for accuracy.
      hits: examples correctly predicted as each class, [T, C]; read for F1 only.
      true: examples of each class, [C].

    """
    total = float(true.sum())
    if metric == "accuracy":
        return right / total
    if metric == "f1":
        return _ratio(2.0 * hits[:, 1], given[:, 1] + float(true[1]))
    given, true = given.astype(np.float64), true.astype(np.float64)
    covariance = right * total - given @ true
    spread = (total**2 - (given**2).sum(axis=-1)) * (total**2 - (true**2).sum())
    return _ratio(covariance, np.sqrt(np.maximum(spread, 0)))


def wilson_interval(right: np.ndarray, total: int, level: float = 0.95) -> np.ndarray:
    """Computes Wilson's (1927) interval of shares of `total`, float64 [..., 2].

    right: int, of any shape.
    """
    counts = np.asarray(right, np.int64)
    each = [
        stats.binomtest(count, int(total)).proportion_ci(level, "wilson")
        for count in counts.ravel().tolist()
    ]
    return np.asarray([(ci.low, ci.high) for ci in each]).reshape(*counts.shape, 2)


def bootstrap_interval(
    metric: str,
    predictions: np.ndarray,
    labels: np.ndarray,
    classes: int,
    level: float = 0.95,
    draws: int = 1000,
) -> np.ndarray:
    """Computes the percentile interval of a metric over rows drawn with replacement, float64 [2].

    The same draws at every call, of the confusion matrix rather than of rows, as
    `scipy.stats.bootstrap` would.
    """
    table = np.bincount(labels * classes + predictions, minlength=classes**2)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(labels), table / len(labels), size=draws)
    confusion = drawn.reshape(draws, classes, classes)
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    values = [
        metric_from_counts(
            metric, h.sum(keepdims=True), c.sum(axis=0)[None], h[None], c.sum(axis=1)
        )[0]
        for h, c in zip(hits, confusion, strict=True)
    ]
    return np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray | None]:
    """Computes (mean, half width of Student's interval) over the first axis; None for one value."""
    count = len(values)
    if count < 2:
        return values.mean(axis=0), None
    half = stats.t.ppf(0.5 + level / 2, count - 1) * stats.sem(values, axis=0)
    return values.mean(axis=0), half


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > 0, above / np.where(below > 0, below, 1), 0.0)
