"""Resolves targets to thresholds: the one resolver that every command and page uses.

Thresholds are chosen on calibration rows; see `targets` for what can be asked for.

Shape letters: E exit, K rows of a table, P points of a front.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.config import UserError
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
from sweet_jax.exits.policies import POLICIES, policy_rule
from sweet_jax.exits.targets import DEFAULT_LEVEL, TargetTable, check_targets
from sweet_jax.objectives import OBJECTIVES

_ROUNDING = 1e-12  # of a cost or a metric
# Under PCEE an accuracy is the threshold itself: a table holds these.
_ACCURACIES = np.round(np.arange(200, -1, -1) / 200, 3)


def reads_curve(policy: str) -> bool:
    """Returns whether a threshold of the policy is an accuracy: a user's own is never one."""
    return policy in POLICIES and bool(POLICIES[policy].curve)


class Resolution(NamedTuple):
    """Holds the threshold that a target resolved to."""

    threshold: float | None  # None where the calibration rows cannot meet the target
    calibrator: Calibrator  # that the policy reads at the threshold
    reachable: float = np.nan  # see OperatingPoint; NaN too where no threshold has a metric
    certificate: Certificate | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ThresholdResolver:
    """Resolves targets to thresholds by the calibration rows of one trained model.

    Attributes:
      calibrator: fitted on all calibration rows.
      full: the last exit's metric on them; NaN where it diverged and has none.
      fronts: of each policy, on calibration rows (cross-fitted where the policy reads curves).
      half_calibrator: fitted on half of the rows, for certificates; None where they may not or
        cannot be halved.
      losses: of each policy and kind of certificate, on the other half.
      compared: how many models these rows had to choose from.
      objective, metric: of the outputs; `as_dict` has them unless it is single-label.

    """

    calibrator: Calibrator
    full: float
    fronts: Mapping[str, ParetoFront]
    half_calibrator: Calibrator | None
    losses: Mapping[str, Mapping[str, LossCounts]]
    compared: int = 1
    objective: str = "single_label"
    metric: str = ""

    def threshold(
        self, policy: str, *, clock: np.ndarray | None = None, **targets: float | None
    ) -> tuple[float, Calibrator]:
        """Returns the threshold for a target, and the calibrator that the policy reads at it.

        Raises UserError as `resolve` does, and where the target cannot be met, with the best that
        can.
        """
        found = self.resolve(policy, targets, clock)
        if found.threshold is not None:
            return found.threshold, found.calibrator
        if found.certificate is not None:
            kind, level = found.certificate.kind, found.certificate.level
            raise UserError(
                f"infeasible: the best certified is {kind} {found.reachable:.4f} with confidence "
                f"{level:g}"
            )
        if np.isnan(found.reachable):
            raise UserError(
                "infeasible: the training of this model diverged, so that no threshold has a "
                "metric on the calibration rows; train it with a smaller learning rate"
            )
        if targets.get("milliseconds") is not None:
            best = f"{found.reachable:.2f} milliseconds"
        else:
            name = "metric" if targets.get("cost") is None else "cost"
            best = f"{name} {found.reachable:.4f}"
            if targets.get("error") is not None:
                best = f"error {-found.reachable:.4g}"
        raise UserError(f"infeasible: the best reachable on the calibration rows is {best}")

    def resolve(
        self,
        policy: str,
        targets: Mapping[str, float | None] | None = None,
        clock: np.ndarray | None = None,
    ) -> Resolution:
        """Chooses the threshold for a target.

        Within a cost or a time the one with the best metric; for an accuracy the cheapest with such
        a metric, or under PCEE the accuracy itself; for a risk or an agreement the least strict
        that is certified; without a target, the cheapest that keeps the last exit's metric.

        Args:
          policy: its name.
          targets: at most one of TARGET_RANGES, by name, and the level of a certificate.
          clock: float64 [E], milliseconds until each exit has answered; needed for milliseconds.

        Raises:
          UserError: an unknown policy, one that was not calibrated, two targets, a value out of its
            range, an error where the metric is none (an accuracy where it is one), milliseconds
            without a clock, or a certificate where there can be none.

        """
        values = {k: v for k, v in (targets or {}).items() if v is not None}
        check_targets(values)
        if policy not in self.fronts:
            policy_rule(policy)  # an unknown name is another mistake
            raise UserError(
                f"this model was not calibrated for the policy {policy!r}: set policy to one of "
                f"{', '.join(self.fronts)}"
            )
        level = values.pop("level", DEFAULT_LEVEL)
        name, value = next(iter(values.items()), ("", self.full))
        if name == "threshold":
            # Minus infinity is the confidence of an exit that nothing may leave at.
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
        """Raises UserError for an error where the metric is none, or the other way round."""
        objective = OBJECTIVES[self.objective]
        is_error = bool(self.metric) and objective.metric(self.metric).is_error
        if target == "error" and not is_error:
            errors = [metric.name for metric in objective.metrics if metric.is_error]
            advice = f"train with --config.metric={errors[0]}" if errors else "set accuracy"
            raise UserError(
                f"error is {value:g}, but the metric of this run is not an error: {advice}"
            )
        if target == "accuracy" and is_error:
            raise UserError(
                f"accuracy is {value:g}, but the metric of this run is {self.metric}: set error, "
                "the largest that it may be"
            )

    def table(self, policy: str, target: str, level: float = DEFAULT_LEVEL) -> TargetTable:
        """Tabulates what `resolve` chooses for every value of "cost", "accuracy" or a certificate.

        Under PCEE, where an accuracy is the threshold itself, in steps of 0.005. Raises UserError
        where there can be no certificate.
        """
        if target in CERTIFICATE_KINDS:
            counts = self._loss_counts(policy, target)
            bounds, thresholds = candidate_bounds(counts, level, self.compared), counts.thresholds
            if not len(bounds):  # nothing leaves early
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
                "milliseconds are not known for this model: sweet-jax predict "
                "--model=... --measure finds them on this machine"
            )
        time = front.shares @ clock  # [P]
        # A point that takes as long as a later one, whose metric is higher, is never chosen.
        later = np.append(np.minimum.accumulate(time[::-1])[::-1][1:], np.inf)
        use = time < later
        return TargetTable(time[use], front.threshold[use], True)

    def certificate(
        self, policy: str, kind: str, limit: float, level: float = DEFAULT_LEVEL
    ) -> Certificate:
        """Certifies a policy's threshold, see `certify`. Raises UserError where none can be."""
        return certify(self._loss_counts(policy, kind), limit, level, self.compared)

    def _loss_counts(self, policy: str, kind: str) -> LossCounts:
        if OBJECTIVES[self.objective].agrees is None:
            raise UserError(
                f"{kind} cannot be certified of a regression, whose numbers are not right or "
                "wrong: set error or cost"
            )
        if self.half_calibrator is None:
            raise UserError(
                "a certificate needs two calibration rows or more that are held out, and this run "
                "has none: raise train_size, and set no preset that fits on the validation rows"
            )
        if policy not in self.losses:
            raise UserError(
                f"the confidence of the policy {policy!r} depends on the other rows: its threshold "
                "cannot be certified"
            )
        return self.losses[policy][kind]

    def as_dict(self) -> dict[str, Any]:
        """Returns what exits.json holds; `from_dict` restores it exactly."""
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
    def from_dict(cls, values: Mapping[str, Any]) -> "ThresholdResolver":
        """Restores what `as_dict` returned."""
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
        )
