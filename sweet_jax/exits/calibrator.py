"""What calibration rows say of every exit: temperatures, and reliability curves.

Shape letters: R replica, E exit, N examples.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sweet_jax.exits.calibration import (
    CURVES,
    ReliabilityCurve,
    confidence,
    fit_reliability_curve,
    fit_temperatures,
)
from sweet_jax.exits.outputs import ExitOutputs


@dataclasses.dataclass(frozen=True, eq=False)
class Calibrator:
    """What calibration rows say of every exit, before any threshold is chosen.

    Attributes:
      temperatures: float64 [R, E], 1 where nothing was fitted.
      curves: by kind, for every replica and exit: the share of right answers at a confidence
        (after temperature). Empty where nothing was fitted.

    """

    temperatures: np.ndarray
    curves: Mapping[str, tuple[tuple[ReliabilityCurve, ...], ...]] = dataclasses.field(
        default_factory=dict
    )

    def replica(self, index: int) -> "Calibrator":
        """One replica's alone, R = 1."""
        curves = {kind: every[index : index + 1] for kind, every in self.curves.items()}
        return Calibrator(self.temperatures[index : index + 1], curves)

    def exits(self, count: int) -> "Calibrator":
        """Of the first `count` exits alone."""
        curves = {kind: tuple(r[:count] for r in every) for kind, every in self.curves.items()}
        return Calibrator(self.temperatures[:, :count], curves)

    def as_dict(self) -> dict[str, Any]:
        """One replica's, R = 1, as it stands in exits.json; `from_dict` gives it back exactly."""
        (temperatures,) = self.temperatures.tolist()
        return {
            "temperatures": [t if np.isfinite(t) else None for t in temperatures],
            "curves": {k: [c.as_dict() for c in every[0]] for k, every in self.curves.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibrator":
        """What `as_dict` gave, R = 1."""
        temperatures = np.asarray([values["temperatures"]], np.float64)  # None becomes NaN
        curves = {
            kind: (tuple(ReliabilityCurve.from_dict(c) for c in every),)
            for kind, every in values["curves"].items()
        }
        return cls(temperatures, curves)


def fit_calibrator(calibration: ExitOutputs, kinds: Sequence[str] = CURVES) -> Calibrator:
    """Temperatures [R, E], and the curves of some of CURVES, of the confidence after them."""
    temperatures = fit_temperatures(calibration)
    levels = confidence(calibration, temperatures)  # [R, E, N], as the policies read the curves
    right = calibration.predictions == calibration.labels[:, None]  # [R, E, N]
    low = 1 / calibration.logits.shape[-1]
    curves = {
        kind: tuple(
            tuple(fit_reliability_curve(kind, s, r, low) for s, r in zip(*replica, strict=True))
            for replica in zip(levels, right, strict=True)
        )
        for kind in kinds
    }
    return Calibrator(temperatures, curves)
