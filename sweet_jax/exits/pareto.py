"""The thresholds worth having of a curve, and the search among them.

Shape letters: E exit, P points of a frontier, Q levels.
"""

import dataclasses

import numpy as np

from sweet_jax.exits.simulation import Curve

_LEVELS = 65  # of a trade, at most


@dataclasses.dataclass(frozen=True, eq=False)
class ParetoFront:
    """The thresholds worth having: each the cheapest with its score, and the best at its cost.

    Attributes:
      threshold, cost, score: float64 [P]; cost and score ascend.
      shares: float64 [P, E], of the examples that leave at each exit.
      levels: float64 [Q], some of all thresholds, ascending.
      left: float64 [Q, E], the shares at these.

    """

    threshold: np.ndarray
    cost: np.ndarray
    score: np.ndarray
    shares: np.ndarray
    levels: np.ndarray
    left: np.ndarray

    @classmethod
    def of(cls, curve: Curve, replica: int) -> "ParetoFront":
        """Those of a curve."""
        threshold, cost, value, shares = (
            getattr(curve, name)[replica] for name in ("threshold", "cost", "score", "shares")
        )
        order = np.lexsort((threshold, -value, cost))
        best = np.maximum.accumulate(np.append(-np.inf, value[order]))
        keep = order[value[order] > best[:-1]]
        some = np.unique(np.linspace(0, len(threshold) - 1, _LEVELS).round().astype(int))
        kept = (threshold[keep], cost[keep], value[keep], shares[keep])
        return cls(*kept, threshold[some], shares[some])

    def within_cost(self, cost: float) -> float | None:
        """The threshold of the best score within a mean cost; None where none is so cheap."""
        at = int(np.searchsorted(self.cost, cost + 1e-12, side="right")) - 1
        return float(self.threshold[at]) if at >= 0 else None

    def within_time(self, milliseconds: float, clock: np.ndarray) -> float | None:
        """The threshold of the best score within a mean time; None where none is so quick.

        clock is float64 [E], the milliseconds until each exit has answered.
        """
        quick = np.flatnonzero(self.shares @ clock <= milliseconds)
        return float(self.threshold[quick[-1]]) if len(quick) else None

    def leaving(self, threshold: float) -> list[float]:
        """Of the examples that come to each exit, the share that leaves there: E numbers.

        At the nearest of the levels that is not below.
        """
        shares = self.left[min(int(np.searchsorted(self.levels, threshold)), len(self.left) - 1)]
        coming = 1 - np.append(0, np.cumsum(shares)[:-1])
        return (shares / np.maximum(coming, 1e-12)).tolist()

    def with_score(self, score: float) -> float | None:
        """The cheapest threshold with at least a score; None where none has it."""
        at = int(np.searchsorted(self.score, score - 1e-12))
        return float(self.threshold[at]) if at < len(self.score) else None
