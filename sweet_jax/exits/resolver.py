"""Resolves targets to thresholds, for all commands and pages.

Thresholds are chosen on calibration rows; see `targets` for the available targets.

Shape letters: E exit, K rows of a table, P points of a front.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.calibration import Calibrator
from sweet_jax.exits.certificates import (
    CERTIFICATE_KINDS,
    LARGEST,
    NEVER,
    Certificate,
    LossCounts,
    candidate_bounds,
    certify,
    sequential_limits,
)
from sweet_jax.exits.pareto import ParetoFront
from sweet_jax.exits.policies import policy_rule
from sweet_jax.exits.targets import DEFAULT_LEVEL, TargetTable, check_targets
from sweet_jax.objectives import OBJECTIVES

_ROUNDING = 1e-12  # tolerance for costs and metrics
_PRINTED = 1e-5  # tolerance for a cost that was copied from a message
# Under PCEE an accuracy is the threshold itself, so that tables list these values.
_ACCURACIES = np.round(np.arange(200, -1, -1) / 200, 3)


def reads_curve(policy: str) -> bool:
    """Returns whether thresholds of the policy are accuracies; never for a user's function."""
    return bool(policy_rule(policy).curve)


class Resolution(NamedTuple):
    """Holds the threshold that a target resolved to."""

    threshold: float | None  # None if the target cannot be met on the calibration rows
    calibrator: Calibrator  # the calibrator that the policy reads at this threshold
    reachable: float = np.nan  # see OperatingPoint; also NaN if no threshold has a metric
    certificate: Certificate | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ThresholdResolver:
    """Resolves targets to thresholds with the calibration rows of one trained model.

    Attributes:
      calibrator: calibrator fitted on all calibration rows.
      full: metric of the last exit on these rows; NaN if it diverged.
      fronts: Pareto front of each policy on these rows, cross-fitted if the policy reads curves.
      half_calibrator: calibrator for certificates, fitted on half of the rows; None if there are no
        certificates.
      losses: loss counts by policy and kind of certificate, on the other half of the rows.
      compared: number of models among which these rows chose.
      objective, metric: names of the objective and metric; `as_dict` omits them for single-label
        classification.
      largest_cost: cost of the last exit: 1, or more for Multi-Model; not in `as_dict`.

    """

    calibrator: Calibrator
    full: float
    fronts: Mapping[str, ParetoFront]
    half_calibrator: Calibrator | None
    losses: Mapping[str, Mapping[str, LossCounts]]
    compared: int = 1
    objective: str = "single_label"
    metric: str = ""
    largest_cost: float = np.inf

    def threshold(
        self, policy: str, *, clock: np.ndarray | None = None, **targets: float | None
    ) -> tuple[float, Calibrator]:
        """Returns the threshold for a target, and the calibrator that the policy reads at it.

        Raises UserError as `resolve` does, and also if the target cannot be met; the message then
        has the best value that can.
        """
        resolution = self.resolve(policy, targets, clock)
        if resolution.threshold is not None:
            return resolution.threshold, resolution.calibrator
        raise UserError(self._refusal(resolution, targets))

    def _refusal(self, resolution: Resolution, targets: Mapping[str, float | None]) -> str:
        """Describes a target without a threshold: the best value, and what to do."""
        best, certificate = resolution.reachable, resolution.certificate
        if certificate is None and np.isnan(best):
            return (
                "the training of this model diverged, so no threshold has a metric on the "
                "calibration rows: train it with a smaller learning rate"
            )
        given = ((k, v) for k, v in targets.items() if v is not None and k != "level")
        name, value = next(given, ("accuracy", self.full))
        shown = {"milliseconds": f"{best:.2f}", "error": f"{-best:.4g}"}.get(name, f"{best:.4f}")
        change = f"{'lower' if name in ('accuracy', 'agreement') else 'raise'} {name}"
        if certificate is None:
            problem = f"met: the best on the calibration rows is {shown}"
        else:
            problem = f"certified: the best is {shown} with confidence {certificate.level:g}"
            change += ", or train with more calibration rows"
        return f"{name}={value:g} cannot be {problem}; {change}"

    def resolve(
        self,
        policy: str,
        targets: Mapping[str, float | None] | None = None,
        clock: np.ndarray | None = None,
    ) -> Resolution:
        """Chooses the threshold for a target.

        For a cost or a time, it is the threshold with the best metric within that limit; for an
        accuracy or an error, the cheapest threshold that reaches it, or under PCEE the accuracy
        itself; for a risk or an agreement, the least strict certified threshold; without a target,
        the cheapest threshold that keeps the last exit's metric.

        Args:
          policy: name of the exit policy.
          targets: value of at most one target in TARGET_RANGES, by name, and optionally the level
            of a certificate.
          clock: milliseconds until each exit has answered, float64 [E]; required for the target
            milliseconds.

        Raises:
          UserError: the policy is unknown or was not calibrated, two targets are set, a value is
            out of range, the target is an error but the metric is not (or an accuracy but the
            metric is an error), milliseconds are set without a clock, or certificates are not
            available.

        """
        values = {k: v for k, v in (targets or {}).items() if v is not None}
        check_targets(values)
        if policy not in self.fronts:
            policy_rule(policy)  # raises another error for an unknown name
            raise UserError(
                f"this model was not calibrated for the policy {policy!r}: set policy to one of "
                f"{', '.join(self.fronts)}"
            )
        if values.get("cost", 0) > self.largest_cost + _PRINTED:
            raise UserError(
                f"cost={values['cost']:g} is set, but cost is a share of the full model's layers, "
                f"which is at most {self.largest_cost:g}: set that or less"
            )
        level = values.pop("level", DEFAULT_LEVEL)
        name, value = next(iter(values.items()), ("", self.full))
        if name == "threshold":
            # A confidence of minus infinity means "never leave", so no threshold may equal it.
            return Resolution(max(value, -LARGEST), self.calibrator)
        if name in ("accuracy", "error"):
            self._check_metric(name, value)
            if reads_curve(policy):
                value = value if name == "accuracy" else 1 - value
                return Resolution(value, self.calibrator, float(self.fronts[policy].score[-1]))
        if name == "error":
            name, value = "accuracy", -value
        if name in CERTIFICATE_KINDS:
            certificate = self.certificate(
                policy, name, value if name == "risk" else 1 - value, level
            )
            best = certificate.bound if name == "risk" else 1 - certificate.bound
            assert self.half_calibrator is not None
            return Resolution(certificate.threshold, self.half_calibrator, best, certificate)
        table = self._front_table(policy, name or "accuracy", clock)
        at = table.choose(value)
        threshold = None if at is None else float(table.threshold[at])
        reachable = float(table.value[0]) if len(table.value) else np.nan
        return Resolution(threshold, self.calibrator, reachable)

    def _check_metric(self, target: str, value: float) -> None:
        """Raises UserError if the target is an error but the metric is not, or vice versa."""
        objective = OBJECTIVES[self.objective]
        is_error = bool(self.metric) and objective.metric(self.metric).is_error
        if target == "error" and not is_error:
            errors = [metric.name for metric in objective.metrics if metric.is_error]
            advice = f"train with --config.metric={errors[0]}" if errors else "set accuracy"
            raise UserError(
                f"error={value:g} is set, but the metric of this run is not an error: {advice}"
            )
        if target == "accuracy" and is_error:
            raise UserError(
                f"accuracy={value:g} is set, but the metric of this run is {self.metric}: set a "
                "maximum error instead"
            )

    def table(self, policy: str, target: str, level: float = DEFAULT_LEVEL) -> TargetTable:
        """Tabulates what `resolve` chooses for every value of "cost", "accuracy" or a certificate.

        Under PCEE, where an accuracy is the threshold itself, the table has steps of 0.005. Raises
        UserError if certificates are not available.
        """
        if target in CERTIFICATE_KINDS:
            counts = self._loss_counts(policy, target)
            bounds, thresholds = candidate_bounds(counts, level, self.compared), counts.thresholds
            if not len(bounds):  # no example leaves early
                bounds, thresholds = np.zeros(1), np.full(1, NEVER)
            limits = sequential_limits(bounds)
            if target == "risk":
                return TargetTable(limits, thresholds, True, reached=bounds)
            return TargetTable(1 - limits, thresholds, False, reached=1 - bounds)
        if target == "accuracy" and reads_curve(policy):
            return TargetTable(_ACCURACIES, _ACCURACIES, at_most=False)
        return self._front_table(policy, target)

    def _front_table(
        self, policy: str, target: str, clock: np.ndarray | None = None
    ) -> TargetTable:
        front = self.fronts[policy]
        if target == "cost":
            return TargetTable(front.cost, front.threshold, True, _ROUNDING)
        if target == "accuracy":
            return TargetTable(front.score[::-1], front.threshold[::-1], False, _ROUNDING)
        if clock is None:
            raise UserError(
                "milliseconds are not known for this model: measure them on this machine with "
                "sweet-jax predict --model=... --measure"
            )
        time = front.shares @ clock  # [P]
        # A point that takes at least as long as a later one, whose metric is better, is dropped.
        later = np.append(np.minimum.accumulate(time[::-1])[::-1][1:], np.inf)
        use = time < later
        return TargetTable(time[use], front.threshold[use], True)

    def certificate(
        self, policy: str, kind: str, limit: float, level: float = DEFAULT_LEVEL
    ) -> Certificate:
        """Certifies a threshold of a policy, see `certify`. Raises UserError if not available."""
        return certify(self._loss_counts(policy, kind), limit, level, self.compared)

    def _loss_counts(self, policy: str, kind: str) -> LossCounts:
        if OBJECTIVES[self.objective].agrees is None:
            raise UserError(
                f"{kind} cannot be certified for regression, whose predictions are not right or "
                "wrong: set error or cost"
            )
        if self.half_calibrator is None:
            raise UserError(
                "a certificate needs at least two held-out calibration rows, which this run does "
                "not have: raise train_size, and do not set a preset that fits on validation rows"
            )
        if policy not in self.losses:
            reason = f"does not apply to objective={self.objective}"
            if policy_rule(policy).needs_all_rows:
                reason = "computes confidences that depend on the other rows"
            raise UserError(
                f"the policy {policy!r} {reason}, so its thresholds cannot be certified: choose "
                "another policy"
            )
        return self.losses[policy][kind]

    def as_dict(self) -> dict[str, Any]:
        """Returns the contents of exits.json; `from_dict` restores the resolver exactly."""
        losses = {
            policy: {kind: counts.as_dict() for kind, counts in every.items()}
            for policy, every in self.losses.items()
        }
        half, about = self.half_calibrator, {}
        if self.objective != "single_label":
            about = {"objective": self.objective, "metric": self.metric}
        return (
            self.calibrator.as_dict()
            | {
                "full": self.full if np.isfinite(self.full) else None,
                "compared": self.compared,
                "trades": {policy: front.as_dict() for policy, front in self.fronts.items()},
                "certificates": half and {"fitted": half.as_dict(), "trials": losses},
            }
            | about
        )

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], largest_cost: float = np.inf
    ) -> "ThresholdResolver":
        """Restores a resolver from the result of `as_dict`."""
        certificates = values["certificates"] or {"fitted": None, "trials": {}}
        half = certificates["fitted"]
        return cls(
            Calibrator.from_dict(values),
            np.nan if values["full"] is None else float(values["full"]),
            {policy: ParetoFront.from_dict(v) for policy, v in values["trades"].items()},
            half and Calibrator.from_dict(half),
            {
                policy: {kind: LossCounts.from_dict(v) for kind, v in every.items()}
                for policy, every in certificates["trials"].items()
            },
            int(values["compared"]),
            values.get("objective", "single_label"),
            values.get("metric", ""),
            largest_cost,
        )
