"""Targets of an operating point: a threshold itself, or a bound of what it is to reach.

Shape letters: K rows of a table.
"""

import dataclasses
import numbers
from collections.abc import Mapping

import numpy as np

from sweet_jax.config import UserError, check_choice

# The values that each target may have, and those of the confidence level of a certificate.
TARGET_RANGES = {
    "threshold": (-np.inf, np.inf),
    "cost": (0.0, np.inf),
    "milliseconds": (0.0, np.inf),
    "accuracy": (0.0, 1.0),
    "risk": (0.0, 1.0),
    "agreement": (0.0, 1.0),
    "level": (0.5, 0.9999),
}


def check_targets(values: Mapping[str, float | None], prefix: str = "") -> None:
    """Raises UserError for an unknown target, two that are set, or a value out of its range.

    Args:
      values: by name in TARGET_RANGES; None where a target is not set.
      prefix: stands before the names in the error.

    """
    for name, value in values.items():
        check_choice("target", name, TARGET_RANGES)
        low, high = TARGET_RANGES[name]
        if value is not None and not isinstance(value, numbers.Real):
            raise UserError(f"{prefix}{name} must be a number; got {value!r}")
        if value is not None and not low <= value <= high:
            raise UserError(f"{prefix}{name} must be from {low:g} to {high:g}; got {value:g}")
    given = [name for name, value in values.items() if value is not None and name != "level"]
    if len(given) > 1:
        names = ", ".join(prefix + name for name in given)
        raise UserError(f"set one target, not {len(given)}: {names}")


@dataclasses.dataclass(frozen=True, eq=False)
class TargetTable:
    """Lists the thresholds that one kind of target can choose, the strictest target first.

    A target chooses the last row whose value it allows.

    Attributes:
      value: float64 [K], of the target's quantity on calibration rows: cost, milliseconds or risk,
        ascending, or accuracy or agreement, descending.
      threshold: float64 [K].
      at_most: whether a value is allowed up to the target, or else from the target on.
      tolerance: of the comparison.
      reached: float64 [K], what is certified at the threshold; empty where nothing is certified. It
        may be better than the value, as the rows before have to be certified too.

    """

    value: np.ndarray
    threshold: np.ndarray
    at_most: bool
    tolerance: float = 0.0
    reached: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def choose(self, target: float) -> int | None:
        """Returns the index of the row for a target, None where even the first is not allowed."""
        sign = 1.0 if self.at_most else -1.0
        allowed = np.searchsorted(sign * self.value, sign * target + self.tolerance, side="right")
        return int(allowed) - 1 if allowed else None
