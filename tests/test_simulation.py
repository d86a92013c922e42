"""Tests of the exact curve against a loop over examples, with ties and missing classes."""

import dataclasses
import itertools
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax

from sweet_jax import ExitOutputs, simulate
from sweet_jax.errors import UserError
from sweet_jax.exits.bootstrap import bootstrap_curve
from sweet_jax.exits.calibration import Calibrator
from sweet_jax.exits.outputs import layer_cost
from sweet_jax.exits.policies import exit_confidences, grid_thresholds
from sweet_jax.objectives import SINGLE_LABEL

METRICS = [metric.name for metric in SINGLE_LABEL.metrics]
# Few distinct values make ties, between examples and between the exits of one.
VALUES = st.sampled_from([-1.5, -1.0, 0.0, 0.25, 1.0, 3.0])


def brute_force(scores, predictions, labels, cost, threshold, metric):
    """Returns (cost, score, shares) at one threshold, computed example by example."""
    exits = len(scores)
    taken_exits = []
    for n in range(len(labels)):
        taken_exits.append(
            next((e for e in range(exits - 1) if scores[e][n] >= threshold), exits - 1)
        )
    predicted = np.asarray([predictions[e][n] for n, e in enumerate(taken_exits)])
    shares = np.bincount(taken_exits, minlength=exits) / len(labels)
    return np.mean([cost[e] for e in taken_exits]), plain_score(metric, predicted, labels), shares


def plain_score(metric, predicted, labels):
    """Returns the value of a metric, computed from its definition."""
    if metric == "accuracy":
        return np.mean(predicted == labels)
    if metric == "f1":
        true_positives = np.sum((predicted == 1) & (labels == 1))
        predicted_or_true = np.sum(predicted == 1) + np.sum(labels == 1)
        return 2 * true_positives / predicted_or_true if predicted_or_true else 0.0
    if metric in ("macro_f1", "balanced_accuracy"):
        true_classes, predicted_classes = set(labels.tolist()), set(predicted.tolist())
        values = []
        for c in true_classes | predicted_classes if metric == "macro_f1" else true_classes:
            true_positives = np.sum((predicted == c) & (labels == c))
            total = np.sum(labels == c)
            if metric == "macro_f1":
                true_positives, total = 2 * true_positives, total + np.sum(predicted == c)
            values.append(true_positives / total)
        return np.mean(values)
    # Matthews as the correlation of the indicator matrices (Gorodkin 2004, eq. 3 and 4).
    classes = range(max(predicted.max(), labels.max()) + 1)
    x = np.asarray([predicted == c for c in classes], float)
    y = np.asarray([labels == c for c in classes], float)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    denominator = np.sqrt((x * x).sum() * (y * y).sum())
    return (x * y).sum() / denominator if denominator > 1e-12 else 0.0


@st.composite
def tables(draw):
    r, e, n = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    c = draw(st.integers(2, 4))
    logits = draw(arrays(np.float32, (r, e, n, c), elements=VALUES))
    labels = draw(arrays(np.int64, (r, n), elements=st.integers(0, c - 1)))
    method = draw(st.sampled_from(["sweet", "multi_model"]))
    layers = np.cumsum(draw(st.lists(st.integers(1, 3), min_size=e, max_size=e)))
    return ExitOutputs(logits, labels, layers, layer_cost(layers, method))


@settings(deadline=None, max_examples=200)
@given(tables(), st.sampled_from(METRICS))
def test_curve_equals_brute_force_at_every_threshold(outputs, metric):
    if metric == "f1" and outputs.logits.shape[-1] != 2:
        metric = "accuracy"
    curve = simulate(outputs, "confidence", metric=metric)
    for r in range(len(outputs.logits)):
        scores = exit_confidences(outputs, "confidence")[r]
        distinct = np.unique(np.maximum.accumulate(scores[:-1]))
        thresholds = curve.threshold[r]
        assert len(np.unique(thresholds)) == len(distinct) + 1
        assert np.all(np.diff(thresholds) >= 0)
        # Below, at, between and above every score.
        probes = [*thresholds, -1.0, *(distinct[1:] + distinct[:-1]) / 2, 2.0]
        points = simulate(outputs, metric=metric, thresholds=np.asarray(probes))
        for t, threshold in enumerate(probes):
            cost, score, shares = brute_force(
                scores, outputs.predictions[r], outputs.labels[r], outputs.cost, threshold, metric
            )
            np.testing.assert_allclose(points.cost[r, t], cost, atol=1e-12)
            np.testing.assert_allclose(points.score[r, t], score, atol=1e-9)
            np.testing.assert_allclose(points.shares[r, t], shares, atol=1e-12)


def test_confidence_is_largest_calibrated_probability():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    outputs = ExitOutputs(logits, np.arange(5) % 4, [1, 2, 3])
    temperatures = np.asarray([[1.0, 2.0, 0.5], [3.0, 1.0, 1.0]])
    expected = softmax(outputs.logits.astype(float) / temperatures[..., None, None], axis=-1).max(
        -1
    )
    for policy in ("confidence", "confidence_float32"):
        confidences = exit_confidences(outputs, policy, [Calibrator(t) for t in temperatures])
        np.testing.assert_allclose(confidences, expected, rtol=1e-6)


@settings(deadline=None, max_examples=100)
@given(tables(), st.data(), st.sampled_from(["learning_to_exit", "learning_to_exit_min_max"]))
def test_learning_to_exit_policies_equal_brute_force(outputs, data, policy):
    shape = outputs.logits.shape[:3]
    levels = st.sampled_from([0.0, 0.1, 0.5, 0.75, 1.0])
    scores = data.draw(arrays(np.float32, shape, elements=levels)).astype(float)
    outputs = dataclasses.replace(outputs, exit_scores=scores)
    if policy == "learning_to_exit":
        scores = np.where(scores == 1, 1 - 1e-9, scores)  # a threshold of 1 is never reached
    else:
        for row in scores.reshape(-1, shape[-1]):
            low, high = row.min(), row.max()
            row[:] = (row - low) / (high - low) if high > low else -np.inf
    grid = grid_thresholds(policy, 3, len(outputs.layers))
    np.testing.assert_allclose(grid, np.arange(11) / 10, atol=1e-15)
    points = simulate(outputs, policy, thresholds=grid)
    for r, t in itertools.product(range(shape[0]), range(11)):
        cost, score, shares = brute_force(
            scores[r], outputs.predictions[r], outputs.labels[r], outputs.cost, grid[t], "accuracy"
        )
        np.testing.assert_allclose(points.cost[r, t], cost, atol=1e-12)
        np.testing.assert_allclose(points.score[r, t], score, atol=1e-12)
        np.testing.assert_allclose(points.shares[r, t], shares, atol=1e-12)


@pytest.mark.parametrize("policy", ["learning_to_exit", "learning_to_exit_min_max"])
def test_learning_to_exit_policy_refuses_outputs_without_exit_scores(policy):
    outputs = ExitOutputs(np.zeros((1, 3, 2)), [0, 1, 1], [2])
    with pytest.raises(UserError, match="have no learning-to-exit scores: train with") as error:
        simulate(outputs, policy)
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=100)
@given(
    arrays(np.float64, (3, 9), elements=st.sampled_from([-np.inf, -2.0, 0.0, 0.5, 0.5, 7.0])),
    arrays(np.int64, (3, 9), elements=st.integers(0, 2)),
    arrays(np.int64, (9,), elements=st.integers(0, 2)),
)
def test_policy_may_be_any_function(scores, predictions, labels):
    logits = np.eye(3)[predictions][None] * 5
    outputs = ExitOutputs(logits, labels, [1, 2, 4])
    curve = simulate(outputs, lambda outputs, temperatures: scores[None], metric="matthews")
    for t, cost, score in zip(curve.threshold[0], curve.cost[0], curve.score[0], strict=True):
        expected = brute_force(scores, predictions, labels, outputs.cost, t, "matthews")
        np.testing.assert_allclose((cost, score), expected[:2], atol=1e-9)


def test_curve_of_single_exit_has_one_point():
    outputs = ExitOutputs(np.random.default_rng(0).normal(size=(1, 5, 2)), [0, 1, 0, 1, 1], [6])
    curve = simulate(outputs)
    assert curve.cost.tolist() == [[1.0]]
    assert curve.score[0, 0] == np.mean(outputs.predictions[0, 0] == outputs.labels[0])


def test_threshold_of_one_reaches_last_exit_except_in_float32():
    logits = np.zeros((1, 2, 3, 2))
    logits[..., 0] = 60  # softmax is 1.0 in float64 too
    outputs = ExitOutputs(logits, [0, 0, 0], [1, 2])
    for policy, cost in (("confidence", 1.0), ("confidence_float32", 0.5)):
        curve = simulate(outputs, policy, thresholds=np.asarray([1.0]))
        assert curve.cost[0, 0] == cost


def test_rows_with_nan_logits_never_leave_early():
    logits = np.random.default_rng(0).normal(size=(1, 2, 4, 2))
    logits[0, 0] = np.nan
    curve = simulate(ExitOutputs(logits, [0, 1, 0, 1], [1, 2]), thresholds=np.asarray([0.0, 0.9]))
    assert curve.cost.tolist() == [[1.0, 1.0]]


def test_replicas_with_fewer_thresholds_repeat_their_last_point():
    logits = np.random.default_rng(0).normal(size=(2, 2, 6, 2))
    logits[1] = 1.0
    curve = simulate(ExitOutputs(logits, np.arange(6) % 2, [1, 2]))
    assert curve.threshold.shape == curve.cost.shape == curve.score.shape == (2, 7)
    assert np.all(curve.cost[1, 1:] == 1.0)


def test_unknown_policy_error_suggests_closest_name():
    outputs = ExitOutputs(np.zeros((1, 3, 2)), [0, 1, 1], [2])
    with pytest.raises(UserError, match="did you mean 'confidence'"):
        simulate(outputs, "confidenc")


@pytest.mark.parametrize("policy", ["confidence", "confidence_float32"])
def test_temperature_changes_confidences_but_not_last_exit_metric(policy):
    rng = np.random.default_rng(1)
    outputs = ExitOutputs(rng.normal(size=(1, 2, 50, 3)), rng.integers(0, 3, 50), [1, 2])
    hot = simulate(outputs, policy, calibrators=[Calibrator(np.full(2, 5.0))])
    cold = simulate(outputs, policy)
    assert hot.threshold[0, 0] < cold.threshold[0, 0]
    assert hot.score[0, -1] == cold.score[0, -1]


@pytest.mark.parametrize("metric", METRICS)
def test_bootstrap_equals_simulating_resampled_rows(metric):
    rng = np.random.default_rng(3)
    outputs = ExitOutputs(rng.normal(size=(2, 3, 40, 2)), rng.integers(0, 2, 40), [1, 2, 3])
    band = bootstrap_curve(outputs, metric=metric, points=5, draws=30)
    for r in range(2):
        rng, curves = np.random.default_rng(0), []
        for _ in range(30):
            rows = outputs.replica(r).rows(rng.integers(0, 40, 40))
            curves.append(simulate(rows, metric=metric, thresholds=band.threshold[r]))
        expected = np.quantile([curve.score[0] for curve in curves], [0.025, 0.975], axis=0).T
        np.testing.assert_allclose(band.score_interval[r], expected, atol=1e-12)
        point = simulate(outputs.replica(r), metric=metric, thresholds=band.threshold[r])
        np.testing.assert_allclose(band.score[r], point.score[0])


def trace_memory(function: Callable) -> tuple:
    """Returns (result of a call of the function, peak of the memory that it allocated, bytes)."""
    tracemalloc.start()
    result = function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, peak


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_bootstrap_memory_is_bounded(metric, monkeypatch):
    rng = np.random.default_rng(3)
    outputs = ExitOutputs(rng.normal(size=(3, 2000, 20)), rng.integers(0, 20, 2000), [1, 2, 3])
    in_one_part = bootstrap_curve(outputs, metric=metric, draws=20)
    monkeypatch.setattr("sweet_jax.exits.bootstrap._HELD", 100_000)  # otherwise 84 MB of float32
    in_parts, peak = trace_memory(lambda: bootstrap_curve(outputs, metric=metric, draws=20))
    assert peak < 20e6
    for name, value in vars(in_one_part).items():
        np.testing.assert_allclose(getattr(in_parts, name), value, atol=1e-9)


def test_simulation_memory_is_linear_in_examples():
    """Every array is linear in N: there is no N x T table."""
    rng = np.random.default_rng(0)
    outputs = ExitOutputs(rng.normal(size=(4, 40_000, 3)), rng.integers(0, 3, 40_000), [1, 2, 4, 6])
    curve, peak = trace_memory(lambda: simulate(outputs, metric="matthews"))
    assert curve.threshold.shape[1] > 60_000
    assert peak < 120_000 * 8 * 60  # 60 float64 for each of the (E - 1) N breakpoints
