"""Bootstrap intervals of a curve of cost against metric.

Shape letters: R replica, E exit, N examples, C classes, K thresholds.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sweet_jax.exits.calibration import Calibrator, fit_calibrators
from sweet_jax.exits.metrics import metric_from_counts
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import PolicyFunction, exit_confidences
from sweet_jax.exits.simulation import Curve, read_curve, simulate

_DRAWN_TOGETHER = 100  # bootstrap draws in one matrix product: a bound on memory
_HELD = 1 << 26  # numbers of a bootstrap that are held in memory at once, about


@dataclasses.dataclass(frozen=True, eq=False)
class BootstrapBand:
    """Holds the intervals of a curve over rows drawn anew.

    Attributes:
      threshold, cost, score: float64 [R, K], points of the curve; score is the metric.
      cost_interval, score_interval: float64 [R, K, 2], percentile intervals over the draws.

    """

    threshold: np.ndarray
    cost: np.ndarray
    score: np.ndarray
    cost_interval: np.ndarray
    score_interval: np.ndarray


def bootstrap_curve(
    outputs: ExitOutputs,
    policy: str | PolicyFunction = "confidence",
    *,
    calibration: ExitOutputs | None = None,
    calibrators: Sequence[Calibrator] | None = None,
    metric: str | None = None,
    points: int = 200,
    draws: int = 1000,
    level: float = 0.95,
) -> BootstrapBand:
    """Computes percentile intervals of a curve over rows drawn with replacement, thresholds fixed.

    At `points` thresholds, evenly among the distinct ones. At fixed thresholds an example's part in
    cost and counts is fixed too, so that all draws are one matrix product [draws, N] x [N, K],
    where `scipy.stats.bootstrap` would simulate each draw. The same draws at every call. Other
    arguments and errors as in `simulate`.
    """
    metric = metric or outputs.identity.metric
    if calibrators is None and calibration is not None:
        calibrators = fit_calibrators(calibration)
    confidences = exit_confidences(outputs, policy, calibrators)
    exact = simulate(outputs, lambda *_: confidences, metric=metric)
    bands = []
    for r, threshold in enumerate(exact.threshold):
        distinct = np.unique(threshold)
        at = distinct[np.linspace(0, len(distinct) - 1, points).round().astype(int)]
        tables = 2 if metric == "accuracy" else 2 + 2 * outputs.logits.shape[-1]
        size = max(1, _HELD // (tables * outputs.logits.shape[2]))  # thresholds at once
        parts = [
            _draw(outputs, r, confidences[r], at[first : first + size], metric, draws)
            for first in range(0, points, size)
        ]
        drawn = np.concatenate(parts, axis=-1)  # [2, draws, K]
        low_high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2], axis=1)  # [2, 2, K]
        point = read_curve(Curve(*(v[r : r + 1] for v in vars(exact).values())), at)
        bands.append((at, point.cost[0], point.score[0], low_high[:, 0].T, low_high[:, 1].T))
    return BootstrapBand(*(np.stack(values) for values in zip(*bands, strict=True)))


def _draw(
    outputs: ExitOutputs,
    replica: int,
    confidences: np.ndarray,
    thresholds: np.ndarray,
    metric: str,
    draws: int,
) -> np.ndarray:
    """Computes (cost, metric) of each draw at each threshold, float64 [2, draws, K]."""
    labels, classes = outputs.labels[replica], range(outputs.logits.shape[-1])
    count = len(labels)
    levels = np.maximum.accumulate(confidences[:-1], axis=0)  # [E - 1, N]
    place = (levels[None] < thresholds[:, None, None]).sum(axis=1)  # [K, N]
    answers = np.take_along_axis(outputs.predictions[replica], place, axis=0)  # [K, N]
    right = answers == labels
    tables = [outputs.cost[place], right]
    if metric != "accuracy":
        tables += [answers == c for c in classes]
        tables += [right & (answers == c) for c in classes]
    parts = np.stack(tables).astype(np.float32).reshape(-1, count)  # [tables x K, N]
    rng, found = np.random.default_rng(0), np.empty((2, draws, len(thresholds)))
    for first in range(0, draws, _DRAWN_TOGETHER):
        several = range(first, min(first + _DRAWN_TOGETHER, draws))
        times = np.stack(
            [np.bincount(rng.integers(0, count, count), minlength=count) for _ in several]
        ).astype(np.float32)
        product = (times @ parts.T).reshape(len(several), len(tables), -1).astype(np.float64)
        for draw, sums, weights in zip(several, product, times, strict=True):
            true = np.bincount(labels, weights, len(classes))
            given, hits = sums[2 : 2 + len(classes)].T, sums[2 + len(classes) :].T
            found[:, draw] = sums[0] / count, metric_from_counts(metric, sums[1], given, hits, true)
    return found
