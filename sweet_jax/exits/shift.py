"""The shift of the distribution of confidences relative to the calibration rows.

Shape letters: E exit, N examples, Q levels, B bins.
"""

import math
from typing import NamedTuple

import numpy as np

from sweet_jax.exits.calibration import Calibrator
from sweet_jax.exits.pareto import ParetoFront
from sweet_jax.exits.resolver import ThresholdResolver, reads_curve

_BINS = 10


class Histogram(NamedTuple):
    """Holds the shares of the calibration rows in bins with about equal counts.

    Attributes:
      edges: edges between bins, ascending, float64 [B - 1]; a value equal to an edge belongs to the
        bin above it.
      shares: share of the rows in each bin, float64 [B].

    """

    edges: np.ndarray
    shares: np.ndarray

    def count_in_bins(self, values: np.ndarray) -> np.ndarray:
        """Counts values [N] in each bin, int64 [B]."""
        return np.bincount(
            np.searchsorted(self.edges, values, side="right"), minlength=len(self.shares)
        )


def comparable_front(
    resolver: ThresholdResolver, policy: str, calibrator: Calibrator
) -> ParetoFront | None:
    """Returns the front of a policy if its confidences may be compared with a calibrator's.

    None if there is none. The confidences of fronts are computed with the calibrator fitted on all
    calibration rows, and those of PCEE with the curves of cross-fitting, with which no text is
    answered. A certified target is served with another calibrator. Then confidences are distributed
    differently even if the texts are not.
    """
    if calibrator is not resolver.calibrator or policy not in resolver.fronts:
        return None
    return None if reads_curve(policy) else resolver.fronts[policy]


def calibration_histograms(front: ParetoFront) -> list[Histogram]:
    """Returns a histogram, for each of the E - 1 early exits, of the largest confidence so far.

    This maximum determines whether an example has left by that exit. Its distribution on the
    calibration rows follows from the saved shares that leave at a sample of thresholds.
    """
    histograms = []
    for reached in np.cumsum(front.left[:, :-1], axis=1).T:  # [Q], P(confidence >= level)
        targets = 1 - np.arange(1, _BINS) / _BINS
        near = np.unique(np.abs(reached - targets[:, None]).argmin(axis=1))
        chance = reached[near]
        # Quantiles coincide if confidences are equal; bins without rows are dropped.
        use = np.append(chance[:-1] > chance[1:], True) & (chance > 0) & (chance < 1)
        shares = -np.diff(np.concatenate([[1.0], chance[use], [0.0]]))
        histograms.append(Histogram(front.levels[near][use], shares))
    return histograms


def population_stability_index(expected: np.ndarray, counts: np.ndarray) -> float:
    """Computes sum((p - q) log(p / q)) from expected shares q [B] and observed counts [B].

    Half a count is added to each bin, so that no observed share p is 0. Siddiqi (2006, "Credit Risk
    Scorecards") considers values up to 0.1 no change and values above 0.25 a large one. NaN if
    there are no observations.
    """
    if not counts.sum():
        return math.nan
    observed = (counts + 0.5) / (counts.sum() + 0.5 * len(counts))
    floor = np.maximum(expected, 1e-4)
    return float(((observed - floor) * np.log(observed / floor)).sum())


def two_sample_p_value(expected: np.ndarray, rows: int, counts: np.ndarray) -> float:
    """Computes the p-value of the chi-square test that two samples have the same distribution.

    It is valid for a single test at a time fixed in advance, not for repeated tests. NaN if a
    sample is empty or if fewer than two bins have values.

    Args:
      expected: shares of the first sample in each bin, [B].
      rows: number of rows of the first sample.
      counts: number of values of the second sample in each bin, [B].

    """
    first, second, n = expected * rows, counts, float(counts.sum())
    both = first + second
    use = both > 0
    if not rows or not n or use.sum() < 2:
        return math.nan
    # Pearson's statistic for a 2 x B table of counts.
    a, b = math.sqrt(n / rows), math.sqrt(rows / n)
    statistic = ((a * first - b * second)[use] ** 2 / both[use]).sum()
    return _chi_square_tail(float(statistic), int(use.sum()) - 1)


def _chi_square_tail(statistic: float, freedom: int) -> float:
    """Computes P(X >= statistic) for a chi-square variable by recurrence over degrees of freedom.

    See Abramowitz and Stegun 1964, 26.4.4 and 26.4.5. This avoids SciPy, which a served model does
    not need.
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
