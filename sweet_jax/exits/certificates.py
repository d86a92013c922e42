"""Certified thresholds: an upper bound of the accuracy lost against the full model.

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
NEVER = float(np.finfo(np.float64).max)  # a threshold that no confidence reaches, valid in JSON
LARGEST = float(np.nextafter(NEVER, 0))  # the largest confidence: what +inf is taken as


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Holds a certified threshold and the test that it passed.

    Attributes:
      kind: "risk" or "agreement"; see `exit_losses`.
      limit: the largest share of harmed examples that was asked for.
      level: 1 - alpha, the confidence level of the certificate.
      threshold: None where no candidate was certified.
      bound: upper confidence bound of the share of harmed examples at the threshold; where none was
        certified, at the strictest candidate: the best that could have been certified.
      harmed, rows: examples harmed, of those tested; the sum of what they are harmed, where that is
        from 0 to 1 for each.

    """

    kind: str
    limit: float
    level: float
    threshold: float | None
    bound: float
    harmed: float
    rows: int

    def as_dict(self) -> dict[str, Any]:
        """Returns what results.json and the report hold."""
        return dataclasses.asdict(self)


def exit_losses(outputs: ExitOutputs, replica: int, kind: str) -> np.ndarray:
    """Returns whether leaving at an exit harms an example, bool [E, N].

    "risk": the last exit is right and this one is not. Their share bounds the accuracy lost against
    the full model from above: what early exits correct is not counted. "agreement": the prediction
    is not the last exit's; no label is read. Where the metric gives credit to a row, how much it is
    harmed, float from 0 to 1: the credit lost against the last exit, or the part of the prediction
    that is not the last exit's. Raises ValueError for another kind.
    """
    given, labels = outputs.predictions[replica], outputs.labels[replica]
    if kind == "risk":
        right = outputs.credit(given, labels)
        partial = right.dtype != bool
        return np.maximum(right[-1] - right, 0) if partial else right[-1] & ~right
    if kind == "agreement":
        same = outputs.credit(given, given[-1])
        return ~same if same.dtype == bool else 1 - same
    raise ValueError(f"kind must be one of {', '.join(CERTIFICATE_KINDS)}; got {kind!r}")


def candidate_thresholds(confidences: np.ndarray) -> np.ndarray:
    """Chooses thresholds to test, the strictest first, float64 [K]: 101, evenly by how many leave.

    confidences: float64 [E, N] of rows that are not those to be tested.
    """
    levels = np.maximum.accumulate(confidences[:-1], axis=0).ravel()
    levels = np.sort(levels[np.isfinite(levels)])[::-1]
    places = np.linspace(0, len(levels) - 1, 101).round().astype(int)
    return np.unique(levels[places])[::-1] if len(levels) else levels


@dataclasses.dataclass(frozen=True, eq=False)
class LossCounts:
    """Holds the counts from which certificates of any limit and level follow.

    Attributes:
      kind: "risk" or "agreement"; see `exit_losses`.
      thresholds: float64 [K], the candidates, the strictest first.
      harmed: int64 [K], examples harmed at each; float64, sums of what each is harmed.
      rows: examples tested.

    """

    kind: str
    thresholds: np.ndarray
    harmed: np.ndarray
    rows: int

    def kept_at(self, threshold: float, level: float = DEFAULT_LEVEL, compared: int = 1) -> float:
        """Computes a lower confidence bound of the share not harmed at a threshold.

        At the candidate of `share_kept`, see `candidate_bounds`; 1 where nothing leaves early.
        """
        at = self._candidate(threshold)
        return 1.0 if at is None else float(1 - candidate_bounds(self, level, compared)[at])

    def share_kept(self, threshold: float) -> float:
        """Returns the share not harmed at the strictest candidate that is no stricter.

        At least as many left early there as at the threshold. At the least strict candidate where
        all are stricter; 1 where nothing leaves early.
        """
        at = self._candidate(threshold)
        return 1.0 if at is None else float(1 - self.harmed[at] / self.rows)

    def _candidate(self, threshold: float) -> int | None:
        if not len(self.thresholds) or threshold > NEVER:
            return None
        return min(int((self.thresholds > threshold).sum()), len(self.thresholds) - 1)

    def as_dict(self) -> dict[str, Any]:
        """Returns what exits.json holds; `from_dict` restores it exactly."""
        lists = {"thresholds": self.thresholds.tolist(), "harmed": self.harmed.tolist()}
        return {"kind": self.kind, **lists, "rows": self.rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LossCounts":
        """Restores what `as_dict` returned."""
        thresholds = np.asarray(values["thresholds"], np.float64)
        harmed = np.asarray(values["harmed"])
        harmed = harmed.astype(np.float64 if harmed.dtype.kind == "f" else np.int64)
        return cls(str(values["kind"]), thresholds, harmed, int(values["rows"]))


def count_losses(
    outputs: ExitOutputs, replica: int, confidences: np.ndarray, thresholds: np.ndarray, kind: str
) -> LossCounts:
    """Counts the examples of one replica that each threshold harms, see `exit_losses`.

    confidences float64 [E, N] are of the same rows, on which neither they nor the thresholds
    float64 [K], descending, may have been fitted.
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
    """Certifies the least strict threshold with at most `limit` harmed, at confidence `level`.

    Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052) by fixed-sequence testing: from the
    strictest threshold on, each is tested at alpha = 1 - level, and the first that fails ends it,
    so that the chance of certifying a threshold above the limit is at most alpha. A threshold
    passes where its bound is at most the limit, see `candidate_bounds`.
    """
    about = (counts.kind, limit, level)
    if not len(counts.thresholds):  # nothing leaves early, and nothing can be lost
        return Certificate(*about, NEVER, 0.0, 0, counts.rows)
    bounds = candidate_bounds(counts, level, compared)
    passed = int(np.searchsorted(sequential_limits(bounds), limit, side="right"))
    at = max(passed - 1, 0)
    threshold = float(counts.thresholds[at]) if passed else None
    return Certificate(*about, threshold, float(bounds[at]), counts.harmed[at].item(), counts.rows)


def candidate_bounds(
    counts: LossCounts, level: float = DEFAULT_LEVEL, compared: int = 1
) -> np.ndarray:
    """Computes the upper confidence bound of the share that each candidate harms, float64 [K].

    The exact binomial one, see `upper_bound`. A model chosen out of several by these rows is tested
    at alpha / compared (Bonferroni): chosen for its luck, it would exceed its limit more often.

    Where rows are harmed in part, Bentkus' inequality (2004), by which e times the binomial
    probability bounds the tail of any sum of such parts (as Bates et al. 2021, arXiv 2101.02703,
    use it): the bound is the binomial one at alpha / e, of the sum rounded up.
    """
    alpha = (1 - level) / compared
    if counts.harmed.dtype.kind == "f":
        sums = np.ceil(counts.harmed - 1e-9).astype(np.int64)  # their rounding
        return upper_bound(sums, counts.rows, 1 - alpha / np.e)
    return upper_bound(counts.harmed, counts.rows, 1 - alpha)


def sequential_limits(bounds: np.ndarray) -> np.ndarray:
    """Computes the smallest limit at which each candidate is certified, float64 [K], ascending.

    That is the largest bound up to and with its own: the first candidate that fails ends the test.
    """
    return np.maximum.accumulate(bounds)


def upper_bound(hits: np.ndarray | int, total: int, level: float) -> np.ndarray:
    """Computes the upper end of Clopper & Pearson's (1934) one-sided interval of hits / total.

    In closed form: `scipy.stats.binomtest` searches for it. Raises UserError without SciPy.
    """
    try:
        from scipy import stats  # here: a served model needs it for certified targets alone
    except ImportError as error:
        message = "certified targets (risk, agreement) need SciPy: pip install scipy"
        raise UserError(message) from error

    hits = np.asarray(hits)
    found = stats.beta.ppf(level, hits + 1, np.maximum(total - hits, 1))
    return np.where(hits < total, found, 1.0)
