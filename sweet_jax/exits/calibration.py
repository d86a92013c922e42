"""Temperature scaling (Guo et al. 2017, arXiv 1706.04599), exactly, and reliability.

Shape letters: R replica, E exit, N examples, C classes.
"""

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax

from sweet_jax.exits.outputs import ExitOutputs

# Where every calibration row is right, the likelihood rises for ever as T falls (and where the
# logits say nothing, as T grows): T stops here.
TEMPERATURE_RANGE = (1e-2, 1e2)


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

    The NLL is convex in 1/T, so its derivative, E_p[z] - z_y on average, has one zero: found by
    Brent's method.

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

    low, high = 1 / TEMPERATURE_RANGE[1], 1 / TEMPERATURE_RANGE[0]
    if slope(low) >= 0:
        return TEMPERATURE_RANGE[1]
    if slope(high) <= 0:
        return TEMPERATURE_RANGE[0]
    return 1 / float(brentq(slope, low, high, xtol=1e-12, rtol=1e-12))


def reliability(
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
    mean, share, count = reliability(confidence, correct, bins)
    used = count > 0
    return float((np.abs(mean - share)[used] * count[used]).sum() / count.sum())
