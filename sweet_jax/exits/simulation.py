"""The exact curve of cost against metric, for all distinct thresholds at once.

Let m_e be the running maximum of an example's confidences over exits. The example leaves at the
first e whose m_e reaches the threshold, so its exit changes only at its own E - 1 breakpoints
m_1 <= ... <= m_{E-1}: as the threshold falls through m_e, it moves from exit e + 1 to exit e. After
sorting all breakpoints once, cumulative sums over these moves give the cost and the statistics of
the metric at every threshold.

Shape letters: R replica, E exit, N examples, T thresholds, M moves of an example from one exit to
the previous one, G groups of equal breakpoints, S statistics of a row, U statistics of a target.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.calibration import Calibrator, fit_calibrators
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import PolicyFunction, exit_confidences
from sweet_jax.objectives import Metric


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Holds cost and metric at thresholds that ascend along T.

    The last threshold of an exact curve lies above every confidence, so that all examples reach the
    last exit. Replicas with fewer distinct thresholds repeat their last point.

    Attributes:
      threshold, cost, score: points of the curve, float64 [R, T]; score is the metric.
      shares: share of the examples that leave at each exit, float64 [R, T, E].

    """

    threshold: np.ndarray
    cost: np.ndarray
    score: np.ndarray
    shares: np.ndarray

    def __repr__(self) -> str:
        r, t, e = self.shares.shape
        return f"{type(self).__name__}(R={r}, T={t}, E={e})"


def simulate(
    outputs: ExitOutputs,
    policy: str | PolicyFunction = "confidence",
    *,
    calibration: ExitOutputs | None = None,
    calibrators: Sequence[Calibrator] | None = None,
    metric: str | Metric | None = None,
    thresholds: np.ndarray | None = None,
) -> Curve:
    """Computes the exact cost and metric of every threshold of a policy, in O(N E log(N E)).

    Args:
      outputs: outputs of the rows to simulate.
      policy: name of a policy, or a function of (outputs, temperatures [R, E]) that returns exit
        confidences [R, E, N]; an example leaves at the first exit whose confidence is at least the
        threshold, and the last exit takes the rest.
      calibration: outputs of the same replicas on held-out rows, on which temperatures and PCEE's
        reliability curves are fitted (PCEE's threshold is an accuracy).
      calibrators: calibrators of the replicas [R] to use instead of fitting them. Without both,
        temperatures are 1, and thresholds are not those of `AdaptiveClassifier`; `Run.curve` passes
        the run's calibration rows.
      metric: one of the objective's metrics (for single-label classification "accuracy",
        "matthews", "f1", "macro_f1" or "balanced_accuracy"); default the one in outputs.identity.
      thresholds: thresholds at which to read the curve, float [T]; default every distinct one.

    Raises:
      UserError: an argument has the wrong type; the policy is unknown, or needs calibration rows,
        learned scores or probabilities that are not available; the calibration rows are of another
        model; the metric is unknown; or a threshold is NaN.

    """
    for name, value in {"outputs": outputs, "calibration": calibration or outputs}.items():
        if not isinstance(value, ExitOutputs):
            raise UserError(
                f"{name} must be an ExitOutputs; got {value!r:.80}: use ExitOutputs.load"
            )
    chosen = outputs.objective.metric(metric or outputs.metric)
    if calibrators is None and calibration is not None:
        outputs.check_same_run(calibration)
        calibrators = fit_calibrators(calibration)
    exact = exact_curve(outputs, exit_confidences(outputs, policy, calibrators), chosen)
    if thresholds is None:
        return exact
    thresholds = np.asarray(thresholds, np.float64)
    if np.isnan(thresholds).any():
        raise UserError("thresholds must be numbers; got nan")
    return read_curve(exact, thresholds)


def exact_curve(
    outputs: ExitOutputs, confidences: np.ndarray, metric: Metric | None = None
) -> Curve:
    """Computes the cost and metric of every threshold of exit confidences, float64 [R, E, N].

    metric: of the outputs' objective; default the one in outputs.identity.
    """
    metric = metric or outputs.metric
    curves = [_simulate_one(outputs.replica(r), each, metric) for r, each in enumerate(confidences)]
    return _stack(curves)


def read_curve(curve: Curve, thresholds: np.ndarray) -> Curve:
    """Returns the points of an exact curve at any thresholds [T]."""
    # Between two distinct thresholds, examples leave as at the higher one.
    at = np.stack([np.searchsorted(own, thresholds) for own in curve.threshold])  # [R, T]
    at = np.minimum(at, curve.threshold.shape[1] - 1)
    rows = np.arange(len(at))[:, None]
    threshold = np.tile(thresholds, (len(at), 1))
    return Curve(threshold, curve.cost[rows, at], curve.score[rows, at], curve.shares[rows, at])


def _simulate_one(outputs: ExitOutputs, confidences: np.ndarray, metric: Metric) -> Curve:
    """Computes the exact curve of one replica, arrays without R; confidences float64 [E, N]."""
    exits, count = confidences.shape
    points = np.maximum.accumulate(confidences[:-1], axis=0)  # [E - 1, N], breakpoints
    move = np.argsort(-points, axis=None, kind="stable")  # highest first, as the threshold falls
    move = move[points.ravel()[move] > -np.inf]  # no threshold is that low
    leaving, example = np.unravel_index(move, points.shape)  # [M]
    level = points[leaving, example]  # [M]
    # One point of the curve after each group of equal breakpoints, and one above them all.
    changes = np.append(level[1:] != level[:-1], True)[: len(level)]
    ends = np.concatenate([[0], np.flatnonzero(changes) + 1])  # [1 + G]

    def sums(rows: np.ndarray) -> np.ndarray:
        """Sums rows [E, N, S] over the examples, each at its exit: float64 [1 + G, S]."""
        moved = np.zeros((1 + len(move), rows.shape[-1]))
        np.subtract(rows[leaving, example], rows[leaving + 1, example], out=moved[1:], dtype=float)
        np.cumsum(moved, axis=0, out=moved)
        return rows[-1].sum(axis=0) + moved[ends]

    targets, classes = outputs.labels[0], outputs.logits.shape[-1]
    statistics = metric.row_statistics(outputs.predictions[0], targets, classes)  # [E, N, S]
    summed = sums(np.nan_to_num(statistics, posinf=0.0, neginf=0.0))  # [1 + G, S]
    diverged = ~np.isfinite(statistics)
    if diverged.any():  # cumulative sums would keep a NaN at points where its exit does not answer
        # Without a full model to compare with, no point has a metric.
        summed[(sums(diverged) > 0) | diverged[-1].any(axis=0)] = np.nan
    totals = metric.target_statistics(targets, classes).sum(axis=0)  # [U]
    shares = sums(np.broadcast_to(np.eye(exits)[:, None], (exits, count, exits)))  # counts
    above = np.nextafter(level[:1], np.inf) if len(level) else np.zeros(1)
    values = (
        np.concatenate([above, level[ends[1:] - 1]]),
        shares @ outputs.cost / count,
        metric.value(summed, totals),
        shares / count,
    )
    return Curve(*(value[::-1] for value in values))


def _stack(curves: list[Curve]) -> Curve:
    longest = max(len(curve.threshold) for curve in curves)

    def padded(name: str) -> np.ndarray:
        arrays = [getattr(curve, name) for curve in curves]
        return np.stack(
            [np.concatenate([a, np.repeat(a[-1:], longest - len(a), axis=0)]) for a in arrays]
        )

    return Curve(*(padded(field.name) for field in dataclasses.fields(Curve)))
