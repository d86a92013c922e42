"""Thresholds with a certificate: how much accuracy against the full model can be lost, at most.

Shape letters: E exit, N examples, K candidates.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy import stats

from sweet_jax.exits.outputs import ExitOutputs

KINDS = ("risk", "agreement")


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A threshold, and what was tested of it.

    Attributes:
      kind: "risk" or "agreement"; see `harms`.
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
        """As it stands in exits.json."""
        return dataclasses.asdict(self)


def harms(outputs: ExitOutputs, replica: int, kind: str) -> np.ndarray:
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
    raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")


def candidates(scores: np.ndarray, count: int = 100) -> np.ndarray:
    """Thresholds to test, the most careful first, float64 [K]: evenly over what they let leave.

    scores: float [E, N] of rows that are not those to be tested.
    """
    levels = np.maximum.accumulate(scores[:-1], axis=0).ravel()
    levels = np.sort(levels[np.isfinite(levels)])[::-1]
    places = np.linspace(0, len(levels) - 1, count + 1).round().astype(int)
    return np.unique(levels[places])[::-1] if len(levels) else levels


def certify(
    scores: np.ndarray,
    harmful: np.ndarray,
    thresholds: np.ndarray,
    *,
    kind: str,
    limit: float,
    level: float = 0.95,
) -> Certificate:
    """The least careful threshold with at most `limit` harmed, with confidence `level`.

    Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052) by fixed-sequence testing: from the
    most careful threshold on, each is tested at alpha = 1 - level, and the first that fails ends
    it, so that the chance of certifying a threshold above the limit is at most alpha. The test is
    the exact binomial one: a threshold passes where the upper end of Clopper & Pearson's (1934)
    one-sided interval is at most the limit.

    Args:
      scores: float [E, N] of the rows tested; neither the policy nor `thresholds` may have been
        fitted on them.
      harmful: bool [E, N], what `harms` gives of the same rows.
      thresholds: float [K], descending.
      kind, limit, level: as in Certificate.

    """
    count = scores.shape[1]
    points = np.maximum.accumulate(scores[:-1], axis=0)  # [E - 1, N]
    best: Certificate | None = None
    for threshold in thresholds.tolist():
        place = (points < threshold).sum(axis=0)  # [N]
        harmed = int(np.take_along_axis(harmful, place[None], axis=0).sum())
        bound = upper_bound(harmed, count, level)
        passed = bound <= limit
        if passed or best is None:
            found = threshold if passed else None
            best = Certificate(kind, limit, level, found, bound, harmed, count)
        if not passed:
            break
    return best or Certificate(kind, limit, level, None, 1.0, 0, count)


def upper_bound(hits: int, total: int, level: float) -> float:
    """Upper end of Clopper & Pearson's one-sided interval of a share, at confidence `level`."""
    return float(stats.beta.ppf(level, hits + 1, total - hits)) if hits < total else 1.0
