"""The exact curve against the plain loop, on tables with ties, missing classes and one exit."""

import dataclasses
import itertools

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
    """(cost, score, shares) of one threshold, example by example."""
    exits = len(scores)
    taken = []
    for n in range(len(labels)):
        taken.append(next((e for e in range(exits - 1) if scores[e][n] >= threshold), exits - 1))
    answers = np.asarray([predictions[e][n] for n, e in enumerate(taken)])
    shares = np.bincount(taken, minlength=exits) / len(labels)
    return np.mean([cost[e] for e in taken]), plain_score(metric, answers, labels), shares


def plain_score(metric, answers, labels):
    if metric == "accuracy":
        return np.mean(answers == labels)
    if metric == "f1":
        both = np.sum((answers == 1) & (labels == 1))
        given_or_true = np.sum(answers == 1) + np.sum(labels == 1)
        return 2 * both / given_or_true if given_or_true else 0.0
    if metric in ("macro_f1", "balanced_accuracy"):
        true, given = set(labels.tolist()), set(answers.tolist())
        values = []
        for c in true | given if metric == "macro_f1" else true:
            both = np.sum((answers == c) & (labels == c))
            whole = np.sum(labels == c)
            if metric == "macro_f1":
                both, whole = 2 * both, whole + np.sum(answers == c)
            values.append(both / whole)
        return np.mean(values)
    # Matthews as the correlation of the indicator matrices (Gorodkin 2004, eq. 3 and 4).
    classes = range(max(answers.max(), labels.max()) + 1)
    x = np.asarray([answers == c for c in classes], float)
    y = np.asarray([labels == c for c in classes], float)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    below = np.sqrt((x * x).sum() * (y * y).sum())
    return (x * y).sum() / below if below > 1e-12 else 0.0


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
def test_every_threshold_equals_brute_force(outputs, metric):
    if metric == "f1" and outputs.logits.shape[-1] != 2:
        metric = "accuracy"
    curve = simulate(outputs, "confidence", metric=metric)
    for r in range(len(outputs.logits)):
        scores = exit_confidences(outputs, "confidence")[r]
        distinct = np.unique(np.maximum.accumulate(scores[:-1]))
        inside = curve.threshold[r]
        assert len(np.unique(inside)) == len(distinct) + 1
        assert np.all(np.diff(inside) >= 0)
        # Below, at, between and above every score.
        probes = [*inside, -1.0, *(distinct[1:] + distinct[:-1]) / 2, 2.0]
        points = simulate(outputs, metric=metric, thresholds=np.asarray(probes))
        for t, threshold in enumerate(probes):
            cost, score, shares = brute_force(
                scores, outputs.predictions[r], outputs.labels[r], outputs.cost, threshold, metric
            )
            np.testing.assert_allclose(points.cost[r, t], cost, atol=1e-12)
            np.testing.assert_allclose(points.score[r, t], score, atol=1e-9)
            np.testing.assert_allclose(points.shares[r, t], shares, atol=1e-12)


def test_confidence_is_the_largest_probability():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    outputs = ExitOutputs(logits, np.arange(5) % 4, [1, 2, 3])
    temperatures = np.asarray([[1.0, 2.0, 0.5], [3.0, 1.0, 1.0]])
    wanted = softmax(outputs.logits.astype(float) / temperatures[..., None, None], axis=-1).max(-1)
    for policy in ("confidence", "confidence_float32"):
        found = exit_confidences(outputs, policy, [Calibrator(t) for t in temperatures])
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@settings(deadline=None, max_examples=100)
@given(tables(), st.data(), st.sampled_from(["learning_to_exit", "learning_to_exit_min_max"]))
def test_learning_to_exit_equals_brute_force(outputs, data, policy):
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
def test_outputs_without_learned_scores_are_refused_in_one_line(policy):
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
def test_a_policy_may_be_any_function(scores, predictions, labels):
    logits = np.eye(3)[predictions][None] * 5
    outputs = ExitOutputs(logits, labels, [1, 2, 4])
    curve = simulate(outputs, lambda outputs, temperatures: scores[None], metric="matthews")
    for t, cost, score in zip(curve.threshold[0], curve.cost[0], curve.score[0], strict=True):
        wanted = brute_force(scores, predictions, labels, outputs.cost, t, "matthews")
        np.testing.assert_allclose((cost, score), wanted[:2], atol=1e-9)


def test_one_exit_is_one_point():
    outputs = ExitOutputs(np.random.default_rng(0).normal(size=(1, 5, 2)), [0, 1, 0, 1, 1], [6])
    curve = simulate(outputs)
    assert curve.cost.tolist() == [[1.0]]
    assert curve.score[0, 0] == np.mean(outputs.predictions[0, 0] == outputs.labels[0])


def test_a_threshold_of_one_reaches_the_last_exit_unless_rounded_to_it():
    logits = np.zeros((1, 2, 3, 2))
    logits[..., 0] = 60  # softmax is 1.0 in float64 too
    outputs = ExitOutputs(logits, [0, 0, 0], [1, 2])
    for policy, cost in (("confidence", 1.0), ("confidence_float32", 0.5)):
        curve = simulate(outputs, policy, thresholds=np.asarray([1.0]))
        assert curve.cost[0, 0] == cost


def test_what_is_not_a_number_never_answers_early():
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


def test_unknown_policies_name_the_nearest():
    outputs = ExitOutputs(np.zeros((1, 3, 2)), [0, 1, 1], [2])
    with pytest.raises(UserError, match="did you mean 'confidence'"):
        simulate(outputs, "confidenc")


@pytest.mark.parametrize("policy", ["confidence", "confidence_float32"])
def test_temperature_changes_scores_not_answers(policy):
    rng = np.random.default_rng(1)
    outputs = ExitOutputs(rng.normal(size=(1, 2, 50, 3)), rng.integers(0, 3, 50), [1, 2])
    hot = simulate(outputs, policy, calibrators=[Calibrator(np.full(2, 5.0))])
    cold = simulate(outputs, policy)
    assert hot.threshold[0, 0] < cold.threshold[0, 0]
    assert hot.score[0, -1] == cold.score[0, -1]


@pytest.mark.parametrize("metric", METRICS)
def test_bootstrap_equals_drawing_rows_and_simulating_anew(metric):
    rng = np.random.default_rng(3)
    outputs = ExitOutputs(rng.normal(size=(2, 3, 40, 2)), rng.integers(0, 2, 40), [1, 2, 3])
    band = bootstrap_curve(outputs, metric=metric, points=5, draws=30)
    for r in range(2):
        rng, drawn = np.random.default_rng(0), []
        for _ in range(30):
            rows = outputs.replica(r).rows(rng.integers(0, 40, 40))
            drawn.append(simulate(rows, metric=metric, thresholds=band.threshold[r]))
        wanted = np.quantile([curve.score[0] for curve in drawn], [0.025, 0.975], axis=0).T
        np.testing.assert_allclose(band.score_interval[r], wanted, atol=1e-12)
        point = simulate(outputs.replica(r), metric=metric, thresholds=band.threshold[r])
        np.testing.assert_allclose(band.score[r], point.score[0])


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_the_memory_of_a_bootstrap_is_bounded(metric, monkeypatch):
    import tracemalloc

    rng = np.random.default_rng(3)
    outputs = ExitOutputs(rng.normal(size=(3, 2000, 20)), rng.integers(0, 20, 2000), [1, 2, 3])
    whole = bootstrap_curve(outputs, metric=metric, draws=20)
    monkeypatch.setattr("sweet_jax.exits.bootstrap._HELD", 100_000)  # 84 MB of float32 else
    tracemalloc.start()
    parts = bootstrap_curve(outputs, metric=metric, draws=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    for name, value in vars(whole).items():
        np.testing.assert_allclose(getattr(parts, name), value, atol=1e-9)


def test_the_work_grows_with_the_examples_not_with_the_thresholds():
    """Every array of a large simulation is linear in N: bounded memory, no N x T table."""
    import tracemalloc

    rng = np.random.default_rng(0)
    outputs = ExitOutputs(rng.normal(size=(4, 40_000, 3)), rng.integers(0, 3, 40_000), [1, 2, 4, 6])
    tracemalloc.start()
    curve = simulate(outputs, metric="matthews")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert curve.threshold.shape[1] > 60_000
    assert peak < 120_000 * 8 * 60  # sixty float64 for each of the (E - 1) N breakpoints
