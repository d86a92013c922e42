"""From a dial to a threshold: all that a deployed model needs of its calibration rows.

Shape letters: R replica, E exit, N examples.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from sweet_jax.config import UserError, check_choice
from sweet_jax.exits.calibrator import Calibrator, fit_calibrator
from sweet_jax.exits.certificates import (
    CERTIFICATE_KINDS,
    Certificate,
    LossCounts,
    candidate_thresholds,
    certify,
    count_losses,
)
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.pareto import ParetoFront
from sweet_jax.exits.policies import POLICIES, cross_fitted_confidences, exit_confidences
from sweet_jax.exits.simulation import simulate

# What each dial may be set to.
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
    """Raises UserError where two dials of RANGES are set, or one to a value out of its range.

    `prefix` stands before the names in the error.
    """
    for name, value in values.items():
        low, high = TARGET_RANGES[name]
        if value is not None and not isinstance(value, numbers.Real):
            raise UserError(f"{prefix}{name} must be a number; got {value!r}")
        if value is not None and not low <= value <= high:
            raise UserError(f"{prefix}{name} must be from {low:g} to {high:g}; got {value:g}")
    given = [name for name, value in values.items() if value is not None and name != "level"]
    if len(given) > 1:
        raise UserError(f"set one dial, not {len(given)}: {', '.join(prefix + n for n in given)}")


@dataclasses.dataclass(frozen=True, eq=False)
class ThresholdResolver:
    """What calibration rows say of one trained model: R = 1 throughout.

    Attributes:
      fitted: on all calibration rows.
      full: the last exit's score on them.
      trades: of each policy, on calibration rows (cross-fitted where the policy reads curves).
      halved: fitted on half of the rows, for certificates: None where they may not or cannot be
        halved.
      trials: of each policy and kind of certificate, on the other half.
      compared: how many models these rows had to choose from.

    """

    fitted: Calibrator
    full: float
    trades: Mapping[str, ParetoFront]
    halved: Calibrator | None
    trials: Mapping[str, Mapping[str, LossCounts]]
    compared: int = 1

    def threshold(
        self,
        policy: str,
        *,
        threshold: float | None = None,
        cost: float | None = None,
        accuracy: float | None = None,
        risk: float | None = None,
        agreement: float | None = None,
        milliseconds: float | None = None,
        level: float = 0.95,
        clock: np.ndarray | None = None,
    ) -> tuple[float, Calibrator]:
        """The threshold that a dial stands for, and what the policy is to read.

        Without a dial, the cheapest threshold that keeps the last exit's score. Raises UserError
        for an unknown policy, one that these rows do not know, two dials, a value out of range, or
        a wish that cannot be met, with the best that can. milliseconds needs `clock`, see
        `Trade.within_time`.
        """
        asked = {"threshold": threshold, "cost": cost, "accuracy": accuracy, "risk": risk}
        asked |= {"agreement": agreement, "milliseconds": milliseconds, "level": level}
        check_targets(asked)
        check_choice("policy", policy, POLICIES)
        if policy not in self.trades:
            raise UserError(
                f"this model was not calibrated for the policy {policy!r}: set policy to one of "
                f"{', '.join(self.trades)}"
            )
        if threshold is not None:
            return threshold, self.fitted
        if risk is not None:
            return self._certified(policy, "risk", risk, level)
        if agreement is not None:
            return self._certified(policy, "agreement", 1 - agreement, level)
        if accuracy is not None and POLICIES[policy].curve:
            return accuracy, self.fitted  # PCEE's threshold is an accuracy
        trade = self.trades[policy]
        if milliseconds is not None:
            if clock is None:
                raise UserError(
                    "milliseconds are not known for this model: python -m sweet_jax.predict "
                    "--model=... --measure finds them on this machine"
                )
            found = trade.within_time(milliseconds, clock)
            best = f"{float((trade.shares @ clock).min()):.2f} milliseconds"
        elif cost is not None:
            found, best = trade.within_cost(cost), f"cost {trade.cost[0]:.4f}"
        else:
            found = trade.with_score(self.full if accuracy is None else accuracy)
            best = f"score {trade.score[-1]:.4f}"
        if found is None:
            raise UserError(f"infeasible: the best reachable on the calibration rows is {best}")
        return found, self.fitted

    def _certified(
        self, policy: str, kind: str, limit: float, level: float
    ) -> tuple[float, Calibrator]:
        found = self.certificate(policy, kind, limit, level)
        if found.threshold is None:
            best = found.bound if kind == "risk" else 1 - found.bound
            raise UserError(
                f"infeasible: the best certified is {kind} {best:.4f} with confidence {level:g}"
            )
        assert self.halved is not None
        return found.threshold, self.halved

    def certificate(self, policy: str, kind: str, limit: float, level: float) -> Certificate:
        """The certificate of a policy, see `risk.certify`. Raises UserError where there is none."""
        if self.halved is None:
            raise UserError(
                "a certificate needs two calibration rows or more that are held out, and this run "
                "has none: raise train_size, and set no preset that fits on the validation rows"
            )
        if policy not in self.trials:
            raise UserError(
                f"the policy {policy!r} scores a row by the others beside it: its threshold cannot "
                "be certified"
            )
        return certify(self.trials[policy][kind], limit, level, self.compared)

    def as_dict(self) -> dict[str, Any]:
        """As it stands in exits.json; `from_dict` gives it back exactly."""
        return self.fitted.as_dict() | {
            "full": self.full,
            "compared": self.compared,
            "trades": {
                policy: {k: v.tolist() for k, v in vars(trade).items()}
                for policy, trade in self.trades.items()
            },
            "certificates": None
            if self.halved is None
            else {
                "fitted": self.halved.as_dict(),
                "trials": {
                    policy: {kind: trials.as_dict() for kind, trials in every.items()}
                    for policy, every in self.trials.items()
                },
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ThresholdResolver":
        """What `as_dict` gave."""
        trades = {
            policy: ParetoFront(
                **{f.name: np.asarray(v[f.name]) for f in dataclasses.fields(ParetoFront)}
            )
            for policy, v in values["trades"].items()
        }
        certificates = values["certificates"] or {"fitted": None, "trials": {}}
        halved = certificates["fitted"]
        trials = {
            policy: {kind: LossCounts.from_dict(v) for kind, v in every.items()}
            for policy, every in certificates["trials"].items()
        }
        return cls(
            Calibrator.from_dict(values),
            float(values["full"]),
            trades,
            halved and Calibrator.from_dict(halved),
            trials,
            int(values["compared"]),
        )


def make_resolver(
    calibration: ExitOutputs, policies: tuple[str, ...] | None = None, compared: int = 1
) -> ThresholdResolver:
    """The dials of one replica's calibration rows, R = 1; by default of all that can be deployed.

    Left out are learning-to-exit where it was not learned, and its min-max variant, which needs all
    rows at once. `compared` is how many replicas the rows had to choose from.
    """
    fitted = fit_calibrator(calibration)
    metric, classes = calibration.identity.get("metric", "accuracy"), calibration.logits.shape[-1]
    full = compute_metric(metric, calibration.predictions[0, -1], calibration.labels[0], classes)
    names = policies or deployable_policies(calibration)
    trades, trials = {}, {}
    halves = _halves(calibration)
    halved = None if halves is None else fit_calibrator(halves[0])
    for name in names:
        scores = calibration_confidences(calibration, name, fitted)
        trades[name] = ParetoFront.of(simulate(calibration, lambda *_, s=scores: s), 0)
        if halves is not None and is_deployable(name, calibration):
            fitting, tested = halves
            levels = candidate_thresholds(exit_confidences(fitting, name, halved)[0])
            found = exit_confidences(tested, name, halved)[0]
            trials[name] = {k: count_losses(tested, 0, found, levels, k) for k in CERTIFICATE_KINDS}
    return ThresholdResolver(fitted, full, trades, halved, trials, compared)


def deployable_policies(outputs: ExitOutputs) -> tuple[str, ...]:
    """The policies that are `is_deployable`."""
    return tuple(name for name in POLICIES if is_deployable(name, outputs))


def is_deployable(policy: str, outputs: ExitOutputs) -> bool:
    """Whether a policy can answer one example at a time, from outputs such as these."""
    learned = outputs.exit_scores is not None
    return policy != "learning_to_exit_min_max" and (learned or policy != "learning_to_exit")


def calibration_confidences(
    calibration: ExitOutputs, policy: str, fitted: Calibrator
) -> np.ndarray:
    """Scores [R, E, N] of the calibration rows themselves, cross-fitted where curves are read."""
    if POLICIES[policy].curve:
        return cross_fitted_confidences(calibration, policy)
    return exit_confidences(calibration, policy, fitted)


def _halves(calibration: ExitOutputs) -> tuple[ExitOutputs, ExitOutputs] | None:
    """Rows to fit on and rows to test, drawn by a fixed seed; None where they may not be."""
    count = calibration.labels.shape[1]
    if calibration.identity.get("fitted_on", "held_out") != "held_out" or count < 2:
        return None
    rows = np.random.default_rng(0).permutation(count)
    return calibration.rows(rows[: count // 2]), calibration.rows(rows[count // 2 :])
