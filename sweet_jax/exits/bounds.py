"""Between what should a policy lie: oracles above, the single exits below.

Shape letters: E exit, N examples, P points of a frontier.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.scores import score

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


def any_correct(given: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Answers that are right, bool [E, N]: inflated by luck, four independent exits that are right
    in 60% of the cases reach 97.4% (Hor et al. 2024, arXiv 2402.04359).
    """
    return given == labels


def stable(given: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Right answers after which all later exits are right too, bool [E, N]."""
    return np.logical_and.accumulate((given == labels)[::-1])[::-1]


def agreement(given: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Answers that are the last exit's, bool [E, N]: what an oracle that knows no label can see."""
    return given == given[-1]


ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stable": stable,
    "agreement": agreement,
    "any_correct": any_correct,
}


def oracle(outputs: ExitOutputs, replica: int, kind: str, metric: str = "accuracy") -> Frontier:
    """What an oracle that knows the answers would cost and score, exactly, in O(N E).

    It lets an example leave at the first exit that `kind` calls good, and at the first exit of all
    where none is, or where that one is too deep: point p allows no exit beyond the p-th. Between
    two points the cheapest examples go first, and gain as much a cost: the line between is exact
    for accuracy.
    """
    given, labels = outputs.predictions[replica], outputs.labels[replica]  # [E, N], [N]
    good = ORACLES[kind](given, labels)
    first = np.where(good.any(axis=0), good.argmax(axis=0), 0)  # [N]
    costs, values = [], []
    for deepest in range(len(given)):
        place = np.where(first <= deepest, first, 0)
        answers = np.take_along_axis(given, place[None], axis=0)[0]
        costs.append(float(outputs.cost[place].mean()))
        values.append(score(metric, answers, labels, outputs.logits.shape[-1]))
    return Frontier(np.asarray(costs), np.asarray(values))


def floor(outputs: ExitOutputs, replica: int, metric: str = "accuracy") -> Frontier:
    """The upper hull of the single exits: what sending examples to exits at random reaches."""
    labels, classes = outputs.labels[replica], outputs.logits.shape[-1]
    values = [score(metric, p, labels, classes) for p in outputs.predictions[replica]]
    hull: list[tuple[float, float]] = []
    for x, y in zip(outputs.cost.tolist(), values, strict=True):
        # A point below the line from the one before it to the new one is no corner.
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    cost, found = np.asarray(hull).T
    return Frontier(cost, found)


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


def share_of_gap(curve: Frontier, low: Frontier, high: Frontier) -> float | None:
    """How much of the way from `low` to `high` a curve goes, in mean score over low's range.

    0 is no better than sending examples to exits at random, 1 the oracle; None where the two bounds
    are one.
    """
    start, end = float(low.cost[0]), float(low.cost[-1])
    bottom, top = low.mean(start, end), high.mean(start, end)
    return (curve.mean(start, end) - bottom) / (top - bottom) if top > bottom else None


def best_thresholds(
    outputs: ExitOutputs, replica: int, scores: np.ndarray
) -> tuple[Frontier, np.ndarray]:
    """Accuracy with a threshold for each exit, fitted on the very rows reported: not to be had.

    For 25 slopes of accuracy against cost, accuracy - slope x cost is raised one exit's threshold
    at a time, each step exact in O(N) once the scores are sorted, until none helps; begun where one
    threshold for all is best. A local optimum: the true bound can lie higher.

    Args:
      outputs: of the rows reported.
      replica: which.
      scores: float [E, N], of a policy.

    Returns:
      The frontier, and the thresholds of its points, float64 [P, E - 1].

    """
    right = (outputs.predictions[replica] == outputs.labels[replica]).astype(np.float64)  # [E, N]
    orders = np.argsort(-scores[:-1], axis=1, kind="stable")  # [E - 1, N]
    levels = np.take_along_axis(scores[:-1], orders, axis=1)
    points = np.maximum.accumulate(scores[:-1], axis=0)
    points = points[np.isfinite(points)]
    begin = np.quantile(points, np.linspace(0, 1, 50)).tolist() if len(points) else []
    starts = [np.full(len(orders), t) for t in (*begin, np.inf)]
    places = [_exits(scores, limits) for limits in starts]
    score_of = np.asarray([np.take_along_axis(right, p[None], axis=0).mean() for p in places])
    cost_of = np.asarray([outputs.cost[p].mean() for p in places])
    found = []
    for slope in np.geomspace(1e-3, 3, _SLOPES):
        value = right - slope * outputs.cost[:, None]  # [E, N]
        limits = starts[int((score_of - slope * cost_of).argmax())]
        found.append(_ascend(scores, orders, levels, limits, value))
    taken = np.stack([_exits(scores, limits) for limits in found])  # [P, N]
    cost = outputs.cost[taken].mean(axis=1)
    values = np.take_along_axis(right[None], taken[:, None], axis=1)[:, 0].mean(axis=1)
    order = np.lexsort((values, cost))
    best = np.maximum.accumulate(values[order]) == values[order]
    order = order[best]
    return Frontier(cost[order], values[order]), np.stack(found)[order]


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
            best = int(np.where(whole, sums, -np.inf).argmax())
            limits[e] = levels[e][best - 1] if best else np.inf
    return limits


def _exits(scores: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Where each example leaves, int [N], with a threshold [E - 1] for each exit but the last."""
    return (scores >= np.append(limits, -np.inf)[:, None]).argmax(axis=0)


def _reached(scores: np.ndarray, limits: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.take_along_axis(value, _exits(scores, limits)[None], axis=0)[0]
