"""Bootstrap intervals of a curve of cost against metric.

Shape letters: R replica, E exit, N examples, K thresholds, S statistics of a row, U of a target.
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

_DRAWN_TOGETHER = 100  # bootstrap draws in one matrix product: a bound on memory
_HELD = 1 << 26  # numbers of a bootstrap that are held in memory at once, about


@dataclasses.dataclass(frozen=True, eq=False)
class BootstrapBand:
    """Holds the intervals of a curve over rows drawn anew.

    Attributes:
      threshold, cost, score: float64 [R, K], points of the curve; score is the metric.
      score_interval: float64 [R, K, 2], 95% percentile intervals of the metric over the draws.

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
    """Computes intervals of a curve over rows drawn with replacement, thresholds fixed.

    At `points` thresholds, evenly among the distinct ones. At fixed thresholds an example's part in
    the statistics is fixed too, so that all draws are one matrix product [draws, N] x [N, K], where
    `scipy.stats.bootstrap` would simulate each draw. The same draws at every call. Other arguments
    and errors as in `simulate`.
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


def _draw(
    outputs: ExitOutputs,
    metric: Metric,
    confidences: np.ndarray,
    thresholds: np.ndarray,
    draws: int,
) -> np.ndarray:
    """Computes the metric of each draw at each threshold, float64 [draws, K].

    Of one replica's outputs and confidences float64 [E, N].
    """
    targets, classes = outputs.labels[0], outputs.logits.shape[-1]
    count = len(targets)
    levels = np.maximum.accumulate(confidences[:-1], axis=0)  # [E - 1, N]
    rows = metric.row_statistics(outputs.predictions[0], targets, classes)  # [E, N, S]
    # Whether a row counts, and how many do, is exact in float32.
    rows = rows.astype(np.result_type(np.float32, rows))
    totals = metric.target_statistics(targets, classes).astype(np.float64)  # [N, U]
    found = np.empty((draws, len(thresholds)))
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
            found[several, at] = metric.value(sums, (times @ totals)[:, None])
    return found
