"""What follows from the saved outputs of one run: temperatures, curves, and the choice of a dial.

Temperatures and thresholds are fitted on the calibration rows and applied to the validation rows.

Shape letters: R replica, E exit, N examples, T thresholds.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sweet_jax.exits.calibration import fit_temperatures
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import grid_thresholds
from sweet_jax.exits.simulation import Curve, simulate


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """All that follows from the saved outputs of one run.

    Attributes:
      calibration, validation: outputs of the rows fitted on and of the rows reported.
      temperatures: float64 [R, E].
      calibration_curve, curve: exact curves on either, under the run's policy.
      grid: the validation curve at the paper's 11 thresholds.
      area: float64 [R], mean score over the cost range on calibration rows.

    """

    calibration: ExitOutputs
    validation: ExitOutputs
    temperatures: np.ndarray
    calibration_curve: Curve
    curve: Curve
    grid: Curve
    area: np.ndarray

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
        """The replica with the largest area on the calibration rows."""
        return int(np.nanargmax(np.where(np.isnan(self.area), -np.inf, self.area)))

    @property
    def chosen(self) -> list[int]:
        """The replicas of the learning rate that is best on the calibration rows.

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
    calibration: ExitOutputs, validation: ExitOutputs, policy: str | None = None
) -> Analysis:
    """Temperatures and curves of a run, under `policy` or else the one in its identity.

    Raises UserError for an unknown policy, or one that needs scores which the outputs lack.
    """
    policy = str(policy or validation.identity.get("policy", "confidence"))
    temperatures = fit_temperatures(calibration)
    thresholds = grid_thresholds(policy, validation.logits.shape[-1])
    on_calibration = simulate(calibration, policy, temperatures=temperatures)
    return Analysis(
        calibration,
        validation,
        temperatures,
        on_calibration,
        simulate(validation, policy, temperatures=temperatures),
        simulate(validation, policy, temperatures=temperatures, thresholds=thresholds),
        np.asarray(
            [
                area(cost, values) if np.isfinite(logits).all() else np.nan
                for cost, values, logits in zip(
                    on_calibration.cost, on_calibration.score, calibration.logits, strict=True
                )
            ]
        ),
    )


def area(cost: np.ndarray, values: np.ndarray) -> float:
    """Mean of a curve [T] over its own range of cost, by trapezoids; its value if that is one.

    Of the exact curve, where the paper takes the area under its 11 points (section 5.1).
    """
    spread = cost[-1] - cost[0]
    return float(np.trapezoid(values, cost) / spread) if spread > 0 else float(values[-1])


def at_costs(grid: Curve, replica: int, costs: Sequence[float]) -> dict[str, float | None]:
    """Scores at set costs by linear interpolation between the grid's points (paper, section 5.1).

    None at a cost that the grid does not reach.
    """
    cost, values = grid.cost[replica], grid.score[replica]
    return {
        f"{c:.4g}": float(np.interp(c, cost, values))
        if cost[0] - 1e-12 <= c <= cost[-1] + 1e-12
        else None
        for c in costs
    }


@dataclasses.dataclass(frozen=True)
class Choice:
    """A threshold chosen on calibration rows, and what it does on either set of rows."""

    threshold: float
    calibration: tuple[float, float]  # cost, score
    validation: tuple[float, float]

    def as_dict(self) -> dict[str, float | list[float]]:
        """As it stands in results.json and exits.json."""
        fitted, given = list(self.calibration), list(self.validation)
        return {"threshold": self.threshold, "calibration": fitted, "validation": given}


def choose(
    analysis: Analysis, replica: int, *, cost: float | None = None, score: float | None = None
) -> Choice | float:
    """The best threshold within a mean cost, or the cheapest with at least a score.

    Chosen on calibration rows. Where none will do, the best value that is reachable: the least cost
    or the largest score.
    """
    curve = analysis.calibration_curve
    if cost is not None:
        fits = np.flatnonzero(curve.cost[replica] <= cost + 1e-12)
        if not len(fits):
            return float(curve.cost[replica].min())
        at = fits[np.lexsort((curve.cost[replica][fits], -curve.score[replica][fits]))[0]]
    else:
        wanted = -np.inf if score is None else score
        fits = np.flatnonzero(curve.score[replica] >= wanted - 1e-12)
        if not len(fits):
            return float(curve.score[replica].max())
        at = fits[np.argmin(curve.cost[replica][fits])]
    return apply_threshold(analysis, replica, float(curve.threshold[replica][at]))


def apply_threshold(analysis: Analysis, replica: int, threshold: float) -> Choice:
    """What a threshold costs and scores on the calibration and on the validation rows."""

    def read(curve: Curve) -> tuple[float, float]:
        row = curve.threshold[replica]
        at = min(int(np.searchsorted(row, threshold)), len(row) - 1)
        return float(curve.cost[replica][at]), float(curve.score[replica][at])

    return Choice(threshold, read(analysis.calibration_curve), read(analysis.curve))


def full_score(analysis: Analysis, replica: int) -> Choice | float:
    """The cheapest threshold that keeps the last exit's score on the calibration rows."""
    return choose(analysis, replica, score=float(analysis.calibration_curve.score[replica][-1]))
