"""Analysis of one run's saved outputs: calibrators, curves, operating points, the best replica.

Calibrators and thresholds are fitted on the calibration rows and applied to the validation rows.

Shape letters: R replica, E exit, N examples, T thresholds, B breakpoints.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.calibration import Calibrator, fit_calibrators
from sweet_jax.exits.cross_fitting import calibration_confidences
from sweet_jax.exits.operating_point import OperatingPoint, make_resolver
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import (
    PolicyFunction,
    check_default_policy,
    exit_confidences,
    grid_thresholds,
    policy_name,
    policy_rule,
)
from sweet_jax.exits.resolver import Resolution, ThresholdResolver
from sweet_jax.exits.simulation import Curve, exact_curve, read_curve, simulate
from sweet_jax.exits.thresholds import breakpoints


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """Holds the results that are computed from the saved outputs of one run.

    Attributes:
      calibration, validation: outputs of the calibration and validation rows.
      policy: name of the exit policy.
      calibrators: calibrator of each replica [R], fitted on the calibration rows.
      calibration_curve, curve: exact curves of the policy on the calibration and validation rows.
        On the calibration rows, a policy that reads reliability curves is cross-fitted.
      grid: validation curve at the paper's 11 thresholds.
      area: mean metric over the cost range of each replica's exact curve on the tuning rows, by
        which replicas are chosen, float64 [R]. Calibration rows are used if there are no tuning
        rows. NaN for replicas that diverged.
      tuned: whether there are tuning rows.
      function: the policy itself if it is a user-defined function, otherwise None.

    """

    calibration: ExitOutputs
    validation: ExitOutputs
    policy: str
    calibrators: tuple[Calibrator, ...]
    calibration_curve: Curve
    curve: Curve
    grid: Curve
    area: np.ndarray
    tuned: bool = False
    function: PolicyFunction | None = None
    _resolvers: dict = dataclasses.field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(policy={self.policy!r}, calibration={self.calibration}, "
            f"validation={self.validation}, curve={self.curve})"
        )

    def resolver(
        self, replica: int, policies: tuple[str | PolicyFunction, ...] | None = None
    ) -> ThresholdResolver:
        """Returns the resolver of one replica, by default for this policy only; cached."""
        wanted = policies or (self.function or self.policy,)
        if (replica, wanted) not in self._resolvers:
            rows = self.calibration.replica(replica)
            made = make_resolver(rows, wanted, self.compared, self.calibrators[replica])
            self._resolvers[replica, wanted] = made
        return self._resolvers[replica, wanted]

    def operating_point(
        self, replica: int, targets: Mapping[str, float | None] | None = None
    ) -> OperatingPoint:
        """Chooses the threshold for a target and evaluates it on both sets of rows.

        See `ThresholdResolver.resolve` for the targets and the errors raised.
        """
        return self.evaluate(replica, self.resolver(replica).resolve(self.policy, targets))

    def evaluate(self, replica: int, resolution: Resolution) -> OperatingPoint:
        """Evaluates the resolution of a target for this replica on both sets of rows."""
        threshold, certificate = resolution.threshold, resolution.certificate
        if threshold is None:
            return OperatingPoint(None, resolution.reachable, certificate=certificate)
        if certificate is None:
            calibration = _point_at(self.calibration_curve, replica, threshold)
            validation = _point_at(self.curve, replica, threshold)
            return OperatingPoint(threshold, resolution.reachable, calibration, validation)
        # A certificate's calibrator is fitted on half of the rows, so its curve differs.
        rows, calibrators = self.validation.replica(replica), (resolution.calibrator,)
        curve = simulate(rows, self.function or self.policy, calibrators=calibrators)
        point = _point_at(curve, 0, threshold)
        return OperatingPoint(threshold, resolution.reachable, None, point, certificate)

    def exits_taken(self, replica: int, threshold: float) -> np.ndarray:
        """Returns the index of the exit that each validation row takes at a threshold, int [N]."""
        rows, calibrators = self.validation.replica(replica), [self.calibrators[replica]]
        confidences = exit_confidences(rows, self.function or self.policy, calibrators)[0]  # [E, N]
        leaves = confidences >= threshold
        leaves[-1] = True
        return leaves.argmax(axis=0)

    def breakpoints(self, replica: int, calibrator: Calibrator | None = None) -> np.ndarray:
        """Returns the thresholds at which some row of either set changes its exit.

        Args:
          replica: index of the replica.
          calibrator: calibrator of a certificate; default the replica's own. See `row_breakpoints`.

        """
        pair = self.calibration.replica(replica), self.validation.replica(replica)
        policy = self.function or self.policy
        if calibrator is None:
            return row_breakpoints(*pair, policy, self.calibrators[replica])
        return row_breakpoints(*pair, policy, calibrator, cross_fitted=False)

    def as_saved(self) -> "Analysis":
        """Returns the analysis under the policy of the saved model, usually this one.

        If the confidence of a text depends on the other texts, a model cannot use the policy, and
        is saved with the corresponding one for a single text. Replicas are compared as in this
        analysis, so the best one remains the one that is saved.
        """
        policy = "" if self.function else policy_rule(self.policy).for_one_row
        if not policy:
            return self
        other = analyse(self.calibration, self.validation, policy)
        return dataclasses.replace(other, area=self.area, tuned=self.tuned)

    @property
    def compared(self) -> int:
        """Returns the number of models that were compared on the calibration rows, 1 if tuned.

        Certificates are corrected for it, see `certificates.candidate_bounds`.
        """
        return 1 if self.tuned else len(self.calibration.logits)

    @property
    def temperatures(self) -> np.ndarray:
        """Returns the temperatures of all calibrators, float64 [R, E]."""
        return np.stack([calibrator.temperatures for calibrator in self.calibrators])

    @property
    def replicas(self) -> list[tuple[int, float]]:
        """Returns the (seed, learning rate) of each replica; (0, 0.0), (1, 0.0), ... if unknown."""
        known = self.validation.identity.replicas
        return list(known) or [(i, 0.0) for i in range(len(self.validation.logits))]

    @property
    def best(self) -> int:
        """Returns the index of the replica to save: the one of `chosen` with the largest area.

        The saved model is therefore one of the replicas whose mean is reported.
        """
        return max(self.chosen, key=lambda r: -np.inf if np.isnan(self.area[r]) else self.area[r])

    @property
    def chosen(self) -> list[int]:
        """Returns the replicas of the best learning rate.

        Learning rates are compared by the number of replicas that did not diverge, then by their
        mean area, see `curve_area`. Diverged replicas are left out, unless all diverged.
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
    policy: str | PolicyFunction | None = None,
    tuning: ExitOutputs | None = None,
) -> Analysis:
    """Fits calibrators to a run's calibration rows and computes its curves.

    Args:
      calibration, validation: outputs of the rows to fit on and of the rows to report.
      policy: exit policy; default the one in the outputs' identity.
      tuning: outputs of the rows on which replicas are compared; default the calibration rows.

    Raises UserError for an unknown policy, for a policy that needs scores which the outputs lack,
    and for calibration or tuning rows of another model.

    """
    if not policy:
        policy = validation.identity.policy
        check_default_policy(policy, "this run")
    policy_rule(policy)
    for rows in (calibration, tuning):
        if rows is not None:
            validation.check_same_run(rows)
    calibrators = fit_calibrators(calibration)
    held_out = calibration_confidences(calibration, policy, calibrators)
    on_calibration = exact_curve(calibration, held_out)
    curve = simulate(validation, policy, calibrators=calibrators)
    choosing, by = calibration, on_calibration
    if tuning is not None:
        choosing, by = tuning, simulate(tuning, policy, calibrators=calibrators)
    _, exits, _, outcomes = validation.logits.shape
    if variables := validation.objective.categorical:
        outcomes = variables.outcome_count(outcomes)
    return Analysis(
        calibration,
        validation,
        policy_name(policy),
        calibrators,
        on_calibration,
        curve,
        read_curve(curve, grid_thresholds(policy, outcomes, exits, curve.threshold)),
        np.asarray(
            [
                curve_area(cost, metric) if np.isfinite(logits).all() else np.nan
                for cost, metric, logits in zip(by.cost, by.score, choosing.logits, strict=True)
            ]
        ),
        tuning is not None,
        None if isinstance(policy, str) else policy,
    )


def load_analysis(run: Path, policy: str | PolicyFunction | None = None) -> Analysis:
    """Analyzes a run directory, see `analyse`.

    Raises UserError if outputs are missing or damaged.
    """
    folder = run / "exit_outputs"
    if not (folder / "validation.npz").exists():
        raise UserError(f"{str(run)!r} is not a finished run: there is no {folder}/validation.npz")
    calibration, validation = (
        _load_split(folder, split) for split in ("calibration", "validation")
    )
    tuning = folder / "tuning.npz"
    chosen_on = _load_split(folder, "tuning") if tuning.exists() else None
    return analyse(calibration, validation, policy, chosen_on)


def _load_split(folder: Path, split: str) -> ExitOutputs:
    """Reads the outputs of a split. Raises UserError if the file holds those of another split."""
    outputs = ExitOutputs.load(folder / f"{split}.npz")
    if outputs.identity.split not in ("", split):
        raise UserError(
            f"'{folder / f'{split}.npz'}' holds the outputs of {outputs.identity.split} rows, not "
            f"of {split} rows: restore the run's own file"
        )
    return outputs


def row_breakpoints(
    calibration: ExitOutputs,
    validation: ExitOutputs,
    policy: str | PolicyFunction,
    calibrator: Calibrator,
    *,
    cross_fitted: bool = True,
) -> np.ndarray:
    """Returns the thresholds at which some row changes its exit, ascending, float64 [B].

    Args:
      calibration, validation: outputs of one replica on the calibration and validation rows.
      policy: exit policy.
      calibrator: calibrator that the policy reads.
      cross_fitted: whether a policy that reads reliability curves is cross-fitted on the
        calibration rows, as it is when thresholds are chosen.

    """
    fitted = (calibrator,)
    confidences = calibration_confidences if cross_fitted else exit_confidences
    every = (confidences(calibration, policy, fitted), exit_confidences(validation, policy, fitted))
    return breakpoints(*(np.maximum.accumulate(c[0, :-1], axis=0) for c in every))


def _point_at(curve: Curve, replica: int, threshold: float) -> tuple[float, float]:
    at = read_curve(curve, np.asarray([threshold]))
    return float(at.cost[replica, 0]), float(at.score[replica, 0])


def curve_area(cost: np.ndarray, metric: np.ndarray) -> float:
    """Computes the mean metric of a curve [T] over its range of cost, by the trapezoidal rule.

    Elsewhere, "area" refers to this mean for the exact curve. The SWEET paper chooses learning
    rates by the area under its 11 points, which `experiments.comparison` reports as the grid area.
    """
    spread = cost[-1] - cost[0]
    return float(np.trapezoid(metric, cost) / spread) if spread > 0 else float(metric[-1])


def scores_at_costs(curve: Curve, replica: int, costs: Sequence[float]) -> dict[str, float | None]:
    """Interpolates the metric linearly between a curve's points at given costs.

    The curve is the exact one, or the SWEET paper's grid of 11 thresholds for comparisons with the
    paper, which may differ from the exact curve between distant points. Returns a dict from the
    cost, as text, to the metric, or to None if the curve does not reach this cost.
    """
    cost, metric = curve.cost[replica], curve.score[replica]
    return {
        f"{c:.4g}": float(np.interp(c, cost, metric))
        if cost[0] - 1e-12 <= c <= cost[-1] + 1e-12
        else None
        for c in costs
    }
