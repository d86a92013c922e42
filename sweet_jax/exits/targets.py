"""Targets of an operating point: a threshold itself, or a bound of what it is to reach.

Shape letters: K rows of a table.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import TypedDict

import numpy as np

from sweet_jax.config import UserError, check_choice

DEFAULT_LEVEL = 0.95  # confidence of a certificate
# The values that each target may have, and those of the confidence level of a certificate.
TARGET_RANGES = {
    "threshold": (-np.inf, np.inf),
    "cost": (0.0, np.inf),
    "milliseconds": (0.0, np.inf),
    "accuracy": (0.0, 1.0),
    "error": (0.0, np.inf),
    "risk": (0.0, 1.0),
    "agreement": (0.0, 1.0),
    "level": (0.5, 0.9999),
}


class Target(TypedDict, total=False):
    """Names the targets that an operating point can be chosen by: at most one, and the level.

    Without any, the operating point is the cheapest threshold that keeps the last exit's metric on
    calibration rows.

    Attributes:
      threshold: exit at the first confidence of at least this; infinity runs the full model alone.
      cost: largest mean share of the full model's layers.
      accuracy: least metric on calibration rows, the run's own; under PCEE the accuracy that
        calibration rows like a text must have had.
      error: largest error on calibration rows, where the run's metric is one: the mean absolute
        error of a regression, the Hamming loss of labels.
      risk: largest share of texts that the last exit gets right and an earlier one wrong,
        certified.
      agreement: least share of texts classified as the last exit would, certified.
      milliseconds: largest mean time in the stages, without tokenization and the policy, of a text
        by itself and of the median length, by what `predict --measure` or `sweet-jax train FILE`
        measured on this machine.
      level: confidence of a certificate; default 0.95.

    """

    threshold: float | None
    cost: float | None
    accuracy: float | None
    error: float | None
    risk: float | None
    agreement: float | None
    milliseconds: float | None
    level: float | None


def check_targets(values: Mapping[str, float | None], prefix: str = "") -> None:
    """Raises UserError for an unknown target, a value out of its range, or two that are set.

    A level alone, or with another target than a certificate's, is refused too.

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
            allowed = f"from {low:g} to {high:g}" if high < np.inf else f"{low:g} or more"
            raise UserError(f"{prefix}{name} must be {allowed}; got {value:g}")
    given = [name for name, value in values.items() if value is not None and name != "level"]
    if len(given) > 1:
        names = ", ".join(prefix + name for name in given)
        raise UserError(f"set one target, not {len(given)}: {names}")
    if values.get("level") is not None and not {"risk", "agreement"} & {*given}:
        raise UserError(
            f"{prefix}level is of a certificate: give {prefix}risk or {prefix}agreement too"
        )


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
