"""Operating points, and the resolver of thresholds that calibration rows make.

Shape letters: R replica, E exit, N examples.
"""

import dataclasses
from typing import Any

import numpy as np

from sweet_jax.exits.calibration import Calibrator, fit_calibrators
from sweet_jax.exits.certificates import (
    CERTIFICATE_KINDS,
    Certificate,
    LossCounts,
    candidate_thresholds,
    count_losses,
)
from sweet_jax.exits.cross_fitting import calibration_confidences
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.pareto import ParetoFront
from sweet_jax.exits.policies import (
    POLICIES,
    PolicyFunction,
    exit_confidences,
    policy_name,
    policy_rule,
)
from sweet_jax.exits.resolver import ThresholdResolver
from sweet_jax.exits.simulation import exact_curve
from sweet_jax.files import replace_nonfinite


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """Holds the threshold chosen for a target, and what it does.

    Attributes:
      threshold: None where the calibration rows cannot meet the target.
      reachable: the best value of the target's quantity that they can; NaN where the target is the
        threshold.
      calibration, validation: (cost, metric) at the threshold on either set of rows, None where
        there is no threshold; calibration also for a certificate, whose rows are halved.
      certificate: of a risk or an agreement.

    """

    threshold: float | None
    reachable: float = np.nan
    calibration: tuple[float, float] | None = None
    validation: tuple[float, float] | None = None
    certificate: Certificate | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns what results.json and exits.json hold of a point that is not certified.

        None stands for a metric that is not finite.
        """
        both = {"calibration": self.calibration, "validation": self.validation}
        return {"threshold": self.threshold, **replace_nonfinite(both)}


def make_resolver(
    calibration: ExitOutputs,
    policies: tuple[str | PolicyFunction, ...] | None = None,
    compared: int = 1,
    calibrator: Calibrator | None = None,
) -> ThresholdResolver:
    """Makes the resolver of thresholds for one replica.

    Args:
      calibration: R = 1.
      policies: names or functions of the user's own; default those that can be deployed.
      compared: how many replicas the rows had to choose from.
      calibrator: fitted on the rows; default it is fitted here.

    """
    if calibrator is None:
        (calibrator,) = fit_calibrators(calibration)
    last, labels = calibration.predictions[0, -1], calibration.labels[0]
    full = compute_metric(calibration.metric, last, labels, calibration.logits.shape[-1])
    fronts, losses, half = {}, {}, None
    halves = _halves(calibration)
    if halves is not None:
        (half,) = fit_calibrators(halves[0])
    for policy in policies or deployable_policies(calibration):
        name = policy_name(policy)
        found = calibration_confidences(calibration, policy, (calibrator,))
        fronts[name] = ParetoFront.from_curve(exact_curve(calibration, found), 0)
        if halves is not None and half is not None and is_deployable(policy, calibration):
            losses[name] = _count_losses(policy, half, *halves)
    about = calibration.identity.objective, calibration.metric.name
    return ThresholdResolver(calibrator, full, fronts, half, losses, compared, *about)


def _count_losses(
    policy: str | PolicyFunction,
    calibrator: Calibrator,
    fitting: ExitOutputs,
    tested: ExitOutputs,
) -> dict[str, LossCounts]:
    """Counts the losses of either kind on rows that fitted neither calibrator nor candidates."""
    pair = [exit_confidences(rows, policy, (calibrator,))[0] for rows in (fitting, tested)]
    candidates = candidate_thresholds(pair[0])
    return {k: count_losses(tested, 0, pair[1], candidates, k) for k in CERTIFICATE_KINDS}


def deployable_policies(outputs: ExitOutputs) -> tuple[str, ...]:
    """Returns the names of the policies that are `is_deployable`, and the run's own policy's."""
    names = tuple(name for name in POLICIES if is_deployable(name, outputs))
    own = outputs.identity.policy
    return (*names, own) if ":" in own else names


def is_deployable(policy: str | PolicyFunction, outputs: ExitOutputs) -> bool:
    """Returns whether a policy can answer one example at a time, given outputs like these."""
    rule = policy_rule(policy)
    learned = outputs.exit_scores is not None
    readable = rule.suits(outputs.objective)
    readable = readable and (outputs.objective.target_per_output or not rule.of_several)
    return readable and not rule.needs_all_rows and (learned or not rule.needs_exit_scores)


def _halves(calibration: ExitOutputs) -> tuple[ExitOutputs, ExitOutputs] | None:
    """Splits rows into those to fit on and to test, by a fixed seed; None where it may not.

    Nothing is certified of numbers.
    """
    count = calibration.labels.shape[1]
    if calibration.identity.fitted_on != "held_out" or count < 2:
        return None
    if calibration.objective.agrees is None:
        return None
    fitting, tested = calibration_halves(count)
    return calibration.rows(fitting), calibration.rows(tested)


def calibration_halves(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the calibration rows that certificates are fitted and tested on, int [N / 2] each."""
    rows = np.random.default_rng(0).permutation(count)
    return rows[: count // 2], rows[count // 2 :]
