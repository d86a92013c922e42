"""Operating points, and construction of the threshold resolver from calibration rows.

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
    """Holds the threshold chosen for a target, with its cost and metric.

    Attributes:
      threshold: the threshold; None if the target cannot be met on the calibration rows. To load a
        classifier, pass the target itself: it raises UserError if the target cannot be met, while a
        threshold of None means no target. With a certificate, the threshold applies only to
        confidences with temperatures fitted on half of the calibration rows.
      reachable: best value of the target's quantity on the calibration rows; NaN if the target is
        the threshold itself.
      calibration, validation: (cost, metric) at the threshold on each set of rows; None if there is
        no threshold. `calibration` is also None for certificates, which split these rows in half.
      certificate: certificate for a target of risk or agreement, otherwise None.

    """

    threshold: float | None
    reachable: float = np.nan
    calibration: tuple[float, float] | None = None
    validation: tuple[float, float] | None = None
    certificate: Certificate | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the entries of results.json and exits.json for a point without certificate.

        Metrics that are not finite become None.
        """
        both = {"calibration": self.calibration, "validation": self.validation}
        return {"threshold": self.threshold, **replace_nonfinite(both)}


def make_resolver(
    calibration: ExitOutputs,
    policies: tuple[str | PolicyFunction, ...] | None = None,
    compared: int = 1,
    calibrator: Calibrator | None = None,
) -> ThresholdResolver:
    """Makes the threshold resolver of one replica.

    Args:
      calibration: outputs of one replica on the calibration rows, R = 1.
      policies: names of policies or user-defined functions; default all deployable policies.
      compared: number of replicas among which these rows chose.
      calibrator: calibrator fitted on these rows; default a newly fitted one.

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
        confidences = calibration_confidences(calibration, policy, (calibrator,))
        fronts[name] = ParetoFront.from_curve(exact_curve(calibration, confidences), 0)
        if halves is not None and half is not None and is_deployable(policy, calibration):
            losses[name] = _count_losses(policy, half, *halves)
    about = calibration.identity.objective, calibration.metric.name
    return ThresholdResolver(
        calibrator, full, fronts, half, losses, compared, *about, float(calibration.cost[-1])
    )


def _count_losses(
    policy: str | PolicyFunction,
    calibrator: Calibrator,
    fitting: ExitOutputs,
    tested: ExitOutputs,
) -> dict[str, LossCounts]:
    """Counts losses of each kind on `tested`, which fitted neither calibrator nor candidates."""
    pair = [exit_confidences(rows, policy, (calibrator,))[0] for rows in (fitting, tested)]
    candidates = candidate_thresholds(pair[0])
    return {k: count_losses(tested, 0, pair[1], candidates, k) for k in CERTIFICATE_KINDS}


def deployable_policies(outputs: ExitOutputs) -> tuple[str, ...]:
    """Returns the names of the deployable policies, including the run's user-defined policy."""
    names = tuple(name for name in POLICIES if is_deployable(name, outputs))
    own = outputs.identity.policy
    return (*names, own) if ":" in own else names


def is_deployable(policy: str | PolicyFunction, outputs: ExitOutputs) -> bool:
    """Returns whether a policy can be applied to one example at a time, given such outputs."""
    rule = policy_rule(policy)
    learned = outputs.exit_scores is not None
    readable = rule.suits(outputs.objective)
    readable = readable and (outputs.objective.target_per_output or not rule.of_several)
    return readable and not rule.needs_all_rows and (learned or not rule.needs_exit_scores)


def _halves(calibration: ExitOutputs) -> tuple[ExitOutputs, ExitOutputs] | None:
    """Splits rows, with a fixed seed, into halves to fit and to test certificates on.

    Returns None if there are no certificates: for regression, for fewer than two rows, and for rows
    that are not held out.
    """
    count = calibration.labels.shape[1]
    if calibration.identity.fitted_on != "held_out" or count < 2:
        return None
    if calibration.objective.agrees is None:
        return None
    fitting, tested = calibration_halves(count)
    return calibration.rows(fitting), calibration.rows(tested)


def calibration_halves(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that certificates are fitted and tested on, int [N // 2], [N - N // 2]."""
    rows = np.random.default_rng(0).permutation(count)
    return rows[: count // 2], rows[count // 2 :]
