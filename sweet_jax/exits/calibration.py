"""Calibrators: the temperatures and reliability curves that calibration rows give each exit.

Shape letters: R replica, E exit, N examples, C classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax

from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.reliability import CURVES, ReliabilityCurve, fit_reliability_curve

# Where every calibration row is right, the likelihood rises without end as T falls (and where the
# logits carry no information, as T grows): T stops here.
TEMPERATURE_RANGE = (1e-2, 1e2)

BELOW_ONE = float(np.nextafter(1.0, 0.0))  # the largest confidence of what is never quite certain


def softmax_with_temperature(logits: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """Computes softmax(logits / temperature), float64 [..., C].

    Args:
      logits: float [..., C].
      temperatures: of a shape that broadcasts against logits.

    """
    scaled = logits.astype(np.float64) / temperatures
    with np.errstate(invalid="ignore"):  # logits that diverged give NaN
        exponent = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return exponent / exponent.sum(axis=-1, keepdims=True)


def probabilities(logits: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """Computes softmax(logits [E, N, C] / temperatures [E]), float64 [E, N, C]."""
    return softmax_with_temperature(logits, temperatures[:, None, None])


def max_probability(logits: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """Computes the largest probability of logits [E, N, C], below 1, float64 [E, N].

    A threshold of 1 then sends every example to the last exit, as the SWEET paper's experimental
    setup has it: rounded to 1, an example that is certain would leave early all the same.
    """
    return np.minimum(probabilities(logits, temperatures).max(axis=-1), BELOW_ONE)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Finds the T in TEMPERATURE_RANGE that minimises the mean NLL of softmax(logits / T).

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599), exactly: the NLL is convex in 1/T, so
    its derivative, E_p[z] - z_y on average, has one zero, found by Brent's method. Where every
    answer is right there is none, the less the more certain: T is 1, since such rows do not show
    how uncertain to be. NaN where logits are not finite.

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
class Calibrator:
    """Holds what calibration rows give each exit of one replica, before any threshold is chosen.

    Attributes:
      temperatures: float64 [E], 1 where nothing was fitted, NaN where an exit diverged.
      curves: by kind (see CURVES), for every exit [E]: the share of right answers as a function of
        the largest probability, after temperature. Empty where nothing was fitted.

    """

    temperatures: np.ndarray
    curves: Mapping[str, tuple[ReliabilityCurve, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def unfitted(cls, exits: int) -> "Calibrator":
        """Returns a calibrator that leaves logits as they are: temperatures 1, no curves."""
        return cls(np.ones(exits))

    def first_exits(self, count: int) -> "Calibrator":
        """Returns the part of the first `count` exits."""
        curves = {kind: every[:count] for kind, every in self.curves.items()}
        return Calibrator(self.temperatures[:count], curves)

    def as_dict(self) -> dict[str, Any]:
        """Returns what exits.json holds; `from_dict` restores it exactly."""
        temperatures = self.temperatures.tolist()
        return {
            "temperatures": [t if np.isfinite(t) else None for t in temperatures],
            "curves": {k: [c.as_dict() for c in every] for k, every in self.curves.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibrator":
        """Restores what `as_dict` returned."""
        temperatures = np.asarray(values["temperatures"], np.float64)  # None becomes NaN
        curves = {
            kind: tuple(ReliabilityCurve.from_dict(c) for c in every)
            for kind, every in values["curves"].items()
        }
        return cls(temperatures, curves)


def fit_calibrator(
    logits: np.ndarray, labels: np.ndarray, kinds: Sequence[str] = CURVES
) -> Calibrator:
    """Fits the temperature and the reliability curves of every exit of one replica.

    Args:
      logits: float32 [E, N, C].
      labels: int64 [N].
      kinds: of curves, some of CURVES.

    """
    temperatures = np.asarray([fit_temperature(z, labels) for z in logits])  # [E]
    confidences = max_probability(logits, temperatures)  # [E, N]
    right = logits.argmax(axis=-1) == labels  # [E, N]
    low = 1 / logits.shape[-1]
    curves = {
        kind: tuple(
            fit_reliability_curve(kind, p, r, low) for p, r in zip(confidences, right, strict=True)
        )
        for kind in kinds
    }
    return Calibrator(temperatures, curves)


def fit_calibrators(
    calibration: ExitOutputs, kinds: Sequence[str] = CURVES
) -> tuple[Calibrator, ...]:
    """Fits a calibrator of every replica [R], see `fit_calibrator`."""
    pairs = zip(calibration.logits, calibration.labels, strict=True)
    return tuple(fit_calibrator(logits, labels, kinds) for logits, labels in pairs)
