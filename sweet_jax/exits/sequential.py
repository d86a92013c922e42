"""Anytime-valid tests by betting: tests of a mean, its confidence sequence, and tests of a shift.

Values arrive one at a time. No matter how often one looks at the results or when one stops, the
probability of an error is at most 1 - level: the capital of a bettor who bets against a true
hypothesis is a nonnegative supermartingale, which ever reaches 1 / (1 - level) with at most that
probability (Ville's inequality).

Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B
86(1), doi 10.1093/jrsssb/qkad009, sections 4 (capital processes, theorem 3) and B.3 (bets).

Shape letters: M candidate means, K starts of the test, B bins.
"""

import dataclasses
import math
from typing import Any

import numpy as np

_CANDIDATES = np.arange(1, 1000) / 1000  # [M]
_BOUNDED = 0.5  # maximum share of the capital that a bet may lose, c in the paper


def _zeros() -> np.ndarray:
    return np.zeros(len(_CANDIDATES))


@dataclasses.dataclass(frozen=True, eq=False)
class ConfidenceSequence:
    """Holds the capital of bets against each candidate mean, which bound the mean at any time.

    This is the hedged capital process with predictable plug-in bets (section 4, theorem 3). Half of
    the capital bets that the mean is above a candidate, and half that it is below. A candidate is
    ruled out once either half reaches 2 / (1 - level). The bounds hold while the mean of the values
    does not change: after a change they bound neither the old mean nor that of all values.

    Attributes:
      level: confidence level.
      count, total: number and sum of the values so far.
      spread: 0.25 plus the sum of squared distances from the running mean.
      above, below: logarithm of the capital of each half, float64 [M].

    """

    level: float = 0.95
    count: int = 0
    total: float = 0.0
    spread: float = 0.25
    above: np.ndarray = dataclasses.field(default_factory=_zeros)
    below: np.ndarray = dataclasses.field(default_factory=_zeros)

    def observe(self, value: float) -> "ConfidenceSequence":
        """Returns the state after one more value, from 0 to 1."""
        t = self.count + 1
        variance = self.spread / t
        bet = math.sqrt(2 * math.log(2 / (1 - self.level)) / (variance * t * math.log1p(t)))
        gain = value - _CANDIDATES  # [M]
        up = np.minimum(bet, _BOUNDED / _CANDIDATES)
        down = np.minimum(bet, _BOUNDED / (1 - _CANDIDATES))
        mean = (0.5 + self.total + value) / (t + 1)
        return dataclasses.replace(
            self,
            count=t,
            total=self.total + value,
            spread=self.spread + (value - mean) ** 2,
            above=self.above + np.log1p(up * gain),
            below=self.below + np.log1p(-down * gain),
        )

    @property
    def mean(self) -> float:
        """Returns the mean of the values so far, NaN if there are none."""
        return self.total / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Returns the bounds of the mean, rounded outward to the next candidate.

        NaN if the mean has changed, so that no candidate, or not the mean so far, explains all
        values.

        The capital that bets on a mean above a candidate grows as the candidate decreases, so it
        rules out all candidates up to some value. Likewise, the other half rules out all candidates
        from some value on.
        """
        limit = math.log(2 / (1 - self.level))
        low = _CANDIDATES[self.above >= limit].max(initial=0.0)
        high = _CANDIDATES[self.below >= limit].min(initial=1.0)
        if low >= high or self.mean < low or self.mean > high:
            return math.nan, math.nan
        return float(low), float(high)


@dataclasses.dataclass(frozen=True, eq=False)
class MeanTest:
    """Holds a test of whether a mean is still at least `null`, which may be read after every value.

    Each bettor bets that the mean is below `null`, with a stake that depends on the values it has
    seen (approximate GRAPA, section B.3), and bets nothing while their mean is not below `null`. To
    detect late changes quickly, another bettor starts after every `every` values. Start k gets
    1 / ((k + 1)(k + 2)) of the capital; these shares sum to one, and a mixture of supermartingales
    is a supermartingale. The shares of later starts are held in reserve. To keep the state small,
    all starts but the first and the last 64 are dropped, together with their capital.

    Attributes:
      null: the mean to be maintained.
      level: lower bound on the probability that the test never rejects while the mean is at least
        `null`.
      every: number of values between two starts.
      seen: number of values so far.
      start: index of each start, from 0, int64 [K].
      count: number of values since each start, float64 [K].
      total, spread: sum of the values since each start, and of their squared distances from the
        running mean, float64 [K]. Both include one prior value with mean `null`.
      log_capital: logarithm of the capital that a unit of each start has become, float64 [K].
      largest: largest total capital so far.

    """

    null: float
    level: float = 0.95
    every: int = 25
    seen: int = 0
    start: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    count: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    total: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    spread: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    log_capital: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    largest: float = 1.0

    @property
    def rejected(self) -> bool:
        """Returns whether the test has found that the mean fell below `null`."""
        return self.largest >= 1 / (1 - self.level)

    def observe(self, value: float) -> "MeanTest":
        """Returns the state after one more value, from 0 to 1."""
        test = self._with_start() if self.seen % self.every == 0 else self
        null, count = test.null, test.count + 1
        estimate = test.total / count  # [K], before this value
        below = np.maximum(null - estimate, 0)
        bet = below / (test.spread / count + below**2 + 1e-12)
        bet = np.minimum(bet, _BOUNDED / max(1 - null, 1e-12))
        log_capital = test.log_capital + np.log1p(bet * (null - value))
        total = test.total + value
        weights = 1 / ((test.start + 1.0) * (test.start + 2.0))  # [K]
        waiting = 1 / (test.start[-1] + 2.0)
        capital = float(weights @ np.exp(np.minimum(log_capital, 600))) + waiting
        return dataclasses.replace(
            test,
            seen=test.seen + 1,
            count=count,
            total=total,
            spread=test.spread + (value - total / (count + 1)) ** 2,
            log_capital=log_capital,
            largest=max(test.largest, capital),
        )

    def _with_start(self) -> "MeanTest":
        number = int(self.start[-1]) + 1 if len(self.start) else 0
        first: dict[str, float] = {
            "start": number,
            "count": 0.0,
            "total": self.null,
            "spread": self.null * (1 - self.null),
            "log_capital": 0.0,
        }
        keep = np.arange(len(self.start)) if len(self.start) < 65 else np.r_[0, 2:65]
        fields: dict[str, Any] = {
            k: np.append(getattr(self, k)[keep], [v]) for k, v in first.items()
        }
        return dataclasses.replace(self, **fields)


_BINS, _JUMP = 1000, 0.01
_COMPARED = 100  # number of values to observe before the first bet
_SLOPES = np.asarray([-1.0, 0.0, 1.0])


@dataclasses.dataclass(frozen=True, eq=False)
class ShiftTest:
    """Holds a test of whether values are exchangeable, which may be read after every value.

    This is a conformal test martingale. If the values are exchangeable, the rank of each value
    among all so far, with ties broken at random, is uniform and independent of the other ranks
    (Vovk, Nouretdinov and Gammerman 2003, "Testing exchangeability on-line"). The simple jumper
    bets that ranks stay low, or high, for some time (Vovk et al. 2021, "Retrain or not retrain:
    conformal test martingales for change-point detection", PMLR 152, algorithm 1).

    Attributes:
      level: 1 minus the maximum probability that the test ever rejects exchangeable values.
      counts: number of values so far in each bin, int64 [B].
      capital: capital of each bet, float64 [3].
      largest: largest total capital so far.

    """

    level: float = 0.95
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(_BINS, np.int64))
    capital: np.ndarray = dataclasses.field(default_factory=lambda: np.full(3, 1 / 3))
    largest: float = 1.0

    @property
    def rejected(self) -> bool:
        """Returns whether the test has found a shift of the values."""
        return self.largest >= 1 / (1 - self.level)

    def observe(self, value: float, draw: float) -> "ShiftTest":
        """Returns the state after one more value, any number; `draw`, uniform, breaks its ties."""
        place, counts = _bin(value), self.counts.copy()
        counts[place] += 1
        rank = (counts[place + 1 :].sum() + draw * counts[place]) / counts.sum()
        if counts.sum() <= _COMPARED:
            return dataclasses.replace(self, counts=counts)
        capital = (1 - _JUMP) * self.capital + _JUMP / 3 * self.capital.sum()
        capital = capital * (1 + _SLOPES * (rank - 0.5))
        # The cap only prevents overflow: the test has rejected long before.
        capital = capital / max(1.0, capital.sum() / 1e12)
        largest = max(self.largest, float(capital.sum()))
        return dataclasses.replace(self, counts=counts, capital=capital, largest=largest)


def _bin(value: float) -> int:
    """Returns the bin of a value, 0 to B - 1, which increases with the value.

    Below 1, bins are equally wide in -log(1 - value), so that they are fine near 1, where most
    confidences lie. An eighth of all bins is for values of 1 and above.
    """
    if math.isnan(value) or value <= 0:
        return 0
    fine = _BINS * 7 // 8
    if value < 1:
        return min(int(fine * -math.log(1 - value) / 16), fine - 1)
    return fine + min(int((_BINS - fine) * (1 - 1 / value)), _BINS - fine - 1)
