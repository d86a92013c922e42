"""The shift of a distribution of confidences against the calibration rows.

Shape letters: E exit, N examples, Q levels, B bins.
"""

import math
from typing import NamedTuple

import numpy as np

from sweet_jax.exits.pareto import ParetoFront

_BINS = 10


class Histogram(NamedTuple):
    """Holds shares of the calibration rows in bins of about equal counts.

    Attributes:
      edges: float64 [B - 1], ascending; a value equal to an edge is in the bin above it.
      shares: float64 [B].

    """

    edges: np.ndarray
    shares: np.ndarray

    def count_in_bins(self, values: np.ndarray) -> np.ndarray:
        """Counts values [N] in each bin, int64 [B]."""
        return np.bincount(
            np.searchsorted(self.edges, values, side="right"), minlength=len(self.shares)
        )


def calibration_histograms(front: ParetoFront) -> list[Histogram]:
    """Returns the histogram of each early exit's largest confidence so far, E - 1 of them.

    That is what decides whether an example has left by then. Its distribution on the calibration
    rows stands in a saved model: the shares that leave at some of all thresholds.
    """
    found = []
    for reached in np.cumsum(front.left[:, :-1], axis=1).T:  # [Q], P(confidence >= level)
        targets = 1 - np.arange(1, _BINS) / _BINS
        near = np.unique(np.abs(reached - targets[:, None]).argmin(axis=1))
        chance = reached[near]
        # Of equal confidences quantiles coincide; a bin without rows says nothing.
        use = np.append(chance[:-1] > chance[1:], True) & (chance > 0) & (chance < 1)
        shares = -np.diff(np.concatenate([[1.0], chance[use], [0.0]]))
        found.append(Histogram(front.levels[near][use], shares))
    return found


def population_stability_index(expected: np.ndarray, counts: np.ndarray) -> float:
    """Computes sum((p - q) log(p / q)) of expected shares q [B] and observed counts [B].

    Half a count more in each bin, so that none is empty (Siddiqi 2006, "Credit Risk Scorecards",
    which calls up to 0.1 no change, above 0.25 a large one). NaN of no observations.
    """
    if not counts.sum():
        return math.nan
    observed = (counts + 0.5) / (counts.sum() + 0.5 * len(counts))
    floor = np.maximum(expected, 1e-4)
    return float(((observed - floor) * np.log(observed / floor)).sum())


def two_sample_p_value(expected: np.ndarray, rows: int, counts: np.ndarray) -> float:
    """Computes the p-value of the chi-square test that two samples have one distribution.

    It is valid for one look at a time fixed beforehand, and not for many. NaN where a sample is
    empty or there is one bin.

    Args:
      expected: shares [B] of the first sample.
      rows: how many the first sample has.
      counts: of the second sample [B].

    """
    first, second, n = expected * rows, counts, float(counts.sum())
    both = first + second
    use = both > 0
    if not rows or not n or use.sum() < 2:
        return math.nan
    # Pearson's statistic of a 2 x B table of counts.
    a, b = math.sqrt(n / rows), math.sqrt(rows / n)
    statistic = ((a * first - b * second)[use] ** 2 / both[use]).sum()
    return _chi_square_tail(float(statistic), int(use.sum()) - 1)


def _chi_square_tail(statistic: float, freedom: int) -> float:
    """Computes P(X >= statistic) of chi-square by the recurrence in degrees of freedom.

    Abramowitz and Stegun 1964, 26.4.4 and 26.4.5. A served model needs no SciPy.
    """
    half = statistic / 2
    if freedom % 2:
        tail, start = math.erfc(math.sqrt(half)), 0.5
    else:
        tail, start = math.exp(-half), 1.0
    for step in range((freedom - 1) // 2):
        power = (start + step) * math.log(half) if half else -math.inf
        tail += math.exp(power - half - math.lgamma(start + step + 1))
    return min(tail, 1.0)
