"""Bounds on what a policy can reach: oracles above, the single exits below.

Shape letters: E exit, N examples, T thresholds, P points of a front.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.pareto import ParetoFront, mean_metric
from sweet_jax.exits.simulation import exact_curve
from sweet_jax.objectives.objective import accuracy_metric

_SLOPES = 25  # number of cost weights for which `best_thresholds` optimizes


def any_correct(right: np.ndarray, agrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the first exit that is right.

    This oracle is inflated by luck: four independent exits that are right in 60% of the cases reach
    97.4% (Hor et al. 2024, arXiv 2402.04359).
    """
    place = right.argmax(axis=0)
    return place, place


def stable(right: np.ndarray, agrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the first exit from which all exits are right; answers are those of the last exit."""
    lasting = np.logical_and.accumulate(right[::-1])[::-1]  # [E', N]
    return lasting.argmax(axis=0), np.full(right.shape[1], -1)


def agreement(right: np.ndarray, agrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the first exit that predicts the same as the last one, without reading labels."""
    return agrees.argmax(axis=0), np.full(right.shape[1], -1)


# Functions of whether each of the first E' exits is right, and whether it predicts the same as the
# last of them, bool [E', N] each. They return the exit where each example leaves and the exit that
# answers, int [N] each. If no exit is right, an example leaves at the first, which is the cheapest.
ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "stable": stable,
    "agreement": agreement,
    "any_correct": any_correct,
}


def oracle(outputs: ExitOutputs, replica: int, kind: str, metric: str | None = None) -> ParetoFront:
    """Computes the exact cost and metric of an oracle, in O(N E^2).

    Returns the rising part of the upper hull of the oracle's points for the model truncated after
    each of its exits. Exits that diverged are left out.

    Args:
      outputs: outputs of the rows.
      replica: index of the replica.
      kind: name of the oracle in ORACLES.
      metric: name of the metric; default the one in outputs.identity.

    Raises UserError for regression, whose predictions are not right or wrong.

    """
    predictions, labels, cost = _sound(outputs, replica)
    chosen, agrees = outputs.objective.metric(metric or outputs.metric), outputs.objective.same
    right, rows = agrees(predictions, labels), np.arange(len(labels))  # [E', N], [N]
    points = []
    for count in range(1, len(predictions) + 1):
        so_far = predictions[:count]
        taken, answering = ORACLES[kind](right[:count], agrees(so_far, so_far[-1]))
        answers = so_far[answering, rows]
        value = compute_metric(chosen, answers, labels, outputs.logits.shape[-1])
        points.append((float(cost[taken].mean()), value))
    hull = ParetoFront.upper_hull(points)
    best = int(hull.score.argmax()) + 1  # an oracle does not continue to worse exits
    return ParetoFront(hull.cost[:best], hull.score[:best])


def single_exit_hull(outputs: ExitOutputs, replica: int, metric: str | None = None) -> ParetoFront:
    """Computes the upper hull of the single exits, which random assignment to exits reaches.

    Exits that diverged are left out. `metric` defaults to the one in outputs.identity.
    """
    predictions, labels, cost = _sound(outputs, replica)
    chosen, classes = outputs.objective.metric(metric or outputs.metric), outputs.logits.shape[-1]
    values = [compute_metric(chosen, p, labels, classes) for p in predictions]
    return ParetoFront.upper_hull(zip(cost.tolist(), values, strict=True))


def _sound(outputs: ExitOutputs, replica: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (predictions [E', N], labels [N], cost [E']) of the exits that did not diverge.

    If all exits diverged, all are returned.
    """
    finite = np.isfinite(outputs.logits[replica]).all(axis=(1, 2))
    keep = np.flatnonzero(finite if finite.any() else ~finite)
    return outputs.predictions[replica][keep], outputs.labels[replica], outputs.cost[keep]


def share_of_gap(
    cost: np.ndarray, metric: np.ndarray, low: ParetoFront, high: ParetoFront
) -> float | None:
    """Computes the share of the gap between two bounds that a curve closes, by mean metric.

    0 is no better than assigning examples to exits at random, and 1 is as good as the oracle. The
    share exceeds 1 if early exits correct the last exit, which the stable oracle does not count.
    Returns None if the bounds coincide or have no common range of cost with the curve. See
    `mean_metrics` for the arguments.
    """
    means = mean_metrics(cost, metric, low, high)
    if means is None:
        return None
    bottom, own, top = means
    return (own - bottom) / (top - bottom) if top > bottom + 1e-12 else None


def mean_metrics(
    cost: np.ndarray, metric: np.ndarray, low: ParetoFront, high: ParetoFront
) -> tuple[float, float, float] | None:
    """Computes the mean metric over cost of a lower bound, a curve and an upper bound.

    The mean is over the range of cost that all three share; None if there is no such range.

    Args:
      cost: cost of the curve's points, ascending, float64 [T].
      metric: metric of the curve's points, float64 [T].
      low, high: the bounds.

    """
    start = max(float(cost[0]), float(low.cost[0]), float(high.cost[0]))
    end = float(low.cost[-1])
    if start >= end:
        return None
    curves = ((low.cost, low.score), (cost, metric), (high.cost, high.score))
    bottom, own, top = (mean_metric(*curve, start, end) for curve in curves)
    return bottom, own, top


def best_thresholds(outputs: ExitOutputs, replica: int, confidences: np.ndarray) -> ParetoFront:
    """Fits a separate threshold for each exit on the reported rows, as an optimistic bound.

    For each of 25 slopes, accuracy - slope x cost is maximized by coordinate ascent: starting from
    the best single threshold, one exit's threshold is changed at a time until no change helps. Each
    step is exact, in O(N) once the confidences are sorted. The results are local optima, so the
    true bound may lie above them.

    Args:
      outputs: outputs of the rows.
      replica: index of the replica.
      confidences: confidences of a policy, float64 [E, N]; -inf never leaves early.

    Returns:
      The upper hull of the results and of the exact curve of single thresholds, which therefore
      never lies above it. The score is the accuracy, and thresholds are float64 [P, E - 1].

    """
    objective, labels = outputs.objective, outputs.labels[replica]
    right = objective.is_correct(outputs.logits[replica], labels).astype(np.float64)  # [E, N]
    orders = np.argsort(-confidences[:-1], axis=1, kind="stable")  # [E - 1, N]
    levels = np.take_along_axis(confidences[:-1], orders, axis=1)
    metric = accuracy_metric(objective.same)
    curve = exact_curve(outputs.replica(replica), confidences[None], metric)
    single, cost, accuracy = (v[0] for v in (curve.threshold, curve.cost, curve.score))  # [T]
    limits_at = {
        (float(c), float(a)): np.full(len(orders), t)
        for t, c, a in zip(single, cost, accuracy, strict=True)
    }
    for slope in np.geomspace(1e-3, 3, _SLOPES):
        gains = right - slope * outputs.cost[:, None]  # [E, N]
        start = np.full(len(orders), single[int((accuracy - slope * cost).argmax())])
        limits = _ascend(confidences, orders, levels, start, gains)
        taken = _exits(confidences, limits)
        reached = right[taken, np.arange(len(taken))].mean()
        limits_at[float(outputs.cost[taken].mean()), float(reached)] = limits
    hull = ParetoFront.upper_hull(limits_at)
    points = zip(hull.cost.tolist(), hull.score.tolist(), strict=True)
    return dataclasses.replace(hull, threshold=np.stack([limits_at[point] for point in points]))


def _ascend(
    confidences: np.ndarray,
    orders: np.ndarray,
    levels: np.ndarray,
    start: np.ndarray,
    value: np.ndarray,
) -> np.ndarray:
    """Returns thresholds [E - 1] such that changing any one cannot raise the mean value.

    Args:
      confidences: confidences of a policy, float64 [E, N].
      orders: examples of each exit but the last, sorted by descending confidence, int [E - 1, N].
      levels: confidences in that order, float64 [E - 1, N].
      start: thresholds to start from, float64 [E - 1].
      value: value of leaving at each exit, float64 [E, N].

    """
    limits, total, rows = start.copy(), -np.inf, np.arange(value.shape[1])
    while (now := float(value[_exits(confidences, limits), rows].mean())) > total + 1e-12:
        total = now
        for e in reversed(range(len(limits))):
            arrives = (confidences[:e] < limits[:e, None]).all(axis=0)
            later = np.append(limits[e + 1 :], -np.inf)
            taken = (confidences[e + 1 :] >= later[:, None]).argmax(axis=0)
            gain = np.where(arrives, value[e] - value[e + 1 :][taken, rows], 0)[orders[e]]
            sums = np.append(0.0, np.cumsum(gain))  # if the first 0, 1, ... examples leave here
            whole = np.append(np.append(True, levels[e][1:] != levels[e][:-1]), True)
            whole[1:] &= np.isfinite(levels[e])  # -inf never leaves
            best = int(np.where(whole, sums, -np.inf).argmax())
            limits[e] = levels[e][best - 1] if best else np.inf
    return limits


def _exits(confidences: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Returns the exit of each example, int [N], given thresholds [E - 1] of all but the last."""
    return (confidences >= np.append(limits, -np.inf)[:, None]).argmax(axis=0)
