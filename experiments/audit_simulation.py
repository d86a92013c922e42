"""Simulates the audit of a server on streams of requests drawn from rows with known outputs.

Shape letters: N rows, E exit.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.sequential import MeanTest, ShiftTest
from sweet_jax.inference.classifier import AdaptiveClassifier

BEFORE = 2000  # requests before a shift
_AFTER = 100_000  # maximum number of requests after a shift
_GROWTH = 20_000  # requests over which a gradual shift grows from none to all of them
DAY, SHARE, DAYS = 50_000, 0.02, 200  # requests of a day, share of audited ones, number of days
REPEATS = 40  # streams for the agreement alarm
SHIFT_REPEATS = 10  # streams for the shift alarm
_LEVEL = 0.975  # of each of the two tests, as in the server

# From a generator and a number to whether so many audited answers are the full model's, bool.
DrawAgreement = Callable[[np.random.Generator, int], np.ndarray]


class Rows(NamedTuple):
    """Holds the behaviour of a deployed model on some rows.

    Attributes:
      agrees: whether the answer is the full model's, bool [N].
      reached: largest confidence up to each exit, float64 [N, E].
      exits: index of the exit taken, int64 [N].
      answers: confidence at the exit taken, float64 [N].

    """

    agrees: np.ndarray
    reached: np.ndarray
    exits: np.ndarray
    answers: np.ndarray


def serve_rows(classifier: AdaptiveClassifier, outputs: ExitOutputs) -> Rows:
    """Returns the behaviour of a classifier on rows, given the outputs of all exits, R = 1."""
    confidences = exit_confidences(outputs, classifier.policy, [classifier.calibrator])[0]  # [E, N]
    leaves = confidences >= classifier.threshold
    leaves[-1] = True
    exits = leaves.argmax(axis=0)
    predictions, rows = outputs.predictions[0], np.arange(len(exits))
    agrees = predictions[exits, rows] == predictions[-1]
    reached = np.maximum.accumulate(confidences, axis=0).T
    return Rows(agrees, reached, exits, confidences[exits, rows])


def run_test(test: MeanTest, values: np.ndarray) -> tuple[MeanTest, int | None]:
    """Returns a test after values [N], and the number of values until it rejected, or None."""
    for number, value in enumerate(values, start=1):
        test = test.observe(float(value))
        if test.rejected:
            return test, number
    return test, None


def agreement_delays(
    before: Rows, draw_after: DrawAgreement, target: float, share: float
) -> Iterator[float]:
    """Yields for each stream the number of requests from a shift to the agreement alarm.

    The number is infinite without an alarm, and -1 for an alarm before the shift.

    Args:
      before: rows before the shift.
      draw_after: draws audited requests after the shift.
      target: agreement to test.
      share: share of requests that are audited.

    """
    for seed in range(REPEATS):
        rng = np.random.default_rng(seed)
        usual = rng.choice(before.agrees, int(BEFORE * share))
        test, early = run_test(MeanTest(target, _LEVEL), usual)
        _, late = run_test(test, draw_after(rng, int(_AFTER * share)))
        yield -1.0 if early else np.inf if late is None else late / share


def draw_agreement(usual: Rows, shifted: Rows, share: float, *, gradual: bool) -> DrawAgreement:
    """Returns a function that draws audited requests after a shift.

    gradual: whether the share of shifted rows grows from none to all; else all are shifted.
    """

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        part = np.minimum(np.arange(count) / share / _GROWTH, 1) if gradual else np.ones(count)
        others, own = rng.choice(usual.agrees, count), rng.choice(shifted.agrees, count)
        return np.where(rng.random(count) < part, own, others)

    return draw


def shift_delays(before: Rows, after: Rows, *, gradual: bool) -> Iterator[float]:
    """Yields for each stream the number of requests from a shift to the shift alarm.

    The number is infinite without an alarm, and negative for an alarm before the shift.
    """
    for seed in range(SHIFT_REPEATS):
        rng, test = np.random.default_rng(seed), ShiftTest(_LEVEL)
        count = BEFORE + _GROWTH
        part = (np.arange(count) - BEFORE) / _GROWTH if gradual else np.arange(count) >= BEFORE
        is_shifted = rng.random(count) < part
        usual, own = (rng.choice(rows.answers, count) for rows in (before, after))
        delay = np.inf
        for number, value in enumerate(np.where(is_shifted, own, usual)):
            test = test.observe(float(value), rng.random())
            if test.rejected:
                delay = number - BEFORE
                break
        yield delay


def summarize_delays(delays: Iterator[float]) -> dict[str, Any]:
    """Returns the numbers of alarms after and before the shift, and quantiles of the delay.

    The 5%, 50% and 95% quantiles are None if they are infinite.
    """
    values = np.asarray(list(delays))
    quantiles = np.quantile(values, [0.05, 0.5, 0.95], method="higher")
    early = int((values < 0).sum())
    return {
        "raised": int(np.isfinite(values).sum()) - early,
        "before": early,
        "repeats": len(values),
        "quantiles": [float(q) if np.isfinite(q) else None for q in quantiles],
    }


def count_false_shifts(rows: Rows) -> int:
    """Returns how many of DAYS servers raise a shift alarm in 2,000 requests without a shift."""
    alarms = 0
    for seed in range(DAYS):
        rng, test = np.random.default_rng(seed), ShiftTest(_LEVEL)
        for value in rng.choice(rows.answers, 2000):
            test = test.observe(float(value), rng.random())
        alarms += test.rejected
    return alarms


def count_false_alarms(
    agrees: np.ndarray, target: float, days: int, servers: int
) -> dict[str, int]:
    """Returns the numbers of servers that raise a false alarm in some days without a restart.

    "betting" is the audit's test after every audited text, "hourly" an exact binomial test at 5% of
    all audited texts so far, every hour.
    """
    size = int(DAY * SHARE)
    betting = hourly = 0
    for seed in range(servers):
        values = np.random.default_rng(seed).choice(agrees, days * size)
        betting += run_test(MeanTest(target, _LEVEL), values)[1] is not None
        counts = np.arange(1, 24 * days + 1) * size // 24
        agreeing = np.cumsum(values)[counts - 1]
        hourly += bool((stats.binom.cdf(agreeing, counts, target) <= 0.05).any())
    return {"servers": servers, "days": days, "betting": betting, "hourly": hourly}
