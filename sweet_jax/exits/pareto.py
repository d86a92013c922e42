"""Pareto fronts of cost against metric: of thresholds, of oracles, and of the single exits.

Shape letters: R replica, E exit, T thresholds, P points of a front, Q levels.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sweet_jax.exits.simulation import Curve

_ROUNDING = 1e-12  # of a metric: what is larger by less is the same
_LEVELS = 65  # at most, of the thresholds whose shares are kept
_FIELDS = ("threshold", "cost", "score", "shares", "levels", "left")  # order in exits.json


def _empty() -> np.ndarray:
    return np.zeros(0)


@dataclasses.dataclass(frozen=True, eq=False)
class ParetoFront:
    """Holds the Pareto-optimal points: each the cheapest with its metric, the best at its cost.

    Attributes:
      cost: float64 [P], ascending.
      score: float64 [P], the metric; ascending too, except where a hull spans all costs.
      threshold: float64 [P], or [P, E - 1] where each exit has its own; empty where the points are
        not those of thresholds.
      shares: float64 [P, E], of the examples that leave at each exit; empty likewise.
      levels: float64 [Q], some of all thresholds, ascending; empty likewise.
      left: float64 [Q, E], the shares at these.

    """

    cost: np.ndarray
    score: np.ndarray
    threshold: np.ndarray = dataclasses.field(default_factory=_empty)
    shares: np.ndarray = dataclasses.field(default_factory=_empty)
    levels: np.ndarray = dataclasses.field(default_factory=_empty)
    left: np.ndarray = dataclasses.field(default_factory=_empty)

    @classmethod
    def from_curve(cls, curve: Curve, replica: int) -> "ParetoFront":
        """Returns the front of one replica's curve."""
        threshold, cost, metric, shares = (
            getattr(curve, name)[replica] for name in ("threshold", "cost", "score", "shares")
        )
        order = np.lexsort((threshold, -metric, cost))
        best = np.maximum.accumulate(np.append(-np.inf, metric[order]))
        keep = order[metric[order] > best[:-1] + _ROUNDING]
        some = np.unique(np.linspace(0, len(threshold) - 1, _LEVELS).round().astype(int))
        points = (cost[keep], metric[keep], threshold[keep], shares[keep])
        return cls(*points, threshold[some], shares[some])

    @classmethod
    def upper_hull(cls, points: Iterable[tuple[float, float]]) -> "ParetoFront":
        """Returns the corners of the upper hull of points (cost, metric): what mixing them reaches.

        It spans all costs, so that its metric may fall at the end.
        """
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
        cost, metric = np.asarray(hull).T
        return cls(cost, metric)

    def leaving(self, threshold: float) -> list[float]:
        """Returns the share that leaves at each exit of the examples that reach it: E numbers.

        See `shares_at`.
        """
        shares = self.shares_at(threshold)
        arriving = 1 - np.append(0, np.cumsum(shares)[:-1])
        return (shares / np.maximum(arriving, 1e-12)).tolist()

    def shares_at(self, threshold: float) -> np.ndarray:
        """Returns the shares of all examples that leave at each exit, float64 [E].

        Read at the nearest of the levels that is not below the threshold.
        """
        return self.left[min(int(np.searchsorted(self.levels, threshold)), len(self.left) - 1)]

    def as_dict(self) -> dict[str, list]:
        """Returns what exits.json holds; `from_dict` restores it exactly."""
        return {name: getattr(self, name).tolist() for name in _FIELDS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ParetoFront":
        """Restores what `as_dict` returned."""
        arrays = {name: np.asarray(values[name]) for name in _FIELDS}
        shares, left = arrays["shares"], arrays["left"]
        # Without a point, as of a model that diverged, the list does not say how many exits.
        return cls(**arrays | {"shares": shares.reshape(-1, *left.shape[1:])})


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


def mean_metric(cost: np.ndarray, metric: np.ndarray, low: float, high: float) -> float:
    """Computes the mean of a metric over a range of cost.

    Linear between the points, cost float64 [T] ascending and metric float64 [T]; the last metric
    holds beyond them.
    """
    inside = cost[(cost > low) & (cost < high)]
    x = np.concatenate([[low], inside, [high]])
    y = np.interp(x, cost, metric)
    return float(np.trapezoid(y, x) / (high - low)) if high > low else float(y[-1])
