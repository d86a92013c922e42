"""The exact curve of cost against score, over every distinct threshold at once.

With the running maximum m_e of the scores over exits, an example leaves at the first e whose m_e
reaches the threshold. So its exit changes only at its own E - 1 breakpoints m_1 <= ... <= m_{E-1}:
when the threshold falls through m_e it moves from exit e + 1 to exit e. All breakpoints sorted
once, sums of those moves give cost and confusion counts everywhere.

Shape letters: R replica, E exit, N examples, C classes, T thresholds.
"""

import dataclasses

import numpy as np

from sweet_jax.exits.calibrator import Calibrator, fit_calibrator
from sweet_jax.exits.metrics import metric_from_counts
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import PolicyFunction, exit_confidences


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Speed against score, the threshold rising along T.

    The last threshold lies above every score: all examples reach the last exit. Replicas with fewer
    distinct thresholds repeat their last point.

    Attributes:
      threshold, cost, score: float64 [R, T].
      shares: float64 [R, T, E], share of the examples leaving at each exit.

    """

    threshold: np.ndarray
    cost: np.ndarray
    score: np.ndarray
    shares: np.ndarray


def simulate(
    outputs: ExitOutputs,
    policy: str | PolicyFunction = "confidence",
    *,
    calibration: ExitOutputs | None = None,
    fitted: Calibrator | None = None,
    metric: str | None = None,
    thresholds: np.ndarray | None = None,
) -> Curve:
    """What every threshold of a policy costs and scores, exactly, in O(N E log(N E)).

    Args:
      outputs: of the rows to simulate.
      policy: name of a policy, or a function of (outputs, temperatures [R, E]) that returns scores
        [R, E, N]; an example leaves at the first exit whose score is at least the threshold, the
        last exit takes the rest.
      calibration: of held-out rows of the same replicas: temperatures are fitted on them, and the
        reliability curves that PCEE reads (its threshold is an accuracy).
      fitted: what was fitted before, instead; without both, temperatures are 1.
      metric: "accuracy", "matthews" or "f1"; default the one in outputs.identity, else accuracy.
      thresholds: float [T], to read the curve there; default every distinct one.

    Raises:
      UserError: unknown policy, or one that needs calibration rows or scores that are not there.

    """
    metric = metric or outputs.identity.get("metric", "accuracy")
    if fitted is None and calibration is not None:
        fitted = fit_calibrator(calibration)
    scores = exit_confidences(outputs, policy, fitted)
    curves = [
        _simulate_one(s, p, labels, outputs, metric)
        for s, p, labels in zip(scores, outputs.predictions, outputs.labels, strict=True)
    ]
    exact = _stack(curves)
    return exact if thresholds is None else read_curve(exact, np.asarray(thresholds, np.float64))


def read_curve(curve: Curve, thresholds: np.ndarray) -> Curve:
    """The points of an exact curve at any thresholds [T]."""

    def one(threshold, cost, score, shares):
        # A threshold between two distinct ones does what the next higher one does.
        at = np.searchsorted(threshold, thresholds, side="left")
        at = np.minimum(at, len(threshold) - 1)
        return Curve(thresholds, cost[at], score[at], shares[at])

    fields = (getattr(curve, field.name) for field in dataclasses.fields(Curve))
    return _stack([one(*replica) for replica in zip(*fields, strict=True)])


_DRAWN_TOGETHER = 100  # bootstrap draws in one matrix product: a bound on memory
_HELD = 1 << 26  # numbers of a bootstrap that are in memory at once, about


@dataclasses.dataclass(frozen=True, eq=False)
class BootstrapBand:
    """How far a curve could lie elsewhere had other rows been drawn.

    Attributes:
      threshold, cost, score: float64 [R, K], points of the curve.
      cost_interval, score_interval: float64 [R, K, 2], percentile intervals over the draws.

    """

    threshold: np.ndarray
    cost: np.ndarray
    score: np.ndarray
    cost_interval: np.ndarray
    score_interval: np.ndarray


def bootstrap_curve(
    outputs: ExitOutputs,
    policy: str | PolicyFunction = "confidence",
    *,
    calibration: ExitOutputs | None = None,
    fitted: Calibrator | None = None,
    metric: str | None = None,
    points: int = 200,
    draws: int = 1000,
    level: float = 0.95,
) -> BootstrapBand:
    """Percentile intervals of a curve over rows drawn anew with replacement, thresholds fixed.

    At `points` thresholds, evenly among the distinct ones. At fixed thresholds an example's part in
    cost and counts is fixed too, so that all draws are one matrix product [draws, N] x [N, K]. The
    same draws at every call. Other arguments and errors as in `simulate`.
    """
    metric = metric or outputs.identity.get("metric", "accuracy")
    if fitted is None and calibration is not None:
        fitted = fit_calibrator(calibration)
    scores = exit_confidences(outputs, policy, fitted)
    exact = simulate(outputs, lambda *_: scores, metric=metric)
    bands = []
    for r, threshold in enumerate(exact.threshold):
        distinct = np.unique(threshold)
        at = distinct[np.linspace(0, len(distinct) - 1, points).round().astype(int)]
        tables = 2 if metric == "accuracy" else 2 + 2 * outputs.logits.shape[-1]
        size = max(1, _HELD // (tables * outputs.logits.shape[2]))  # thresholds at once
        parts = [
            _draw(outputs, r, scores[r], at[first : first + size], metric, draws)
            for first in range(0, points, size)
        ]
        drawn = np.concatenate(parts, axis=-1)  # [2, draws, K]
        low_high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2], axis=1)  # [2, 2, K]
        point = read_curve(Curve(*(v[r : r + 1] for v in vars(exact).values())), at)
        bands.append((at, point.cost[0], point.score[0], low_high[:, 0].T, low_high[:, 1].T))
    return BootstrapBand(*(np.stack(values) for values in zip(*bands, strict=True)))


def _draw(
    outputs: ExitOutputs,
    replica: int,
    scores: np.ndarray,
    thresholds: np.ndarray,
    metric: str,
    draws: int,
) -> np.ndarray:
    """(cost, score) of each draw at each threshold, float64 [2, draws, K]."""
    labels, classes = outputs.labels[replica], range(outputs.logits.shape[-1])
    count = len(labels)
    levels = np.maximum.accumulate(scores[:-1], axis=0)  # [E - 1, N]
    place = (levels[None] < thresholds[:, None, None]).sum(axis=1)  # [K, N]
    answers = np.take_along_axis(outputs.predictions[replica], place, axis=0)  # [K, N]
    right = answers == labels
    tables = [outputs.cost[place], right]
    if metric != "accuracy":
        tables += [answers == c for c in classes]
        tables += [right & (answers == c) for c in classes]
    parts = np.stack(tables).astype(np.float32).reshape(-1, count)  # [tables x K, N]
    rng, found = np.random.default_rng(0), np.empty((2, draws, len(thresholds)))
    for first in range(0, draws, _DRAWN_TOGETHER):
        several = range(first, min(first + _DRAWN_TOGETHER, draws))
        times = np.stack(
            [np.bincount(rng.integers(0, count, count), minlength=count) for _ in several]
        ).astype(np.float32)
        product = (times @ parts.T).reshape(len(several), len(tables), -1).astype(np.float64)
        for draw, sums, weights in zip(several, product, times, strict=True):
            true = np.bincount(labels, weights, len(classes))
            given, hits = sums[2 : 2 + len(classes)].T, sums[2 + len(classes) :].T
            found[:, draw] = sums[0] / count, metric_from_counts(metric, sums[1], given, hits, true)
    return found


def _simulate_one(
    scores: np.ndarray,
    predictions: np.ndarray,
    labels: np.ndarray,
    outputs: ExitOutputs,
    metric: str,
) -> Curve:
    """The exact curve of one replica: scores, predictions [E, N], labels [N]; arrays without R."""
    exits, count = scores.shape
    classes = outputs.logits.shape[-1]
    true = np.bincount(labels, minlength=classes)
    points = np.maximum.accumulate(scores[:-1], axis=0)  # [E - 1, N], breakpoints
    move = np.argsort(-points, axis=None, kind="stable")  # highest first, as the threshold falls
    move = move[points.ravel()[move] > -np.inf]  # no threshold is that low
    leaving, example = np.unravel_index(move, points.shape)
    level = points[leaving, example]  # [(E - 1) N]
    # One situation after each group of equal breakpoints, and one above them all.
    changes = np.append(level[1:] != level[:-1], True)[: len(level)]
    ends = np.concatenate([[0], np.flatnonzero(changes) + 1])

    def sums(start: float | np.ndarray, moves: np.ndarray) -> np.ndarray:
        total = np.concatenate([np.zeros((1, *moves.shape[1:])), np.cumsum(moves, axis=0)])
        return start + total[ends]

    into, out_of = predictions[leaving, example], predictions[leaving + 1, example]
    right_in, right_out = into == labels[example], out_of == labels[example]
    last = predictions[-1]
    right = sums((last == labels).sum(), right_in.astype(int) - right_out)
    per_class = np.zeros((len(level), 0 if metric == "accuracy" else classes), np.int32)
    given, hits = per_class, per_class
    if metric != "accuracy":
        given = _class_moves(into, out_of, 1, 1, classes)
        hits = _class_moves(into, out_of, right_in, right_out, classes)
        given = sums(np.bincount(last, minlength=classes), given)
        hits = sums(np.bincount(last[last == labels], minlength=classes), hits)
    shares = sums(np.eye(exits)[-1] * count, np.eye(exits)[leaving] - np.eye(exits)[leaving + 1])
    above = np.nextafter(level[:1], np.inf) if len(level) else np.zeros(1)
    threshold = np.concatenate([above, level[ends[1:] - 1]])
    cost = shares @ np.asarray(outputs.cost) / count
    values = (threshold, cost, metric_from_counts(metric, right, given, hits, true), shares / count)
    # A score of +inf always leaves: then no threshold lies above every score.
    first = 1 if np.isposinf(threshold[0]) else 0
    return Curve(*(value[first:][::-1] for value in values))


def _class_moves(into, out_of, arriving, departing, classes: int) -> np.ndarray:
    moves = np.zeros((len(into), classes), np.int32)
    rows = np.arange(len(into))
    np.add.at(moves, (rows, into), arriving)
    np.subtract.at(moves, (rows, out_of), departing)
    return moves


def _stack(curves: list[Curve]) -> Curve:
    longest = max(len(curve.threshold) for curve in curves)

    def padded(name: str) -> np.ndarray:
        arrays = [getattr(curve, name) for curve in curves]
        return np.stack(
            [np.concatenate([a, np.repeat(a[-1:], longest - len(a), axis=0)]) for a in arrays]
        )

    return Curve(*(padded(field.name) for field in dataclasses.fields(Curve)))
