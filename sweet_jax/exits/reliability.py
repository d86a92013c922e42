"""Reliability curves of an exit's confidence, and measures of the quality of confidences.

Shape letters: E exit, N examples, C outputs of an exit (classes), V categorical variables with K
outcomes each (single-label classification has one variable with C outcomes). In curves, K is the
number of knots.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sweet_jax.objectives import SINGLE_LABEL, Objective
from sweet_jax.objectives.objective import log_softmax

# The four kinds of reliability curve. The PCEE paper does not specify its bins and smoothing: we
# use ten bins over (1/C, 1), the range of a largest probability, and a Gaussian kernel whose
# standard deviation is half a bin.
CURVES = ("equal_width", "equal_mass", "isotonic", "kernel")
_BINS = 10
_KNOTS = 201  # number of knots of the smoothed curve, which is linear between them
# Each bin's share of right answers is shrunk towards the exit's overall share by this many
# additional rows, so that a bin with one row does not claim 100%.
_PRIOR_ROWS = 5.0


@dataclasses.dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Maps a confidence to the share of right answers among held-out rows with that confidence.

    Attributes:
      x: confidences of the knots, ascending, float64 [K].
      y: shares at the knots, float64 [K]. If `steps`, y[i] holds from x[i] up to x[i + 1];
        otherwise the curve is linear in between. It is constant beyond the first and last knot.
      steps: whether the curve is piecewise constant rather than piecewise linear.

    """

    x: np.ndarray
    y: np.ndarray
    steps: bool

    def __call__(self, confidence: np.ndarray) -> np.ndarray:
        """Returns the curve at confidences of any shape, float64 of that shape; NaN for NaN."""
        confidence = np.asarray(confidence, np.float64)
        if self.steps:
            at = np.searchsorted(self.x, confidence, side="right") - 1
            values = self.y[np.clip(at, 0, len(self.y) - 1)]
        else:
            values = np.interp(confidence, self.x, self.y)
        # Rounding can make averages and interpolated values exceed 1.
        return np.where(np.isnan(confidence), np.nan, np.clip(values, 0, 1))

    def as_dict(self) -> dict[str, Any]:
        """Returns the entries of exits.json; `from_dict` restores the curve exactly."""
        y = [v if np.isfinite(v) else None for v in self.y.tolist()]
        return {"x": self.x.tolist(), "y": y, "steps": self.steps}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ReliabilityCurve":
        """Restores a curve from the result of `as_dict`."""
        x, y = (np.asarray(values[k], np.float64) for k in ("x", "y"))
        return cls(x, y, bool(values["steps"]))


def fit_reliability_curve(
    kind: str, confidence: np.ndarray, right: np.ndarray, low: float = 0.0
) -> ReliabilityCurve:
    """Fits the reliability curve of one exit.

    Bins, blocks of the isotonic fit and kernel averages are all shrunk towards the exit's mean, as
    if by five additional rows. If a confidence is not finite, the curve is NaN.

    Args:
      kind: "equal_width" or "equal_mass" (bins), "isotonic" (isotonic regression, Zadrozny & Elkan
        2002), or "kernel" (Nadaraya-Watson, linear between knots).
      confidence: confidences from `low` to 1, float [N].
      right: whether each row is right, bool [N], or its credit, float [N] from 0 to 1.
      low: smallest possible confidence.

    """
    if not np.isfinite(confidence).all():
        return ReliabilityCurve(np.zeros(1), np.full(1, np.nan), True)
    if kind == "kernel":
        return _fit_kernel(confidence, right, low)
    from scipy.optimize import isotonic_regression  # here because serving does not need SciPy

    order = np.argsort(confidence, kind="stable")
    confidence, right = confidence[order], right[order]
    if kind == "equal_width":
        x = np.linspace(low, 1, _BINS + 1)[:-1]
    elif kind == "equal_mass":
        places = np.linspace(0, len(confidence), _BINS, endpoint=False).astype(int)
        x = np.unique(confidence[places])
    else:
        x, first = np.unique(confidence, return_index=True)
        count = np.diff(np.append(first, len(confidence)))
        rising = isotonic_regression(np.add.reduceat(right, first) / count, weights=count).x
        # Rows with the same fitted value form one block.
        x = x[np.append(True, np.diff(rising) > 1e-12)]
    place = np.clip(np.searchsorted(x, confidence, side="right") - 1, 0, len(x) - 1)
    count = np.bincount(place, minlength=len(x))
    y = _shrunk(np.bincount(place, right, len(x)), count, float(right.mean()))
    if kind == "isotonic":  # shrinking depends on the block size, so the order must be restored
        y = np.clip(isotonic_regression(y, weights=count + _PRIOR_ROWS).x, 0, 1)  # clips rounding
    return ReliabilityCurve(x, y, True)


def _fit_kernel(confidence: np.ndarray, right: np.ndarray, low: float) -> ReliabilityCurve:
    """Fits a Nadaraya-Watson (1964) average with a Gaussian kernel at knots [K] from `low` to 1."""
    x = np.linspace(low, 1, _KNOTS)
    width = (1 - low) / _BINS / 2
    weight = np.exp(-0.5 * ((x[:, None] - confidence) / width) ** 2)  # [K, N]
    total, hits = weight.sum(axis=1), weight @ right
    return ReliabilityCurve(x, _shrunk(hits, total, float(right.mean())), False)


def _shrunk(hits: np.ndarray, count: np.ndarray, mean: float) -> np.ndarray:
    return (hits + _PRIOR_ROWS * mean) / (count + _PRIOR_ROWS)


def reliability_diagram(
    confidence: np.ndarray, correct: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes a reliability diagram over ten bins of [0, 1].

    Args:
      confidence: confidences, float [N].
      correct: whether each row is correct, bool [N], or the share of its labels that are, float.

    Returns:
      (mean confidence, share correct, count) of the bins, each [10]. The first two are NaN for
      empty bins.

    """
    place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    count = np.bincount(place, minlength=_BINS)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(place, confidence, _BINS) / count
        share = np.bincount(place, correct, _BINS) / count
    return mean, share, count


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Computes the mean |confidence - accuracy| over bins, weighted by counts (Guo et al., eq. 3).

    The bins are those of `reliability_diagram`.
    """
    mean, share, count = reliability_diagram(confidence, correct)
    used = count > 0
    return float((np.abs(mean - share)[used] * count[used]).sum() / count.sum())


def classwise_calibration_error(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Computes the calibration error of the probability of each outcome, averaged over outcomes.

    This is the class-wise expected calibration error of Kull et al. (2019, arXiv 1910.12656, eq. 3)
    with ten bins. It is small only if the probabilities of all classes, including rare ones, are
    well calibrated.

    Args:
      probabilities: probabilities of the outcomes, float64 [N, V, K].
      outcomes: true outcomes, int [N, V].

    """
    return float(_outcome_gaps(probabilities, outcomes).sum() / probabilities.size)


def calibration_error_by_outcome(probabilities: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Computes the calibration error of the probability of each outcome, float64 [V, K].

    `classwise_calibration_error` is the mean of these errors and takes the same arguments.
    """
    return _outcome_gaps(probabilities, outcomes).sum(axis=-1) / len(probabilities)


def _outcome_gaps(probabilities: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Returns |sum of probabilities - number of rows with the outcome| for each outcome and bin.

    There are ten bins over the probability of the outcome: float64 [V, K, bins].
    """
    _, variables, count = probabilities.shape
    place = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)  # [N, V, K]
    cells = np.arange(variables * count).reshape(variables, count) * _BINS + place
    true = outcomes[..., None] == np.arange(count)  # [N, V, K]
    size = variables * count * _BINS
    gap = np.bincount(cells.ravel(), (probabilities - true).ravel(), size)
    return np.abs(gap).reshape(variables, count, _BINS)


def shares_right(logits: np.ndarray, targets: np.ndarray, objective: Objective) -> np.ndarray:
    """Returns whether rows are right, bool [E, N]; for multi-label, the share of right labels.

    The share, float [E, N], is comparable with the mean confidence over the labels. The logits are
    [E, N, C].
    """
    if not objective.target_per_output:
        return objective.is_correct(logits, targets)
    return (objective.predict(logits) == targets).mean(axis=-1)


_QUALITIES = ("ece", "classwise_ece", "nll", "brier", "auroc")


def confidence_quality(
    logits: np.ndarray,
    targets: np.ndarray,
    temperatures: np.ndarray,
    objective: Objective = SINGLE_LABEL,
) -> list[dict[str, float | None]]:
    """Measures the quality of the confidences of each exit of one replica.

    Args:
      logits: logits of the exits, float32 [E, N, C].
      targets: targets of the objective; for single-label classification int64 [N].
      temperatures: temperature of each exit, float [E].
      objective: objective that defines what the logits mean.

    Returns:
      A dict for each exit. "ece" is the expected calibration error of the largest probability, in
      ten bins; for multi-label classification, of the mean confidence against the share of right
      labels. "classwise_ece" is described in `classwise_calibration_error`. "nll" is the mean
      negative log-likelihood of the target. "brier" is the mean squared distance of the
      probabilities from the target (Brier 1950, summed over outcomes: 0 to 2 for classes). "auroc"
      is the probability that a right answer has a larger confidence than a wrong one, counting
      ties as half; None if all answers are right or all are wrong. All values are None if the exit
      diverged or the outputs are not logits of probabilities.

    """
    if objective.categorical is None:
        return [dict.fromkeys(_QUALITIES) for _ in logits]
    scaled = logits.astype(np.float64) / temperatures[:, None, None]
    outcomes = objective.categorical.outcomes(targets)  # [N, V]
    rows = []
    logs = log_softmax(objective.categorical.logits(scaled))  # [E, N, V, K]
    for own, right in zip(logs, shares_right(logits, targets, objective), strict=True):
        sound = bool(np.isfinite(own).all())
        rows.append(_quality(own, outcomes, right) if sound else dict.fromkeys(_QUALITIES))
    return rows


def _quality(logs: np.ndarray, outcomes: np.ndarray, right: np.ndarray) -> dict[str, float | None]:
    """Measures log probabilities [N, V, K] against outcomes [N, V]; `right` is `shares_right`'s."""
    from scipy.stats import rankdata  # imported here because a served model does not need SciPy

    p, at = np.exp(logs), outcomes[..., None]  # [N, V, K], [N, V, 1]
    confidence = p.max(axis=-1).mean(axis=-1)  # [N]
    log_true, true = (np.take_along_axis(x, at, axis=-1).sum(axis=(1, 2)) for x in (logs, p))  # [N]
    whole = right == 1
    hits, misses = int(whole.sum()), int((~whole).sum())
    auroc = None
    if hits and misses:  # Mann-Whitney U statistic
        auroc = float((rankdata(confidence)[whole].sum() - hits * (hits + 1) / 2) / (hits * misses))
    return {
        "ece": expected_calibration_error(confidence, right),
        "classwise_ece": classwise_calibration_error(p, outcomes),
        "nll": float(-log_true.mean()),
        "brier": float((p**2).sum(axis=(1, 2)).mean() - 2 * true.mean() + p.shape[1]),
        "auroc": auroc,
    }
