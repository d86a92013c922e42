"""Bootstrap intervals of a curve of cost against metric.

Shape letters: R replica, E exit, N examples, K thresholds, S statistics of a row, U statistics of a
target.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sweet_jax.exits.calibration import Calibrator
from sweet_jax.exits.metrics import TAILS
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import PolicyFunction, exit_confidences
from sweet_jax.exits.simulation import Curve, exact_curve, read_curve
from sweet_jax.objectives import Metric

_DRAWN_TOGETHER = 100  # bootstrap draws in one matrix product, which bounds the memory used
_HELD = 1 << 26  # approximate number of values that a bootstrap holds in memory at once


@dataclasses.dataclass(frozen=True, eq=False)
class BootstrapBand:
    """Holds the intervals of a curve over resampled rows.

    Attributes:
      threshold, cost, score: points of the curve, float64 [R, K]; score is the metric.
      score_interval: 95% percentile intervals of the metric over the draws, float64 [R, K, 2].

    """

    threshold: np.ndarray
    cost: np.ndarray
    score: np.ndarray
    score_interval: np.ndarray


def bootstrap_curve(
    outputs: ExitOutputs,
    policy: str | PolicyFunction = "confidence",
    *,
    calibrators: Sequence[Calibrator] | None = None,
    metric: str | None = None,
    points: int = 200,
    draws: int = 1000,
) -> BootstrapBand:
    """Computes intervals of a curve over rows resampled with replacement.

    At a fixed threshold, an example's contribution to the statistics does not depend on the draw.
    All draws are therefore one matrix product [draws, N] x [N, K], whereas `scipy.stats.bootstrap`
    would simulate each draw. Every call uses the same draws.

    Args:
      outputs, policy, calibrators: arguments of `simulate`, which also lists the errors raised.
      metric: name of the metric; default the one in outputs.identity.
      points: number of thresholds, K, evenly spaced among the distinct ones.
      draws: number of bootstrap draws.

    """
    chosen = outputs.objective.metric(metric or outputs.metric)
    confidences = exit_confidences(outputs, policy, calibrators)
    exact = exact_curve(outputs, confidences, chosen)
    bands = []
    for r, threshold in enumerate(exact.threshold):
        distinct = np.unique(threshold)
        at = distinct[np.linspace(0, len(distinct) - 1, points).round().astype(int)]  # [K]
        drawn = _draw(outputs.replica(r), chosen, confidences[r], at, draws)  # [draws, K]
        interval = np.quantile(drawn, TAILS, axis=0).T  # [K, 2]
        point = read_curve(Curve(*(v[r : r + 1] for v in vars(exact).values())), at)
        bands.append((at, point.cost[0], point.score[0], interval))
    return BootstrapBand(*(np.stack(values) for values in zip(*bands, strict=True)))


def bootstrap_areas(
    outputs: ExitOutputs,
    policy: str | PolicyFunction,
    calibrators: Sequence[Calibrator],
    costs: tuple[float, float],
    *,
    points: int = 500,
    draws: int = 1000,
) -> np.ndarray:
    """Computes the mean metric between two costs over rows resampled with replacement.

    Every call draws the same rows if there are as many, so that the areas of two models on the same
    rows are paired.

    Args:
      outputs, policy, calibrators: arguments of `simulate`, which also lists the errors raised.
      costs: lowest and highest cost, see `mean_between`.
      points: maximum number of thresholds at which each curve is read, evenly spaced among the
        distinct ones.
      draws: number of bootstrap draws, D.

    Returns:
      The areas, float64 [R, D].

    """
    metric, count = outputs.metric, outputs.labels.shape[1]
    each = np.repeat(outputs.cost[:, None, None], count, axis=1)  # [E, N, 1]
    cost = dataclasses.replace(
        metric,
        row_statistics=lambda *_: each,
        value=lambda sums, _: sums[..., 0] / count,
    )
    confidences = exit_confidences(outputs, policy, calibrators)
    areas = []
    for r, threshold in enumerate(exact_curve(outputs, confidences).threshold):
        distinct = np.unique(threshold)
        places = np.linspace(0, len(distinct) - 1, min(points, len(distinct)))
        at = distinct[places.round().astype(int)]  # [K]
        one = outputs.replica(r)
        curves = zip(
            _draw(one, cost, confidences[r], at, draws),
            _draw(one, metric, confidences[r], at, draws),
            strict=True,
        )
        areas.append([mean_between(x, y, costs) for x, y in curves])
    return np.asarray(areas)


def mean_between(cost: np.ndarray, score: np.ndarray, costs: tuple[float, float]) -> float:
    """Computes the mean score of a curve [T] between two costs, by the trapezoidal rule.

    The curve is interpolated at these costs. If they are equal, this is its score there.
    """
    low, high = costs
    x = np.concatenate([[low], cost[(cost > low) & (cost < high)], [high]])
    y = np.interp(x, cost, score)
    return float(np.trapezoid(y, x) / (high - low)) if high > low else float(y[0])


def _draw(
    outputs: ExitOutputs,
    metric: Metric,
    confidences: np.ndarray,
    thresholds: np.ndarray,
    draws: int,
) -> np.ndarray:
    """Computes the metric of each draw at each threshold, float64 [draws, K].

    `outputs` and `confidences`, float64 [E, N], are those of one replica.
    """
    targets, classes = outputs.labels[0], outputs.logits.shape[-1]
    count = len(targets)
    levels = np.maximum.accumulate(confidences[:-1], axis=0)  # [E - 1, N]
    rows = metric.row_statistics(outputs.predictions[0], targets, classes)  # [E, N, S]
    # Boolean statistics and counts of rows are exact in float32.
    rows = rows.astype(np.result_type(np.float32, rows))
    totals = metric.target_statistics(targets, classes).astype(np.float64)  # [N, U]
    metrics = np.empty((draws, len(thresholds)))
    size = max(1, _HELD // (rows.shape[-1] * count))  # thresholds at once
    for low in range(0, len(thresholds), size):
        at = slice(low, low + size)
        place = (levels < thresholds[at, None, None]).sum(axis=1)  # [K, N]
        parts = np.moveaxis(rows[place, np.arange(count)], -1, 0)  # [S, K, N]
        parts = parts.reshape(-1, count)
        rng = np.random.default_rng(0)
        for first in range(0, draws, _DRAWN_TOGETHER):
            several = slice(first, min(first + _DRAWN_TOGETHER, draws))
            drawn = rng.integers(0, count, (several.stop - first, count))
            times = np.stack([np.bincount(d, minlength=count) for d in drawn]).astype(rows.dtype)
            sums = (times @ parts.T).reshape(len(times), rows.shape[-1], -1).astype(np.float64)
            sums = np.moveaxis(sums, 1, -1)  # [draws, K, S]
            metrics[several, at] = metric.value(sums, (times @ totals)[:, None])
    return metrics
