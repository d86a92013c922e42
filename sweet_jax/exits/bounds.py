"""Between what should a policy lie: oracles above, the single exits below.

Shape letters: E exit, N examples, P points of a frontier.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.simulation import simulate

_SLOPES = 25  # trade-offs of score against cost that `best_thresholds` is asked for


@dataclasses.dataclass(frozen=True, eq=False)
class Frontier:
    """Points of cost against score, linear between them, the last score holding beyond.

    Attributes:
      cost: float64 [P], ascending.
      score: float64 [P].

    """

    cost: np.ndarray
    score: np.ndarray

    def mean(self, low: float, high: float) -> float:
        """Mean score over a range of cost."""
        inside = self.cost[(self.cost > low) & (self.cost < high)]
        x = np.concatenate([[low], inside, [high]])
        y = np.interp(x, self.cost, self.score)
        return float(np.trapezoid(y, x) / (high - low)) if high > low else float(y[-1])


def any_correct(given: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first right exit: inflated by luck, four independent exits that are right in 60% of the
    cases reach 97.4% (Hor et al. 2024, arXiv 2402.04359).
    """
    right = given == labels  # [P, N]
    place = np.where(right.any(axis=0), right.argmax(axis=0), 0)
    return place, np.take_along_axis(given, place[None], axis=0)[0]


def stable(given: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first exit from which on all are right: no luck, the score is the last exit's own."""
    lasting = np.logical_and.accumulate((given == labels)[::-1])[::-1]  # [P, N]
    return np.where(lasting.any(axis=0), lasting.argmax(axis=0), 0), given[-1]


def agreement(given: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first exit that says what the last one says: an oracle that knows no label."""
    return (given == given[-1]).argmax(axis=0), given[-1]


# Of classes [P, N] given by the first P exits, and labels [N]: where each example leaves (from 0),
# and what it is answered, int [N] each. Where no exit is right the first, the cheapest, will do.
ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "stable": stable,
    "agreement": agreement,
    "any_correct": any_correct,
}


def oracle(outputs: ExitOutputs, replica: int, kind: str, metric: str = "accuracy") -> Frontier:
    """What an oracle that knows the answers would cost and score, exactly, in O(N E^2).

    The upper hull, as far as it rises, of the oracle's points on the first exit alone, the first
    two, and so on: of the model cut off after each exit. Exits that diverged are left out.
    """
    given, labels, cost = _sound(outputs, replica)
    points = []
    for count in range(1, len(given) + 1):
        place, answers = ORACLES[kind](given[:count], labels)
        value = compute_metric(metric, answers, labels, outputs.logits.shape[-1])
        points.append((float(cost[place].mean()), value))
    hull = _hull(points)
    best = int(hull.score.argmax()) + 1  # nobody who knows the answers goes on to worse exits
    return Frontier(hull.cost[:best], hull.score[:best])


def single_exit_hull(outputs: ExitOutputs, replica: int, metric: str = "accuracy") -> Frontier:
    """The upper hull of the single exits: what sending examples to exits at random reaches.

    Exits that diverged are left out.
    """
    given, labels, cost = _sound(outputs, replica)
    classes = outputs.logits.shape[-1]
    values = [compute_metric(metric, p, labels, classes) for p in given]
    return _hull(list(zip(cost.tolist(), values, strict=True)))


def _sound(outputs: ExitOutputs, replica: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(classes given [P, N], labels [N], cost [P]) of the exits that did not diverge, or of all."""
    finite = np.isfinite(outputs.logits[replica]).all(axis=(1, 2))
    keep = np.flatnonzero(finite if finite.any() else ~finite)
    return outputs.predictions[replica][keep], outputs.labels[replica], outputs.cost[keep]


def _hull(points: list[tuple[float, float]]) -> Frontier:
    """The corners of the upper hull of points (cost, score)."""
    hull: list[tuple[float, float]] = []
    for point in sorted(points):
        if hull and point[0] - hull[-1][0] < 1e-12:  # one cost, but for rounding
            if point[1] <= hull[-1][1]:
                continue
            hull.pop()
        # A point below the line from the one before it to the new one is no corner.
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    cost, values = np.asarray(hull).T
    return Frontier(cost, values)


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


def share_of_gap(curve: Frontier, low: Frontier, high: Frontier) -> float | None:
    """How much of the way from `low` to `high` a curve goes, in mean score over all three's range.

    0 is no better than sending examples to exits at random, 1 the oracle; None where the two bounds
    are one, or no range is common.
    """
    start = max(float(f.cost[0]) for f in (curve, low, high))
    end = float(low.cost[-1])
    if start >= end:
        return None
    bottom, top = low.mean(start, end), high.mean(start, end)
    return (curve.mean(start, end) - bottom) / (top - bottom) if top > bottom + 1e-12 else None


def best_thresholds(
    outputs: ExitOutputs, replica: int, scores: np.ndarray
) -> tuple[Frontier, np.ndarray]:
    """Accuracy with a threshold for each exit, fitted on the very rows reported: not to be had.

    For 25 slopes of accuracy against cost, accuracy - slope x cost is raised one exit's threshold
    at a time, each step exact in O(N) once the scores are sorted, until none helps; begun at the
    best single threshold of the exact curve. The upper hull of what is found and of that curve: no
    single threshold lies above it. Local optima, so that the true bound can.

    Args:
      outputs: of the rows reported.
      replica: which.
      scores: float [E, N], of a policy; -inf never leaves early.

    Returns:
      The frontier, and the thresholds of its points, float64 [P, E - 1].

    """
    right = (outputs.predictions[replica] == outputs.labels[replica]).astype(np.float64)  # [E, N]
    orders = np.argsort(-scores[:-1], axis=1, kind="stable")  # [E - 1, N]
    levels = np.take_along_axis(scores[:-1], orders, axis=1)
    curve = simulate(outputs.replica(replica), lambda *_: scores[None], metric="accuracy")
    single, cost, value = (v[0] for v in (curve.threshold, curve.cost, curve.score))
    found = {
        (float(c), float(v)): np.full(len(orders), t)
        for t, c, v in zip(single, cost, value, strict=True)
    }
    for slope in np.geomspace(1e-3, 3, _SLOPES):
        gains = right - slope * outputs.cost[:, None]  # [E, N]
        begin = np.full(len(orders), single[int((value - slope * cost).argmax())])
        limits = _ascend(scores, orders, levels, begin, gains)
        taken = _exits(scores, limits)
        accuracy = np.take_along_axis(right, taken[None], axis=0).mean()
        found[float(outputs.cost[taken].mean()), float(accuracy)] = limits
    hull = _hull(list(found))
    points = zip(hull.cost.tolist(), hull.score.tolist(), strict=True)
    return hull, np.stack([found[point] for point in points])


def _ascend(
    scores: np.ndarray,
    orders: np.ndarray,
    levels: np.ndarray,
    limits: np.ndarray,
    value: np.ndarray,
) -> np.ndarray:
    """Thresholds [E - 1] from which no change of one alone raises the mean of value [E, N]."""
    limits, total = limits.copy(), -np.inf
    while (now := float(_reached(scores, limits, value).mean())) > total + 1e-12:
        total = now
        for e in reversed(range(len(limits))):
            arrives = (scores[:e] < limits[:e, None]).all(axis=0)
            later = np.append(limits[e + 1 :], -np.inf)
            onward = np.take_along_axis(
                value[e + 1 :], (scores[e + 1 :] >= later[:, None]).argmax(axis=0)[None], axis=0
            )[0]
            gain = np.where(arrives, value[e] - onward, 0)[orders[e]]
            sums = np.append(0.0, np.cumsum(gain))  # of letting the first 0, 1, ... leave here
            whole = np.append(np.append(True, levels[e][1:] != levels[e][:-1]), True)
            whole[1:] &= np.isfinite(levels[e])  # what is -inf stays
            best = int(np.where(whole, sums, -np.inf).argmax())
            limits[e] = levels[e][best - 1] if best else np.inf
    return limits


def _exits(scores: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Where each example leaves, int [N], with a threshold [E - 1] for each exit but the last."""
    return (scores >= np.append(limits, -np.inf)[:, None]).argmax(axis=0)


def _reached(scores: np.ndarray, limits: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.take_along_axis(value, _exits(scores, limits)[None], axis=0)[0]
