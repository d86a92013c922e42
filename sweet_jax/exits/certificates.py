"""Certified thresholds: upper bounds on the accuracy lost against the full model.

Shape letters: E exit, N examples, K candidates.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.targets import DEFAULT_LEVEL

CERTIFICATE_KINDS = ("risk", "agreement")
NEVER = float(np.finfo(np.float64).max)  # threshold that no confidence reaches, valid in JSON
LARGEST = float(np.nextafter(NEVER, 0))  # largest confidence, which replaces +inf


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Holds a certified threshold and the test that it passed.

    Attributes:
      kind: "risk" or "agreement"; see `exit_losses`.
      limit: requested maximum share of harmed examples.
      level: confidence level of the certificate, 1 - alpha.
      threshold: the certified threshold; None if no candidate was certified.
      bound: upper confidence bound on the share of harmed examples at the threshold. If no
        candidate was certified, the bound at the strictest candidate: the smallest limit that could
        have been certified.
      harmed, rows: number of harmed and of tested examples. If examples are harmed to a degree from
        0 to 1, `harmed` is the sum of these degrees.

    """

    kind: str
    limit: float
    level: float
    threshold: float | None
    bound: float
    harmed: float
    rows: int


def exit_losses(outputs: ExitOutputs, replica: int, kind: str) -> np.ndarray:
    """Returns whether leaving at an exit harms an example, bool [E, N].

    For kind "risk", an example is harmed if the last exit is right and this one is not. The share
    of harmed examples bounds the accuracy lost against the full model from above, since answers
    that early exits correct are not counted. For "agreement", an example is harmed if the
    prediction differs from the last exit's; labels are not read.

    For metrics that give credit, returns the degree of harm instead, float from 0 to 1: the credit
    lost against the last exit, or the part of the prediction that differs from the last exit's.

    Raises ValueError for another kind.
    """
    predictions, labels = outputs.predictions[replica], outputs.labels[replica]
    if kind == "risk":
        right = outputs.credit(predictions, labels)
        partial = right.dtype != bool
        return np.maximum(right[-1] - right, 0) if partial else right[-1] & ~right
    if kind == "agreement":
        same = outputs.credit(predictions, predictions[-1])
        return ~same if same.dtype == bool else 1 - same
    raise ValueError(f"kind must be one of {', '.join(CERTIFICATE_KINDS)}; got {kind!r}")


def candidate_thresholds(confidences: np.ndarray) -> np.ndarray:
    """Returns thresholds to test, strictest first, float64 [K].

    At most 101 thresholds, spaced evenly among the sorted confidences at which examples leave.

    Args:
      confidences: confidences of rows other than those to be tested, float64 [E, N].

    """
    levels = np.maximum.accumulate(confidences[:-1], axis=0).ravel()
    levels = np.sort(levels[np.isfinite(levels)])[::-1]
    places = np.linspace(0, len(levels) - 1, 101).round().astype(int)
    return np.unique(levels[places])[::-1] if len(levels) else levels


@dataclasses.dataclass(frozen=True, eq=False)
class LossCounts:
    """Holds the counts from which certificates for any limit and level are computed.

    Attributes:
      kind: "risk" or "agreement"; see `exit_losses`.
      thresholds: candidate thresholds, strictest first, float64 [K].
      harmed: number of examples harmed at each candidate, int64 [K], or the sum of their degrees of
        harm, float64 [K].
      rows: number of examples tested.

    """

    kind: str
    thresholds: np.ndarray
    harmed: np.ndarray
    rows: int

    def kept_at(self, threshold: float, level: float = DEFAULT_LEVEL, compared: int = 1) -> float:
        """Computes a lower confidence bound on the share of examples not harmed at a threshold.

        The bound is computed at the same candidate as in `share_kept`, see `candidate_bounds`. It
        is 1 if no example leaves early.
        """
        at = self._candidate(threshold)
        return 1.0 if at is None else float(1 - candidate_bounds(self, level, compared)[at])

    def share_kept(self, threshold: float) -> float:
        """Returns the share of examples not harmed at a threshold.

        It is computed at the strictest candidate that is no stricter than the threshold, at which
        at least as many examples leave early, or at the least strict candidate if all are stricter.
        It is 1 if no example leaves early.
        """
        at = self._candidate(threshold)
        return 1.0 if at is None else float(1 - self.harmed[at] / self.rows)

    def _candidate(self, threshold: float) -> int | None:
        if not len(self.thresholds) or threshold > NEVER:
            return None
        return min(int((self.thresholds > threshold).sum()), len(self.thresholds) - 1)

    def as_dict(self) -> dict[str, Any]:
        """Returns the entries of exits.json; `from_dict` restores the counts exactly."""
        lists = {"thresholds": self.thresholds.tolist(), "harmed": self.harmed.tolist()}
        return {"kind": self.kind, **lists, "rows": self.rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LossCounts":
        """Restores counts from the result of `as_dict`."""
        thresholds = np.asarray(values["thresholds"], np.float64)
        harmed = np.asarray(values["harmed"])
        harmed = harmed.astype(np.float64 if harmed.dtype.kind == "f" else np.int64)
        return cls(str(values["kind"]), thresholds, harmed, int(values["rows"]))


def count_losses(
    outputs: ExitOutputs, replica: int, confidences: np.ndarray, thresholds: np.ndarray, kind: str
) -> LossCounts:
    """Counts the examples of one replica that each threshold harms, see `exit_losses`.

    Args:
      outputs: outputs of rows on which neither confidences nor thresholds were fitted.
      replica: index of the replica.
      confidences: confidences of these rows, float64 [E, N].
      thresholds: candidate thresholds, descending, float64 [K].
      kind: "risk" or "agreement".

    """
    harmful = exit_losses(outputs, replica, kind)  # [E, N]
    points = np.maximum.accumulate(confidences[:-1], axis=0)  # [E - 1, N]
    harmed = [
        np.take_along_axis(harmful, (points < t).sum(axis=0)[None], axis=0).sum()
        for t in thresholds
    ]
    dtype = np.int64 if harmful.dtype == bool else np.float64
    return LossCounts(kind, thresholds, np.asarray(harmed, dtype), confidences.shape[1])


def certify(
    counts: LossCounts, limit: float, level: float = DEFAULT_LEVEL, compared: int = 1
) -> Certificate:
    """Certifies the least strict threshold that harms at most `limit`, at confidence `level`.

    This is Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052) with fixed-sequence
    testing: starting from the strictest, each threshold is tested at alpha = 1 - level, and the
    first that fails ends the test. The probability of certifying a threshold that exceeds the limit
    is therefore at most alpha. A threshold passes if its bound is at most the limit, see
    `candidate_bounds`.
    """
    settings = (counts.kind, limit, level)
    if not len(counts.thresholds):  # no example leaves early, so none can be harmed
        return Certificate(*settings, NEVER, 0.0, 0, counts.rows)
    bounds = candidate_bounds(counts, level, compared)
    passed = int(np.searchsorted(sequential_limits(bounds), limit, side="right"))
    at = max(passed - 1, 0)
    threshold = float(counts.thresholds[at]) if passed else None
    return Certificate(
        *settings, threshold, float(bounds[at]), counts.harmed[at].item(), counts.rows
    )


def candidate_bounds(
    counts: LossCounts, level: float = DEFAULT_LEVEL, compared: int = 1
) -> np.ndarray:
    """Computes an upper confidence bound on the share that each candidate harms, float64 [K].

    The bound is the exact binomial one, see `upper_bound`. If these rows also chose the model among
    `compared` models, the test uses alpha / compared (Bonferroni), since a model that was chosen by
    luck would exceed its limit more often.

    For degrees of harm, the bound is the binomial one at alpha / e for the sum rounded up. This
    follows from Bentkus' inequality (2004): e times the binomial probability bounds the tail of the
    sum (as used by Bates et al. 2021, arXiv 2101.02703).
    """
    alpha = (1 - level) / compared
    if counts.harmed.dtype.kind == "f":
        sums = np.ceil(counts.harmed - 1e-9).astype(np.int64)  # 1e-9: rounding errors of the sums
        return upper_bound(sums, counts.rows, 1 - alpha / np.e)
    return upper_bound(counts.harmed, counts.rows, 1 - alpha)


def sequential_limits(bounds: np.ndarray) -> np.ndarray:
    """Computes the smallest limit at which each candidate is certified, float64 [K], ascending.

    It is the maximum over the bounds of this and all stricter candidates, since the first candidate
    that fails ends the test.
    """
    return np.maximum.accumulate(bounds)


def upper_bound(hits: np.ndarray | int, total: int, level: float) -> np.ndarray:
    """Computes the upper end of Clopper & Pearson's (1934) one-sided interval for hits / total.

    It uses the closed form, whereas `scipy.stats.binomtest` searches. Raises UserError if SciPy is
    not installed.
    """
    try:
        from scipy import stats  # imported here because only certified targets need it
    except ImportError as error:
        message = "certified targets (risk, agreement) need SciPy: pip install scipy"
        raise UserError(message) from error

    hits = np.asarray(hits)
    bound = stats.beta.ppf(level, hits + 1, np.maximum(total - hits, 1))
    return np.where(hits < total, bound, 1.0)
