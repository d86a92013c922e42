"""Thresholds with a certificate: how much accuracy against the full model can be lost, at most.

Shape letters: E exit, N examples, K candidates.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from sweet_jax.exits.outputs import ExitOutputs

CERTIFICATE_KINDS = ("risk", "agreement")
_NEVER = float(np.finfo(np.float64).max)  # a threshold that no score reaches, and JSON can hold


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A threshold, and what was tested of it.

    Attributes:
      kind: "risk" or "agreement"; see `exit_losses`.
      limit: the largest share of harmed examples that was asked for.
      level: 1 - alpha, the confidence of the certificate.
      threshold: None where no candidate was certified.
      bound: upper confidence bound of the share of harmed examples at the threshold; where none was
        certified, at the most careful candidate: the best that could have been promised.
      harmed, rows: examples harmed, of those tested.

    """

    kind: str
    limit: float
    level: float
    threshold: float | None
    bound: float
    harmed: int
    rows: int

    def as_dict(self) -> dict[str, Any]:
        """As the report has it."""
        return dataclasses.asdict(self)


def exit_losses(outputs: ExitOutputs, replica: int, kind: str) -> np.ndarray:
    """Whether leaving at an exit harms an example, bool [E, N].

    "risk": the last exit is right and this one is not. Their share bounds the accuracy lost against
    the full model from above: what early exits put right is counted as nothing. "agreement": the
    answer is not the last exit's; no label is read.
    """
    given, labels = outputs.predictions[replica], outputs.labels[replica]
    if kind == "risk":
        return (given[-1] == labels) & (given != labels)
    if kind == "agreement":
        return given != given[-1]
    raise ValueError(f"kind must be one of {', '.join(CERTIFICATE_KINDS)}; got {kind!r}")


def candidate_thresholds(scores: np.ndarray, count: int = 100) -> np.ndarray:
    """Thresholds to test, the most careful first, float64 [K]: evenly over what they let leave.

    scores: float [E, N] of rows that are not those to be tested.
    """
    levels = np.maximum.accumulate(scores[:-1], axis=0).ravel()
    levels = np.sort(levels[np.isfinite(levels)])[::-1]
    places = np.linspace(0, len(levels) - 1, count + 1).round().astype(int)
    return np.unique(levels[places])[::-1] if len(levels) else levels


@dataclasses.dataclass(frozen=True, eq=False)
class LossCounts:
    """What certificates of any limit and level follow from.

    Attributes:
      kind: "risk" or "agreement"; see `exit_losses`.
      thresholds: float64 [K], the candidates, the most careful first.
      harmed: int64 [K], examples harmed at each.
      rows: examples tested.

    """

    kind: str
    thresholds: np.ndarray
    harmed: np.ndarray
    rows: int

    def as_dict(self) -> dict[str, Any]:
        """As it stands in exits.json; `from_dict` gives it back exactly."""
        return {
            "kind": self.kind,
            "thresholds": self.thresholds.tolist(),
            "harmed": self.harmed.tolist(),
            "rows": self.rows,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LossCounts":
        """What `as_dict` gave."""
        thresholds = np.asarray(values["thresholds"], np.float64)
        harmed = np.asarray(values["harmed"], np.int64)
        return cls(str(values["kind"]), thresholds, harmed, int(values["rows"]))


def count_losses(
    outputs: ExitOutputs, replica: int, scores: np.ndarray, thresholds: np.ndarray, kind: str
) -> LossCounts:
    """How many examples each threshold harms.

    Args:
      outputs: of the rows tested; neither the policy nor `thresholds` may have been fitted on them.
      replica: which.
      scores: float [E, N] of these rows.
      thresholds: float [K], descending.
      kind: see `exit_losses`.

    """
    harmful = exit_losses(outputs, replica, kind)  # [E, N]
    points = np.maximum.accumulate(scores[:-1], axis=0)  # [E - 1, N]
    harmed = [
        np.take_along_axis(harmful, (points < t).sum(axis=0)[None], axis=0).sum()
        for t in thresholds
    ]
    return LossCounts(kind, thresholds, np.asarray(harmed, np.int64), scores.shape[1])


def certify(
    trials: LossCounts, limit: float, level: float = 0.95, compared: int = 1
) -> Certificate:
    """The least careful threshold with at most `limit` harmed, with confidence `level`.

    Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052) by fixed-sequence testing: from the
    most careful threshold on, each is tested at alpha = 1 - level, and the first that fails ends
    it, so that the chance of certifying a threshold above the limit is at most alpha. The test is
    the exact binomial one: a threshold passes where the upper end of Clopper & Pearson's (1934)
    one-sided interval is at most the limit. A model that was chosen out of several by these rows is
    tested at alpha / compared (Bonferroni): chosen for its luck, it would break its promise more
    often.
    """
    about = (trials.kind, limit, level)
    if not len(trials.thresholds):  # nothing leaves early, and nothing can be lost
        return Certificate(*about, _NEVER, 0.0, 0, trials.rows)
    best: Certificate | None = None
    for threshold, harmed in zip(trials.thresholds.tolist(), trials.harmed.tolist(), strict=True):
        bound = upper_bound(harmed, trials.rows, 1 - (1 - level) / compared)
        passed = bound <= limit
        if passed or best is None:
            best = Certificate(*about, threshold if passed else None, bound, harmed, trials.rows)
        if not passed:
            break
    assert best is not None
    return best


def upper_bound(hits: int, total: int, level: float) -> float:
    """Upper end of Clopper & Pearson's one-sided interval of a share, at confidence `level`."""
    return float(stats.beta.ppf(level, hits + 1, total - hits)) if hits < total else 1.0
