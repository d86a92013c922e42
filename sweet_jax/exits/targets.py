"""Targets of an operating point: a threshold, or a bound on a quantity such as cost or accuracy.

Shape letters: K rows of a table.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import TypedDict

import numpy as np

from sweet_jax.errors import UserError, check_choice

DEFAULT_LEVEL = 0.95  # confidence level of a certificate
# Allowed values of each target, and of the confidence level of a certificate.
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
    """Defines the targets by which an operating point can be chosen: at most one, and the level.

    Without a target, the operating point is the cheapest threshold that keeps the last exit's
    metric on calibration rows.

    Attributes:
      threshold: confidence from which on a text leaves; infinity always runs the full model.
      cost: maximum mean share of the full model's layers.
      accuracy: minimum of the run's metric on calibration rows; under PCEE, minimum accuracy of
        calibration rows similar to a text.
      error: maximum error on calibration rows, for runs whose metric is an error: the mean absolute
        error for regression, or the Hamming loss for multi-label classification.
      risk: maximum share of texts that the last exit gets right and an earlier exit gets wrong,
        certified.
      agreement: minimum share of texts with the same prediction as at the last exit, certified.
      milliseconds: maximum mean time of a single text of median length in the stages, excluding
        tokenization and the policy, as measured on this machine by `predict --measure` or
        `sweet-jax train FILE`.
      level: confidence level of a certificate; default 0.95.

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
    """Raises UserError for an unknown target, a value out of range, or more than one target.

    A level without a certified target, risk or agreement, also raises UserError.

    Args:
      values: value of each target, by name in TARGET_RANGES; None if not set.
      prefix: prefix of the names in error messages.

    """
    for name, value in values.items():
        check_choice("target", name, TARGET_RANGES)
        low, high = TARGET_RANGES[name]
        number = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
        if value is not None and not number:
            raise UserError(f"{prefix}{name} must be a number; got {value!r}")
        if value is not None and not low <= value <= high:
            allowed = f"from {low:g} to {high:g}" if high < np.inf else f"{low:g} or more"
            raise UserError(f"{prefix}{name} must be {allowed}; got {value:g}")
    requested = [name for name, value in values.items() if value is not None and name != "level"]
    if len(requested) > 1:
        names = ", ".join(prefix + name for name in requested)
        raise UserError(f"set one target, not {len(requested)}: {names}")
    if values.get("level") is not None and not {"risk", "agreement"} & {*requested}:
        raise UserError(
            f"{prefix}level applies to certified targets: also set {prefix}risk or "
            f"{prefix}agreement"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TargetTable:
    """Lists the thresholds that one kind of target can choose, strictest target first.

    A target chooses the last row whose value it allows.

    Attributes:
      value: value of the target's quantity on calibration rows, float64 [K]: cost, milliseconds or
        risk, ascending, or accuracy or agreement, descending.
      threshold: threshold of each row, float64 [K].
      at_most: whether the target is a maximum rather than a minimum.
      tolerance: tolerance of the comparison with the target.
      reached: value certified at each threshold, float64 [K]; empty for targets without a
        certificate. It may be better than `value`, since all earlier rows must be certified too.

    """

    value: np.ndarray
    threshold: np.ndarray
    at_most: bool
    tolerance: float = 0.0
    reached: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def choose(self, target: float) -> int | None:
        """Returns the index of the row for a target, None if even the first is not allowed."""
        sign = 1.0 if self.at_most else -1.0
        allowed = np.searchsorted(sign * self.value, sign * target + self.tolerance, side="right")
        return int(allowed) - 1 if allowed else None
