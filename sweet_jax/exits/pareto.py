"""Pareto fronts of cost against metric, for thresholds, oracles and single exits.

Shape letters: R replica, E exit, T thresholds, P points of a front, Q levels.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sweet_jax.exits.simulation import Curve

_ROUNDING = 1e-12  # metrics that differ by less are considered equal
_LEVELS = 65  # maximum number of thresholds whose shares are kept
_FIELDS = ("threshold", "cost", "score", "shares", "levels", "left")  # order in exits.json


def _empty() -> np.ndarray:
    return np.zeros(0)


@dataclasses.dataclass(frozen=True, eq=False)
class ParetoFront:
    """Holds Pareto-optimal points: none has a better metric at the same or a lower cost.

    Attributes:
      cost: cost of each point, ascending, float64 [P].
      score: metric of each point, float64 [P]; ascending, except for a hull that spans all costs.
      threshold: threshold of each point, float64 [P], or [P, E - 1] if each exit has its own;
        empty if the points do not correspond to thresholds.
      shares: share of the examples that leave at each exit, float64 [P, E]; empty likewise.
      levels: sample of all thresholds, ascending, float64 [Q]; empty likewise.
      left: shares that leave at each exit at these levels, float64 [Q, E].

    """

    cost: np.ndarray
    score: np.ndarray
    threshold: np.ndarray = dataclasses.field(default_factory=_empty)
    shares: np.ndarray = dataclasses.field(default_factory=_empty)
    levels: np.ndarray = dataclasses.field(default_factory=_empty)
    left: np.ndarray = dataclasses.field(default_factory=_empty)

    @classmethod
    def from_curve(cls, curve: Curve, replica: int) -> "ParetoFront":
        """Returns the Pareto front of one replica's curve."""
        threshold, cost, metric, shares = (
            getattr(curve, name)[replica] for name in ("threshold", "cost", "score", "shares")
        )
        order = np.lexsort((threshold, -metric, cost))
        best = np.fmax.accumulate(np.append(-np.inf, metric[order]))  # a NaN is no point
        keep = order[metric[order] > best[:-1] + _ROUNDING]
        some = np.unique(np.linspace(0, len(threshold) - 1, _LEVELS).round().astype(int))
        points = (cost[keep], metric[keep], threshold[keep], shares[keep])
        return cls(*points, threshold[some], shares[some])

    @classmethod
    def upper_hull(cls, points: Iterable[tuple[float, float]]) -> "ParetoFront":
        """Returns the corners of the upper hull of points (cost, metric).

        It spans all costs, so that its metric may fall at the end. Mixing the points reaches it.
        """
        hull: list[tuple[float, float]] = []
        for point in sorted(points):
            if hull and point[0] - hull[-1][0] < 1e-12:  # same cost up to rounding
                if point[1] <= hull[-1][1]:
                    continue
                hull.pop()
            # A point below the line between its neighbors is not a corner.
            while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        cost, metric = np.asarray(hull).T
        return cls(cost, metric)

    def leaving(self, threshold: float) -> list[float]:
        """Returns the share of the examples reaching each exit that leave there: E numbers.

        See `shares_at`.
        """
        shares = self.shares_at(threshold)
        arriving = 1 - np.append(0, np.cumsum(shares)[:-1])
        return (shares / np.maximum(arriving, 1e-12)).tolist()

    def shares_at(self, threshold: float) -> np.ndarray:
        """Returns the share of all examples that leave at each exit, float64 [E].

        The share is read at the smallest level that is not below the threshold.
        """
        return self.left[min(int(np.searchsorted(self.levels, threshold)), len(self.left) - 1)]

    def as_dict(self) -> dict[str, list]:
        """Returns the entries of exits.json; `from_dict` restores the front exactly."""
        return {name: getattr(self, name).tolist() for name in _FIELDS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ParetoFront":
        """Restores a front from the result of `as_dict`."""
        arrays = {name: np.asarray(values[name]) for name in _FIELDS}
        shares, left = arrays["shares"], arrays["left"]
        # A front without points, as of a model that diverged, has an empty list without E.
        return cls(**arrays | {"shares": shares.reshape(-1, *left.shape[1:])})


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


def mean_metric(cost: np.ndarray, metric: np.ndarray, low: float, high: float) -> float:
    """Computes the mean of a metric over a range of cost.

    The metric, float64 [T], is interpolated linearly between costs, ascending float64 [T], and held
    constant beyond them.
    """
    inside = cost[(cost > low) & (cost < high)]
    x = np.concatenate([[low], inside, [high]])
    y = np.interp(x, cost, metric)
    return float(np.trapezoid(y, x) / (high - low)) if high > low else float(y[-1])
