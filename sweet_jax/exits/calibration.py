"""Calibrators: the temperature and reliability curves of each exit, fitted on calibration rows.

Shape letters: R replica, E exit, N examples, C outputs of an exit (classes), V categorical
variables with K outcomes each (single-label classification has one variable with C outcomes).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.reliability import CURVES, ReliabilityCurve, fit_reliability_curve
from sweet_jax.objectives import SINGLE_LABEL, Objective
from sweet_jax.objectives.objective import CategoricalVariables, log_softmax, softmax

# If nearly all calibration rows are right, the likelihood may be largest at a T near 0; if the
# logits carry no information, at a very large T. T is clipped to this range, and is 1 if all are
# right.
TEMPERATURE_RANGE = (1e-2, 1e2)

_LARGE = 1e30
BELOW_ONE = float(np.nextafter(1.0, 0.0))  # largest confidence of policies that never reach 1


def outcome_probabilities(
    logits: np.ndarray, temperatures: np.ndarray, objective: Objective = SINGLE_LABEL
) -> np.ndarray:
    """Computes outcome probabilities from logits [E, N, C] / temperatures [E], [E, N, V, K].

    They have the dtype of the temperatures. Raises UserError if the objective's outputs are not
    logits of probabilities.
    """
    scaled = logits.astype(temperatures.dtype) / temperatures[:, None, None]
    with np.errstate(invalid="ignore"):  # logits that diverged give NaN
        return softmax(categorical_variables(objective).logits(scaled))


def max_probability(
    logits: np.ndarray, temperatures: np.ndarray, objective: Objective = SINGLE_LABEL
) -> np.ndarray:
    """Computes the largest probability, averaged over the variables, below 1, float64 [E, N].

    The upper limit ensures that a threshold of 1 sends every example to the last exit, as in the
    SWEET paper's experimental setup; otherwise a probability that rounds to 1 would leave early.
    See `outcome_probabilities` for the arguments and errors.
    """
    probabilities = outcome_probabilities(logits, temperatures, objective)
    return np.minimum(probabilities.max(axis=-1).mean(axis=-1), BELOW_ONE)


def categorical_variables(objective: Objective) -> CategoricalVariables:
    """Returns the likelihood of an objective's targets. Raises UserError if there is none."""
    if objective.categorical is None:
        raise UserError(
            f"the outputs of objective={objective.name!r} are not probabilities: choose a "
            "policy that does not read probabilities, such as 'stability'"
        )
    return objective.categorical


def fit_temperature(
    logits: np.ndarray, targets: np.ndarray, objective: Objective = SINGLE_LABEL
) -> float:
    """Returns the T in TEMPERATURE_RANGE that minimizes the mean NLL of targets under logits / T.

    This is exact temperature scaling (Guo et al. 2017, arXiv 1706.04599). If the variables' logits
    z are linear in an exit's, the NLL is convex in 1/T, so its derivative, the mean over rows of
    E_p[z] - z_y summed over the variables, has one zero, which is found by Brent's method;
    otherwise the NLL is minimized over log T. If every outcome is predicted correctly, there is no
    minimum and the rows do not show how uncertain the exit should be: T is then 1. NaN if logits
    are not finite.

    Args:
      logits: logits of one exit, float [N, C].
      targets: targets of the objective; for single-label classification int [N].
      objective: objective that defines what the logits mean.

    """
    # Imported here because a served model does not need SciPy.
    from scipy.optimize import brentq, minimize_scalar

    variables = categorical_variables(objective)
    with np.errstate(over="ignore"):
        z = variables.logits(np.asarray(logits, np.float64))  # [N, V, K]
    if not np.isfinite(z if variables.is_linear else logits).all():
        return float("nan")
    outcomes = variables.outcomes(targets)[..., None]  # [N, V, 1]
    right = np.take_along_axis(z, outcomes, axis=-1)[..., 0]  # [N, V]

    def slope(inverse: float) -> float:
        expected = np.sum(softmax(inverse * z) * z, axis=-1)  # [N, V]
        return float((expected - right).sum(axis=-1).mean())

    def nll(log_temperature: float) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = log_softmax(variables.logits(np.asarray(logits) / np.exp(log_temperature)))
        mean = -np.take_along_axis(scaled, outcomes, axis=-1).sum(axis=(1, 2)).mean()
        return float(np.nan_to_num(mean, nan=_LARGE, posinf=_LARGE))  # Brent's method needs numbers

    others = np.where(np.arange(z.shape[-1]) == outcomes, -np.inf, z).max(axis=-1)
    if (right > others).all():
        return 1.0
    if not variables.is_linear:
        found = minimize_scalar(nll, bounds=np.log(TEMPERATURE_RANGE), method="bounded")
        return float(np.exp(found.x))
    low, high = 1 / TEMPERATURE_RANGE[1], 1 / TEMPERATURE_RANGE[0]
    if slope(low) >= 0:
        return TEMPERATURE_RANGE[1]
    if slope(high) <= 0:
        return TEMPERATURE_RANGE[0]
    return 1 / float(brentq(slope, low, high, xtol=1e-12, rtol=1e-12))


@dataclasses.dataclass(frozen=True, eq=False)
class Calibrator:
    """Holds the temperature and reliability curves of each exit of one replica.

    Attributes:
      temperatures: temperature of each exit, float64 [E]; 1 if not fitted, NaN if the exit
        diverged.
      curves: reliability curves of all exits [E], by kind (see CURVES): the share of right answers
        (or the mean credit, for metrics that give credit) as a function of the largest probability
        after temperature scaling. Empty if not fitted.

    """

    temperatures: np.ndarray
    curves: Mapping[str, tuple[ReliabilityCurve, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def unfitted(cls, exits: int) -> "Calibrator":
        """Returns a calibrator that leaves logits as they are: temperatures 1, no curves."""
        return cls(np.ones(exits))

    def first_exits(self, count: int) -> "Calibrator":
        """Returns the calibrator of the first `count` exits."""
        curves = {kind: every[:count] for kind, every in self.curves.items()}
        return Calibrator(self.temperatures[:count], curves)

    def as_dict(self) -> dict[str, Any]:
        """Returns the entries of exits.json; `from_dict` restores the calibrator exactly."""
        temperatures = self.temperatures.tolist()
        return {
            "temperatures": [t if np.isfinite(t) else None for t in temperatures],
            "curves": {k: [c.as_dict() for c in every] for k, every in self.curves.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibrator":
        """Restores a calibrator from the result of `as_dict`."""
        temperatures = np.asarray(values["temperatures"], np.float64)  # None becomes NaN
        curves = {
            kind: tuple(ReliabilityCurve.from_dict(c) for c in every)
            for kind, every in values["curves"].items()
        }
        return cls(temperatures, curves)


def fit_calibrators(
    calibration: ExitOutputs, kinds: Sequence[str] = CURVES
) -> tuple[Calibrator, ...]:
    """Fits the temperature and the reliability curves of every exit, for every replica [R].

    Returns unfitted calibrators if the objective's outputs are not logits of probabilities.

    Args:
      calibration: outputs of rows that were not trained on.
      kinds: kinds of reliability curves to fit, a subset of CURVES.

    """
    objective, variables = calibration.objective, calibration.objective.categorical
    if variables is None:
        return (Calibrator.unfitted(len(calibration.layers)),) * len(calibration.logits)
    low, calibrators = 1 / variables.outcome_count(calibration.logits.shape[-1]), []
    for logits, targets in zip(calibration.logits, calibration.labels, strict=True):
        temperatures = np.asarray([fit_temperature(z, targets, objective) for z in logits])  # [E]
        confidences = max_probability(logits, temperatures, objective)  # [E, N]
        credit = calibration.credit(objective.predict(logits), targets)  # [E, N]
        pairs = list(zip(confidences, credit, strict=True))
        curves = {k: tuple(fit_reliability_curve(k, *pair, low) for pair in pairs) for k in kinds}
        calibrators.append(Calibrator(temperatures, curves))
    return tuple(calibrators)
