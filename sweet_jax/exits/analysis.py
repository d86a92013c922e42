"""What follows from the saved outputs of one run: what is fitted, curves, and the choice of a dial.

Everything is fitted on the calibration rows and applied to the validation rows.

Shape letters: R replica, E exit, N examples, T thresholds.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sweet_jax.config import check_choice
from sweet_jax.exits.calibrator import Calibrator, fit_calibrator
from sweet_jax.exits.certificates import Certificate
from sweet_jax.exits.operating_point import (
    ThresholdResolver,
    calibration_confidences,
    make_resolver,
)
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.pareto import ParetoFront
from sweet_jax.exits.policies import POLICIES, exit_confidences, grid_thresholds
from sweet_jax.exits.simulation import Curve, read_curve, simulate


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """All that follows from the saved outputs of one run.

    Attributes:
      calibration, validation: outputs of the rows fitted on and of the rows reported.
      policy: whose scores the curves are of.
      fitted: on the calibration rows.
      calibration_curve, curve: exact curves on either. A policy that reads reliability curves is
        cross-fitted on the calibration rows.
      grid: the validation curve at the paper's 11 thresholds.
      area: float64 [R], mean score over the cost range of the exact curve on the tuning rows, which
        choose between replicas; on the calibration rows where there are none.
      tuned: whether there are tuning rows.

    """

    calibration: ExitOutputs
    validation: ExitOutputs
    policy: str
    fitted: Calibrator
    calibration_curve: Curve
    curve: Curve
    grid: Curve
    area: np.ndarray
    tuned: bool = False
    _dials: dict = dataclasses.field(default_factory=dict, repr=False)

    def resolver(self, replica: int, policies: tuple[str, ...] | None = None) -> ThresholdResolver:
        """The dials of one replica, by default of this policy only; made once."""
        wanted = policies or (self.policy,)
        if (replica, wanted) not in self._dials:
            rows = self.calibration.replica(replica)
            compared = 1 if self.tuned else len(self.calibration.logits)
            self._dials[replica, wanted] = make_resolver(rows, wanted, compared)
        return self._dials[replica, wanted]

    @property
    def temperatures(self) -> np.ndarray:
        """Float64 [R, E]."""
        return self.fitted.temperatures

    @property
    def replicas(self) -> list[tuple[int, float]]:
        """(seed, learning rate) of each replica; numbered, with rate 0, where the outputs
        do not say.
        """
        known = self.validation.identity.get("replicas")
        count = len(self.validation.logits)
        return [tuple(r) for r in known] if known else [(i, 0.0) for i in range(count)]

    @property
    def best(self) -> int:
        """The replica that is saved: of those `chosen`, the one with the largest area.

        So the model that is saved is one of those whose mean is reported.
        """
        return max(self.chosen, key=lambda r: -np.inf if np.isnan(self.area[r]) else self.area[r])

    @property
    def chosen(self) -> list[int]:
        """The replicas of the learning rate that is best by `curve_area`.

        Best is first the rate with the fewest diverged replicas, then the largest mean area.
        Diverged replicas are left out, unless all are.
        """
        sound = np.flatnonzero(np.isfinite(self.area)).tolist()
        if not sound:
            return list(range(len(self.area)))
        by_rate: dict[float, list[int]] = {}
        for r in sound:
            by_rate.setdefault(self.replicas[r][1], []).append(r)
        return max(by_rate.values(), key=lambda rs: (len(rs), float(np.mean(self.area[rs]))))


def analyse(
    calibration: ExitOutputs,
    validation: ExitOutputs,
    policy: str | None = None,
    tuning: ExitOutputs | None = None,
) -> Analysis:
    """Temperatures and curves of a run, under `policy` or else the one in its identity.

    tuning: rows to choose between replicas on; without, the calibration rows do.

    Raises UserError for an unknown policy, or one that needs scores which the outputs lack.
    """
    policy = str(policy or validation.identity.get("policy", "confidence"))
    check_choice("policy", policy, POLICIES)
    fitted = fit_calibrator(calibration)
    scores = exit_confidences(validation, policy, fitted)
    held_out = calibration_confidences(calibration, policy, fitted)
    on_calibration = simulate(calibration, lambda *_: held_out)
    curve = simulate(validation, lambda *_: scores)
    choosing, by = calibration, on_calibration
    if tuning is not None:
        choosing, by = tuning, simulate(tuning, policy, fitted=fitted)
    _, exits, _, classes = validation.logits.shape
    return Analysis(
        calibration,
        validation,
        policy,
        fitted,
        on_calibration,
        curve,
        read_curve(curve, grid_thresholds(policy, classes, exits)),
        np.asarray(
            [
                curve_area(cost, values) if np.isfinite(logits).all() else np.nan
                for cost, values, logits in zip(by.cost, by.score, choosing.logits, strict=True)
            ]
        ),
        tuning is not None,
    )


def curve_area(cost: np.ndarray, values: np.ndarray) -> float:
    """Mean of a curve [T] over its own range of cost, by trapezoids; its value if that is one.

    Given the exact curve wherever this is called an area. What the SWEET paper chooses learning
    rates by is the area under its 11 points; `experiments.comparison` has that as the grid area.
    """
    spread = cost[-1] - cost[0]
    return float(np.trapezoid(values, cost) / spread) if spread > 0 else float(values[-1])


def scores_at_costs(curve: Curve, replica: int, costs: Sequence[float]) -> dict[str, float | None]:
    """Returns the scores at set costs, by linear interpolation between a curve's points.

    Of the exact curve, or of the SWEET paper's grid of 11 thresholds for the numbers that stand
    beside the paper's: where two of its points are far apart, the exact curve may be elsewhere
    between them.

    None at a cost that the curve does not reach.
    """
    cost, values = curve.cost[replica], curve.score[replica]
    return {
        f"{c:.4g}": float(np.interp(c, cost, values))
        if cost[0] - 1e-12 <= c <= cost[-1] + 1e-12
        else None
        for c in costs
    }


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """A threshold chosen on calibration rows, and what it does on either set of rows."""

    threshold: float
    calibration: tuple[float, float]  # cost, score
    validation: tuple[float, float]

    def as_dict(self) -> dict[str, float | list[float]]:
        """As it stands in results.json and exits.json."""
        fitted, given = list(self.calibration), list(self.validation)
        return {"threshold": self.threshold, "calibration": fitted, "validation": given}


def select_operating_point(
    analysis: Analysis, replica: int, *, cost: float | None = None, score: float | None = None
) -> OperatingPoint | float:
    """The best threshold within a mean cost, or the cheapest with at least a score.

    Chosen on calibration rows. Where none will do, the best value that is reachable: the least cost
    or the largest score. Under PCEE a score is an accuracy, and is the threshold itself: each
    example leaves where calibration rows like it had that accuracy (Mofakhami et al. 2024), whether
    or not all of them together reach it.
    """
    trade = ParetoFront.of(analysis.calibration_curve, replica)
    if cost is not None:
        found, best = trade.within_cost(cost), float(trade.cost[0])
    elif score is None:
        raise ValueError("give a cost or a score")
    elif POLICIES[analysis.policy].curve:
        found, best = score, np.nan
    else:
        found, best = trade.with_score(score), float(trade.score[-1])
    return best if found is None else evaluate_threshold(analysis, replica, found)


def evaluate_threshold(analysis: Analysis, replica: int, threshold: float) -> OperatingPoint:
    """What a threshold costs and scores on the calibration and on the validation rows."""

    def point(curve: Curve) -> tuple[float, float]:
        at = read_curve(curve, np.asarray([threshold]))
        return float(at.cost[replica, 0]), float(at.score[replica, 0])

    return OperatingPoint(threshold, point(analysis.calibration_curve), point(analysis.curve))


def cheapest_full_score(analysis: Analysis, replica: int) -> OperatingPoint | float:
    """The cheapest threshold that keeps the last exit's score on the calibration rows."""
    trade = ParetoFront.of(analysis.calibration_curve, replica)
    found = trade.with_score(float(analysis.calibration_curve.score[replica][-1]))
    return float(trade.score[-1]) if found is None else evaluate_threshold(analysis, replica, found)


@dataclasses.dataclass(frozen=True)
class CertifiedPoint:
    """A certificate, and the (cost, score) its threshold has on validation rows, if it has one."""

    certificate: Certificate
    validation: tuple[float, float] | None


def certify_operating_point(
    analysis: Analysis, replica: int, kind: str, limit: float, level: float = 0.95
) -> CertifiedPoint:
    """The cheapest threshold whose harm is certified, see `risk.certify`.

    Half of the calibration rows fits what the scores read, the other half is tested; the chance of
    error is shared among all replicas, since the same rows choose between them.

    kind: "risk" (accuracy lost against the last exit) or "agreement" (answers that differ from its
    own), limit: the largest share, level: of confidence. Raises UserError where the rows fitted on
    are the ones reported, which certify nothing.
    """
    dials = analysis.resolver(replica)
    certificate = dials.certificate(analysis.policy, kind, limit, level)
    if certificate.threshold is None:
        return CertifiedPoint(certificate, None)
    rows, threshold = analysis.validation.replica(replica), np.asarray([certificate.threshold])
    at = simulate(rows, analysis.policy, fitted=dials.halved, thresholds=threshold)
    return CertifiedPoint(certificate, (float(at.cost[0, 0]), float(at.score[0, 0])))
