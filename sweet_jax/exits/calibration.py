"""What held-out rows say of an exit's confidence: temperatures, reliability, and how good it is.

Shape letters: R replica, E exit, N examples, C classes, K knots.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import brentq, isotonic_regression
from scipy.special import log_softmax, softmax
from scipy.stats import rankdata

from sweet_jax.exits.outputs import ExitOutputs

# Where every calibration row is right, the likelihood rises for ever as T falls (and where the
# logits say nothing, as T grows): T stops here.
TEMPERATURE_RANGE = (1e-2, 1e2)

# The four kinds of reliability curve. PCEE's bins and smoothing are not known (its paper leaves
# them open): ten bins over (1/C, 1), the range of a largest probability, and a Gaussian kernel
# whose width is half a bin.
CURVES = ("equal_width", "equal_mass", "isotonic", "kernel")
_BINS = 10
_KNOTS = 201  # of the smoothed curve; linear between them
# A bin's share of right answers is shrunk towards the exit's own by as much as this many rows that
# had the exit's share would: a bin of one row must not say 100%.
_PRIOR_ROWS = 5.0


BELOW_ONE = float(np.nextafter(1.0, 0.0))  # the largest score of what is never quite sure


def probabilities(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """Softmax of logits / temperature [R, E], float64 [R, E, N, C]."""
    return softmax_with_temperature(outputs.logits, temperatures[..., None, None])


def confidence(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """Largest probability, below 1, float64 [R, E, N]: a threshold of 1 sends every example to the
    last exit.

    So the SWEET paper's experimental setup has it. Rounded to 1, a sure example would leave all the
    same.
    """
    return np.minimum(probabilities(outputs, temperatures).max(axis=-1), BELOW_ONE)


def softmax_with_temperature(logits: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """Softmax of logits [..., C] / temperatures, of a shape that broadcasts; float64 [..., C]."""
    scaled = logits.astype(np.float64) / temperatures
    with np.errstate(invalid="ignore"):  # of what diverged: NaN
        exponent = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return exponent / exponent.sum(axis=-1, keepdims=True)


def fit_temperatures(outputs: ExitOutputs) -> np.ndarray:
    """The temperature of every replica and exit that minimises its NLL, float64 [R, E].

    NaN where an exit's logits are not finite.
    """
    return np.asarray(
        [
            [fit_temperature(z, labels) for z in replica]
            for replica, labels in zip(outputs.logits, outputs.labels, strict=True)
        ]
    )


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T in TEMPERATURE_RANGE that minimises the mean NLL of softmax(logits / T).

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599), exactly: the NLL is convex in 1/T, so
    its derivative, E_p[z] - z_y on average, has one zero, found by Brent's method. Where no answer
    is wrong it has none, the less the surer: rows that do not say how unsure to be leave T at 1.

    Args:
      logits: float [N, C].
      labels: int [N].

    """
    z = np.asarray(logits, np.float64)
    if not np.isfinite(z).all():
        return float("nan")
    right = z[np.arange(len(z)), labels]

    def slope(inverse: float) -> float:
        return float((np.sum(softmax(inverse * z, axis=-1) * z, axis=-1) - right).mean())

    others = np.where(np.arange(z.shape[1]) == labels[:, None], -np.inf, z).max(axis=-1)
    if (right > others).all():
        return 1.0
    low, high = 1 / TEMPERATURE_RANGE[1], 1 / TEMPERATURE_RANGE[0]
    if slope(low) >= 0:
        return TEMPERATURE_RANGE[1]
    if slope(high) <= 0:
        return TEMPERATURE_RANGE[0]
    return 1 / float(brentq(slope, low, high, xtol=1e-12, rtol=1e-12))


@dataclasses.dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """The share of right answers as a function of a score: what held-out rows had.

    Attributes:
      x: float64 [K], ascending.
      y: float64 [K]; where `steps`, y[i] holds from x[i] up to x[i + 1], else linear between. The
        first and last hold beyond the ends.
      steps: piecewise constant, or linear.

    """

    x: np.ndarray
    y: np.ndarray
    steps: bool

    def __call__(self, score: np.ndarray) -> np.ndarray:
        """The curve at scores of any shape, float64; NaN at NaN."""
        score = np.asarray(score, np.float64)
        if self.steps:
            at = np.searchsorted(self.x, score, side="right") - 1
            found = self.y[np.clip(at, 0, len(self.y) - 1)]
        else:
            found = np.interp(score, self.x, self.y)
        # An accuracy, of which averages and interpolation may miss 1 by their rounding.
        return np.where(np.isnan(score), np.nan, np.clip(found, 0, 1))

    def as_dict(self) -> dict[str, Any]:
        """As it stands in exits.json; `from_dict` gives it back exactly."""
        y = [v if np.isfinite(v) else None for v in self.y.tolist()]
        return {"x": self.x.tolist(), "y": y, "steps": self.steps}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ReliabilityCurve":
        """What `as_dict` gave."""
        x, y = (np.asarray(values[k], np.float64) for k in ("x", "y"))
        return cls(x, y, bool(values["steps"]))


def fit_reliability_curve(
    kind: str, score: np.ndarray, right: np.ndarray, low: float = 0.0
) -> ReliabilityCurve:
    """The reliability curve of one exit, of one of the kinds in CURVES.

    Bins, the blocks of an isotonic fit, and kernel averages alike are shrunk towards the exit's
    mean as if by five more rows. A score that is not finite gives a curve that is NaN.

    Args:
      kind: "equal_width", "equal_mass" (bins), "isotonic" (the rising curve of least squares,
        Zadrozny & Elkan 2002), or "kernel" (Nadaraya-Watson, linear between knots).
      score: float [N], from `low` to 1.
      right: bool [N].
      low: the smallest score there can be.

    """
    if not np.isfinite(score).all():
        return ReliabilityCurve(np.zeros(1), np.full(1, np.nan), True)
    mean = float(right.mean())
    if kind == "kernel":
        x = np.linspace(low, 1, _KNOTS)
        width = (1 - low) / _BINS / 2
        weight = np.exp(-0.5 * ((x[:, None] - score) / width) ** 2)  # [K, N]
        total, hits = weight.sum(axis=1), weight @ right
        return ReliabilityCurve(x, _shrunk(hits, total, mean), False)
    order = np.argsort(score, kind="stable")
    score, right = score[order], right[order]
    if kind == "equal_width":
        x = np.linspace(low, 1, _BINS + 1)[:-1]
    elif kind == "equal_mass":
        places = np.linspace(0, len(score), _BINS, endpoint=False).astype(int)
        x = np.unique(score[places])
    else:
        x, first = np.unique(score, return_index=True)
        count = np.diff(np.append(first, len(score)))
        rising = isotonic_regression(np.add.reduceat(right, first) / count, weights=count).x
        # Rows that tie in the fit are one block.
        x = x[np.append(True, np.diff(rising) > 1e-12)]
    place = np.clip(np.searchsorted(x, score, side="right") - 1, 0, len(x) - 1)
    count = np.bincount(place, minlength=len(x))
    y = _shrunk(np.bincount(place, right, len(x)), count, mean)
    if kind == "isotonic":  # shrunk by their counts, small blocks can fall below larger ones
        y = np.clip(isotonic_regression(y, weights=count + _PRIOR_ROWS).x, 0, 1)  # its rounding
    return ReliabilityCurve(x, y, True)


def _shrunk(hits: np.ndarray, count: np.ndarray, mean: float) -> np.ndarray:
    return (hits + _PRIOR_ROWS * mean) / (count + _PRIOR_ROWS)


def reliability_diagram(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reliability diagram over equal-width bins of [0, 1].

    Args:
      confidence: float [N].
      correct: bool [N].
      bins: how many.

    Returns:
      (mean confidence, share correct, count), each [bins]; NaN where a bin is empty.

    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(place, confidence, bins) / count
        share = np.bincount(place, correct, bins) / count
    return mean, share, count


def expected_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 10
) -> float:
    """Mean |confidence - accuracy| over the bins, weighted by their counts (Guo et al., eq. 5)."""
    mean, share, count = reliability_diagram(confidence, correct, bins)
    used = count > 0
    return float((np.abs(mean - share)[used] * count[used]).sum() / count.sum())


def confidence_quality(
    outputs: ExitOutputs, temperatures: np.ndarray
) -> list[list[dict[str, float | None]]]:
    """How good each exit's confidence is, for every replica and exit; None where it diverged.

    ece: expected calibration error of the largest probability, ten bins. nll: mean negative log
    likelihood of the label. brier: mean squared distance of the probabilities from the label's
    (Brier 1950, summed over classes: 0 to 2). auroc: the chance that a right answer has a larger
    confidence than a wrong one, ties counted half; None where all are right, or none.

    temperatures: float [R, E].
    """
    found = []
    for r, labels in enumerate(outputs.labels):
        scaled = outputs.logits[r].astype(np.float64) / temperatures[r][:, None, None]
        rows = []
        for logs in log_softmax(scaled, axis=-1):  # [N, C]
            sound = bool(np.isfinite(logs).all())
            rows.append(_quality(logs, labels) if sound else dict.fromkeys(_QUALITIES))
        found.append(rows)
    return found


_QUALITIES = ("ece", "nll", "brier", "auroc")


def _quality(logs: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Of log probabilities [N, C] and labels [N]."""
    p, rows = np.exp(logs), np.arange(len(labels))
    sure, right = p.max(axis=-1), logs.argmax(axis=-1) == labels
    hits, misses = int(right.sum()), int((~right).sum())
    auroc = None
    if hits and misses:  # Mann-Whitney's U
        auroc = float((rankdata(sure)[right].sum() - hits * (hits + 1) / 2) / (hits * misses))
    return {
        "ece": expected_calibration_error(sure, right),
        "nll": float(-logs[rows, labels].mean()),
        "brier": float((p**2).sum(axis=-1).mean() - 2 * p[rows, labels].mean() + 1),
        "auroc": auroc,
    }
