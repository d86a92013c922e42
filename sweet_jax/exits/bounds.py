"""Bounds of what a policy can reach: oracles above, the single exits below.

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

_SLOPES = 25  # weights of cost against accuracy that `best_thresholds` optimises


def any_correct(right: np.ndarray, agrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the first exit that is right.

    Inflated by luck: four independent exits that are right in 60% of the cases reach 97.4% (Hor et
    al. 2024, arXiv 2402.04359).
    """
    place = right.argmax(axis=0)
    return place, place


def stable(right: np.ndarray, agrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the first exit from which on all are right: the metric is the last exit's own."""
    lasting = np.logical_and.accumulate(right[::-1])[::-1]  # [E', N]
    return lasting.argmax(axis=0), np.full(right.shape[1], -1)


def agreement(right: np.ndarray, agrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the first exit that predicts what the last one does; it reads no label."""
    return agrees.argmax(axis=0), np.full(right.shape[1], -1)


# From whether each of the first E' exits is right, and predicts what the last of them does, bool
# [E', N] each, to the exit where each example leaves and the exit that answers, int [N] each. Where
# no exit is right, the first: it is the cheapest.
ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "stable": stable,
    "agreement": agreement,
    "any_correct": any_correct,
}


def oracle(outputs: ExitOutputs, replica: int, kind: str, metric: str | None = None) -> ParetoFront:
    """Computes what an oracle would cost and reach, exactly, in O(N E^2).

    The upper hull, as far as it rises, of the oracle's points on the first exit alone, the first
    two, and so on: of the model truncated after each exit. Exits that diverged are left out.
    Raises UserError where predictions are numbers, which are not right or wrong.
    `kind` is a name in ORACLES; `metric` is by default the one in outputs.identity.
    """
    given, labels, cost = _sound(outputs, replica)
    chosen, agrees = outputs.objective.metric(metric or outputs.metric), outputs.objective.same
    right, rows = agrees(given, labels), np.arange(len(labels))  # [E', N], [N]
    points = []
    for count in range(1, len(given) + 1):
        place, answering = ORACLES[kind](right[:count], agrees(given[:count], given[count - 1]))
        answers = given[:count][answering, rows]
        value = compute_metric(chosen, answers, labels, outputs.logits.shape[-1])
        points.append((float(cost[place].mean()), value))
    hull = ParetoFront.upper_hull(points)
    best = int(hull.score.argmax()) + 1  # an oracle never continues to worse exits
    return ParetoFront(hull.cost[:best], hull.score[:best])


def single_exit_hull(outputs: ExitOutputs, replica: int, metric: str | None = None) -> ParetoFront:
    """Computes the upper hull of the single exits: what sending examples to them at random reaches.

    Exits that diverged are left out. `metric` is by default the one in outputs.identity.
    """
    given, labels, cost = _sound(outputs, replica)
    chosen, classes = outputs.objective.metric(metric or outputs.metric), outputs.logits.shape[-1]
    values = [compute_metric(chosen, p, labels, classes) for p in given]
    return ParetoFront.upper_hull(zip(cost.tolist(), values, strict=True))


def _sound(outputs: ExitOutputs, replica: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (predictions [E', N], labels [N], cost [E']) of the exits that did not diverge.

    Of all exits where all diverged.
    """
    finite = np.isfinite(outputs.logits[replica]).all(axis=(1, 2))
    keep = np.flatnonzero(finite if finite.any() else ~finite)
    return outputs.predictions[replica][keep], outputs.labels[replica], outputs.cost[keep]


def share_of_gap(
    cost: np.ndarray, metric: np.ndarray, low: ParetoFront, high: ParetoFront
) -> float | None:
    """Computes how much of the gap between two bounds a curve closes, by mean metric over cost.

    0 is no better than sending examples to exits at random, 1 as good as the oracle; more than 1
    where early exits correct the last, which the stable oracle does not. None where the bounds
    coincide, or no range of cost is common. Arguments as in `mean_metrics`.
    """
    found = mean_metrics(cost, metric, low, high)
    if found is None:
        return None
    bottom, own, top = found
    return (own - bottom) / (top - bottom) if top > bottom + 1e-12 else None


def mean_metrics(
    cost: np.ndarray, metric: np.ndarray, low: ParetoFront, high: ParetoFront
) -> tuple[float, float, float] | None:
    """Computes the mean metric of a lower bound, a curve and an upper bound over cost.

    Over the range of cost that all three have; None where there is none.

    Args:
      cost: float64 [T], of the curve, ascending.
      metric: float64 [T].
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
    """Finds thresholds of each exit's own, fitted on the very rows reported: an optimistic bound.

    For 25 slopes of accuracy against cost, accuracy - slope x cost is raised one exit's threshold
    at a time, each step exact in O(N) once the confidences are sorted, until none helps; started at
    the best single threshold of the exact curve. The upper hull of what is found and of that curve:
    no single threshold lies above it. These are local optima, so that the true bound can.

    confidences: float64 [E, N], of a policy; -inf never leaves early. Returns the front of
    accuracy, its thresholds float64 [P, E - 1].
    """
    objective, labels = outputs.objective, outputs.labels[replica]
    right = objective.is_correct(outputs.logits[replica], labels).astype(np.float64)  # [E, N]
    orders = np.argsort(-confidences[:-1], axis=1, kind="stable")  # [E - 1, N]
    levels = np.take_along_axis(confidences[:-1], orders, axis=1)
    metric = accuracy_metric(objective.same)
    curve = exact_curve(outputs.replica(replica), confidences[None], metric)
    single, cost, accuracy = (v[0] for v in (curve.threshold, curve.cost, curve.score))  # [T]
    found = {
        (float(c), float(a)): np.full(len(orders), t)
        for t, c, a in zip(single, cost, accuracy, strict=True)
    }
    for slope in np.geomspace(1e-3, 3, _SLOPES):
        gains = right - slope * outputs.cost[:, None]  # [E, N]
        start = np.full(len(orders), single[int((accuracy - slope * cost).argmax())])
        limits = _ascend(confidences, orders, levels, start, gains)
        taken = _exits(confidences, limits)
        reached = right[taken, np.arange(len(taken))].mean()
        found[float(outputs.cost[taken].mean()), float(reached)] = limits
    hull = ParetoFront.upper_hull(found)
    points = zip(hull.cost.tolist(), hull.score.tolist(), strict=True)
    return dataclasses.replace(hull, threshold=np.stack([found[point] for point in points]))


def _ascend(
    confidences: np.ndarray,
    orders: np.ndarray,
    levels: np.ndarray,
    start: np.ndarray,
    value: np.ndarray,
) -> np.ndarray:
    """Finds thresholds [E - 1] where changing any one cannot raise the mean of value [E, N].

    orders int [E - 1, N] sorts the examples of each exit but the last by falling confidence, levels
    float64 [E - 1, N] are the confidences in that order.
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
    """Returns the exit of each example, int [N], with thresholds [E - 1] of each but the last."""
    return (confidences >= np.append(limits, -np.inf)[:, None]).argmax(axis=0)
