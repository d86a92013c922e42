"""Objectives: single-label and multi-label classification, and regression."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, log_softmax, softmax
from sklearn import metrics as sklearn_metrics
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score
from test_early_exit import BATCH, EXITS, build
from test_step import settings

from sweet_jax import ExitOutputs, simulate
from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.bootstrap import bootstrap_curve
from sweet_jax.exits.calibration import fit_calibrators
from sweet_jax.exits.certificates import LossCounts, candidate_bounds, exit_losses
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.operating_point import deployable_policies, make_resolver
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.resolver import ThresholdResolver
from sweet_jax.models.early_exit import ModelOutput
from sweet_jax.objectives import OBJECTIVES
from sweet_jax.objectives.decision_thresholds import best_f1_shifts
from sweet_jax.objectives.multi_label import MULTI_LABEL, binary_cross_entropy
from sweet_jax.objectives.regression import REGRESSION, pearson, squared_error
from sweet_jax.objectives.single_label import SINGLE_LABEL, balanced_weights, reweighted
from sweet_jax.training.best_state import tuning_area
from sweet_jax.training.losses import compute_step_metrics
from sweet_jax.training.metrics import find_failures
from sweet_jax.training.step import init_state, train_step

LOGITS = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32) * 40  # [E, B, C]
LABELS = np.array([0, 2, 1, 1, 0])


@pytest.mark.parametrize("module", [np, jnp])
def test_single_label_predictions_accept_numpy_and_jax_arrays(module):
    objective = OBJECTIVES["single_label"]
    logits = module.asarray(LOGITS)
    probabilities = objective.probabilities(logits)
    assert isinstance(probabilities, type(logits))
    np.testing.assert_allclose(probabilities, softmax(LOGITS, axis=-1), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(objective.predict(logits), LOGITS.argmax(axis=-1))


def test_mean_loss_excludes_padding_rows():
    objective = OBJECTIVES["single_label"]
    logits, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    rows = -log_softmax(LOGITS.astype(np.float64), axis=-1)[:, np.arange(5), LABELS]  # [E, B]
    np.testing.assert_allclose(objective.row_loss(logits, labels), rows, rtol=1e-5, atol=1e-5)
    mask = np.array([True, False, True, True, False])
    loss = objective.mean_loss(logits, labels, jnp.asarray(mask))
    np.testing.assert_allclose(loss, rows[:, mask].mean(axis=-1), rtol=1e-5)
    correct = LOGITS.argmax(axis=-1) == LABELS
    np.testing.assert_array_equal(objective.is_correct(logits, labels), correct)


def test_class_weights_and_focal_factor_multiply_cross_entropy():
    rows = -log_softmax(LOGITS.astype(np.float64) / 20, axis=-1)[:, np.arange(5), LABELS]  # [E, B]
    logits, labels = jnp.asarray(LOGITS / 20), jnp.asarray(LABELS)
    weights = balanced_weights(LABELS, 3)
    assert weights == (5 / 6, 5 / 6, 5 / 3)
    by_class = np.asarray(weights)[LABELS]
    losses = reweighted(SINGLE_LABEL, weights).row_loss(logits, labels)
    np.testing.assert_allclose(losses, by_class * rows, rtol=1e-5)
    losses = reweighted(SINGLE_LABEL, weights, 2.0).row_loss(logits, labels)
    np.testing.assert_allclose(losses, by_class * (1 - np.exp(-rows)) ** 2 * rows, rtol=1e-4)
    # Gradients are finite, even where the probability of the label is 1.
    gradient = jax.grad(lambda z: reweighted(SINGLE_LABEL, (), 0.5).row_loss(z, labels).sum())
    assert np.isfinite(gradient(jnp.asarray(LOGITS * 10))).all()


def test_linear_solvers_equal_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 5)).astype(np.float32)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    y = x @ rng.normal(size=(5, 3)) + rng.normal(size=(80, 3))
    labels, penalty = y > 0.3, 0.01
    weighted_solve = reweighted(SINGLE_LABEL, (1.0, 3.0)).linear.solver(5, 2)
    reference = LogisticRegression(C=1 / (penalty * 80), tol=1e-8, class_weight={0: 1, 1: 3})
    kernel, bias = weighted_solve(x, labels[:, 0].astype(int), penalty)
    reference.fit(x, labels[:, 0])
    np.testing.assert_allclose(kernel[:, 1] - kernel[:, 0], reference.coef_[0], atol=1e-3)
    solve = MULTI_LABEL.linear.solver(5, 3)
    solve(x, labels, 1.0)  # the next solution starts from this one
    kernel, bias = solve(x, labels, penalty)
    for c in range(3):
        reference = LogisticRegression(C=1 / (penalty * 80), tol=1e-8).fit(x, labels[:, c])
        np.testing.assert_allclose(kernel[:, c], reference.coef_[0], atol=5e-3)
        np.testing.assert_allclose(bias[c], reference.intercept_[0], atol=5e-3)
    kernel, bias = REGRESSION.linear.solver(5, 1)(x, y[:, 0].astype(np.float32), penalty)
    reference = Ridge(alpha=penalty * 80).fit(x, y[:, 0])
    np.testing.assert_allclose(kernel[:, 0], reference.coef_, atol=1e-5)
    np.testing.assert_allclose(bias[0], reference.intercept_, atol=1e-5)


# Multi-label classification.


@pytest.fixture
def multi_label() -> RunIdentity:
    names = ("red", "green", "blue")
    return RunIdentity(objective="multi_label", classes=names, replicas=((0, 1e-3),))


def multi_label_outputs(identity: RunIdentity, rows: int, seed: int) -> ExitOutputs:
    """Returns outputs whose later exits are more accurate, and overconfident."""
    rng = np.random.default_rng(seed)
    targets = rng.random((rows, 3)) < [0.2, 0.5, 0.7]
    strength = np.asarray([0.4, 1.2, 2.5])[:, None, None]
    logits = 2 * (np.where(targets, strength, -strength) + rng.normal(size=(3, rows, 3)))
    return ExitOutputs(logits, targets, [1, 2, 4], identity=identity)


def point_by_loop(outputs, confidences, threshold, metric):
    """Returns (cost, metric) at a threshold, computed row by row."""
    exits, rows = confidences.shape
    exit_of_row = [
        next((e for e in range(exits - 1) if confidences[e, n] >= threshold), exits - 1)
        for n in range(rows)
    ]
    predictions = np.stack([outputs.predictions[0, e, n] for n, e in enumerate(exit_of_row)])
    return np.mean([outputs.cost[e] for e in exit_of_row]), metric(outputs.labels[0], predictions)


def micro_f1(targets, predictions):
    return f1_score(targets, predictions, average="micro", zero_division=0.0)


def probabilities_and_certainty(logits, temperatures):
    """Returns probabilities [E, N, C] and the mean over labels of the larger one [E, N]."""
    p = expit(logits.astype(np.float64) / temperatures[:, None, None])
    return p, np.maximum(p, 1 - p).mean(axis=-1)


def test_multi_label_temperature_minimises_loss_and_scales_confidences(multi_label):
    outputs = multi_label_outputs(multi_label, 400, seed=1)
    (calibrator,) = fit_calibrators(outputs)
    assert (abs(calibrator.temperatures - 1) > 0.2).all()
    for e, temperature in enumerate(calibrator.temperatures):
        around = temperature * np.asarray([1, 0.9, 0.99, 1.01, 1.1])
        scaled = jnp.asarray(outputs.logits[0, e] / around[:, None, None], jnp.float32)
        losses = binary_cross_entropy(scaled, outputs.labels[0]).mean(axis=-1)
        assert int(losses.argmin()) == 0
    p, expected = probabilities_and_certainty(outputs.logits[0], calibrator.temperatures)
    actual = exit_confidences(outputs, "confidence", [calibrator])[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    entropies = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)).mean(axis=-1)
    actual = exit_confidences(outputs, "entropy", [calibrator])[0]
    np.testing.assert_allclose(actual, 1 - entropies, atol=1e-9)
    actual = exit_confidences(outputs, "margin", [calibrator])[0]
    np.testing.assert_allclose(actual, np.abs(2 * p - 1).mean(axis=-1), atol=1e-12)


def test_min_confidence_is_that_of_the_least_certain_label(multi_label):
    outputs = multi_label_outputs(multi_label, 30, seed=3)
    (calibrator,) = fit_calibrators(outputs)
    scaled = outputs.logits[0].astype(np.float64) / calibrator.temperatures[:, None, None]
    confidences = exit_confidences(outputs, "min_confidence", [calibrator])[0]
    np.testing.assert_allclose(confidences, expit(np.abs(scaled)).min(axis=-1), rtol=1e-12)
    assert "min_confidence" in deployable_policies(outputs)
    single = ExitOutputs(outputs.logits, np.zeros(30, int), [1, 2, 4])
    assert "min_confidence" not in deployable_policies(single)


@pytest.mark.parametrize("policy", ["confidence", "patience", "voting", "pcee_isotonic"])
def test_multi_label_curve_equals_loop_over_rows(multi_label, policy):
    calibration, outputs = (multi_label_outputs(multi_label, rows, seed=rows) for rows in (80, 60))
    curve = simulate(outputs, policy, calibration=calibration)
    confidences = exit_confidences(outputs, policy, fit_calibrators(calibration))[0]
    for threshold, cost, metric in zip(
        curve.threshold[0], curve.cost[0], curve.score[0], strict=True
    ):
        expected = point_by_loop(outputs, confidences, threshold, micro_f1)
        np.testing.assert_allclose((cost, metric), expected, atol=1e-12)
    assert len(np.unique(curve.cost)) >= 3
    exact = simulate(outputs, policy, calibration=calibration, metric="subset_accuracy")
    expected_accuracy = (outputs.predictions[0, -1] == outputs.labels[0]).all(axis=-1).mean()
    assert exact.score[0, -1] == expected_accuracy
    with pytest.raises(UserError, match="unknown metric 'matthews'"):
        simulate(outputs, policy, calibration=calibration, metric="matthews")


def test_multi_label_operating_point_is_the_best_within_its_cost(multi_label):
    calibration, validation = (
        multi_label_outputs(multi_label, rows, seed=rows) for rows in (120, 90)
    )
    resolver = make_resolver(calibration, ("confidence", "patience"))
    assert resolver.full == micro_f1(calibration.labels[0], calibration.predictions[0, -1])
    threshold, calibrator = resolver.threshold("confidence", cost=0.6)
    curve = simulate(calibration, calibrators=[calibrator])
    affordable = curve.score[0, curve.cost[0] <= 0.6 + 1e-12]
    point = simulate(calibration, calibrators=[calibrator], thresholds=np.asarray([threshold]))
    assert point.score[0, 0] == affordable.max()
    deployed = analyse(calibration, validation, "confidence").operating_point(0, {"cost": 0.6})
    assert deployed.threshold == threshold
    _, confidences = probabilities_and_certainty(validation.logits[0], calibrator.temperatures)
    np.testing.assert_allclose(
        deployed.validation, point_by_loop(validation, confidences, threshold, micro_f1)
    )
    agreement = resolver.certificate("confidence", "agreement", 0.9)
    assert agreement.rows == 60
    area = tuning_area(
        calibration.logits, calibration.labels, [1, 2, 4], None, "micro_f1", MULTI_LABEL
    )
    assert 0.5 < area[0] < 1


def test_multi_label_metrics_equal_scikit_learn(multi_label):
    outputs = multi_label_outputs(multi_label, 70, seed=2)
    targets, predicted = outputs.labels[0], outputs.predictions[0, 0]
    expected = {
        "micro_f1": micro_f1(targets, predicted),
        "macro_f1": f1_score(targets, predicted, average="macro", zero_division=0.0),
        "subset_accuracy": sklearn_metrics.accuracy_score(targets, predicted),
        "hamming_loss": sklearn_metrics.hamming_loss(targets, predicted),
    }
    measured = {name: measure(predicted, targets) for name, measure in MULTI_LABEL.measures}
    assert measured == pytest.approx(expected, abs=1e-12)
    for metric in MULTI_LABEL.metrics:
        sign = -1 if metric.is_error else 1
        value = sign * compute_metric(metric, predicted, targets, 3)
        assert value == pytest.approx(expected[metric.name.removeprefix("neg_")], abs=1e-12)


def test_multi_label_certificate_losses_follow_the_metric(multi_label):
    outputs = multi_label_outputs(multi_label, 200, seed=4)
    predicted, targets = outputs.predictions[0], outputs.labels[0]
    exact = (predicted == targets).all(axis=-1)
    np.testing.assert_array_equal(exit_losses(outputs, 0, "risk"), exact[-1] & ~exact)
    hamming_identity = dataclasses.replace(multi_label, metric="neg_hamming_loss")
    hamming_outputs = ExitOutputs(outputs.logits, targets, [1, 2, 4], identity=hamming_identity)
    correct_share = (predicted == targets).mean(axis=-1)
    expected = np.maximum(correct_share[-1] - correct_share, 0)
    np.testing.assert_allclose(exit_losses(hamming_outputs, 0, "risk"), expected)
    expected = (predicted != predicted[-1]).mean(axis=-1)
    np.testing.assert_allclose(exit_losses(hamming_outputs, 0, "agreement"), expected)
    counts = LossCounts("risk", np.asarray([0.9, 0.6]), np.asarray([0.0, 7.25]), 100)
    bounds = candidate_bounds(counts, 0.95)
    # At a bound, e times the binomial chance of at most ceil(sum) harmed rows is 5%.
    chance = stats.binom.cdf([0, 8], 100, bounds)
    np.testing.assert_allclose(np.e * chance, 0.05, rtol=1e-6)
    assert LossCounts.from_dict(counts.as_dict()).harmed.tolist() == [0.0, 7.25]
    resolver = make_resolver(hamming_outputs, ("confidence",))
    assert resolver.certificate("confidence", "risk", 0.5).threshold is not None
    restored = ThresholdResolver.from_dict(json.loads(json.dumps(resolver.as_dict())))
    assert restored.resolve("confidence", {"error": 0.2}) is not None
    with pytest.raises(
        UserError, match="metric of this run is neg_hamming_loss: set a maximum error"
    ):
        restored.resolve("confidence", {"accuracy": 0.9})


@pytest.mark.parametrize("policy", ["confidence", "pcee"])
def test_error_and_accuracy_targets_must_match_the_kind_of_metric(multi_label, policy):
    outputs = multi_label_outputs(multi_label, 100, seed=4)
    hamming_identity = dataclasses.replace(multi_label, metric="neg_hamming_loss")
    resolver = make_resolver(outputs, (policy,))
    assert resolver.resolve(policy, {"accuracy": 0.75}).threshold is not None
    with pytest.raises(
        UserError, match=r"error=0\.25 is set, but the metric of this run is not an"
    ):
        resolver.resolve(policy, {"error": 0.25})
    resolver = make_resolver(dataclasses.replace(outputs, identity=hamming_identity), (policy,))
    assert resolver.resolve(policy, {"error": 0.25}).threshold is not None
    with pytest.raises(
        UserError, match=r"accuracy=0\.75 is set, but the metric of this run is neg_h"
    ):
        resolver.resolve(policy, {"accuracy": 0.75})


def test_decision_threshold_maximises_f1_of_its_label():
    rng = np.random.default_rng(0)
    targets = rng.random((300, 2)) < [0.15, 0.5]
    logits = np.where(targets, -0.5, -2.5) + rng.normal(size=(300, 2))  # too low by 1
    shifts = best_f1_shifts(logits, targets)
    assert (shifts < -0.2).all()
    for of_label, true, shift in zip(logits.T, targets.T, shifts, strict=True):
        predicted = of_label > np.append(shift, of_label)[:, None]  # [1 + N, N]
        f1 = 2 * (predicted & true).sum(axis=1) / (predicted.sum(axis=1) + true.sum())
        assert f1[0] > f1.max() - 0.02
    assert best_f1_shifts(logits, np.zeros_like(targets)).tolist() == [0, 0]


def test_multi_label_bootstrap_equals_simulation_of_drawn_rows(multi_label):
    outputs = multi_label_outputs(multi_label, 50, seed=5)
    band = bootstrap_curve(outputs, points=4, draws=20)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(20):
        rows = outputs.rows(rng.integers(0, 50, 50))
        drawn.append(simulate(rows, thresholds=band.threshold[0]).score[0])
    expected = np.quantile(drawn, [0.025, 0.975], axis=0).T
    np.testing.assert_allclose(band.score_interval[0], expected, atol=1e-6)


def test_multi_label_outputs_round_trip_and_bad_shapes_are_refused(multi_label, tmp_path):
    outputs = multi_label_outputs(multi_label, 20, seed=6)
    outputs.save(tmp_path / "x.npz")
    loaded = ExitOutputs.load(tmp_path / "x.npz")
    assert loaded.objective is MULTI_LABEL
    assert loaded.metric.name == "micro_f1"
    assert loaded.labels.dtype == bool
    np.testing.assert_array_equal(loaded.labels, outputs.labels)
    with pytest.raises(ValueError, match=r"labels must be \[N, C\] = \(20, 3\)"):
        ExitOutputs(outputs.logits, outputs.labels[0, :, 0], [1, 2, 4], identity=multi_label)
    with pytest.raises(UserError, match="unknown objective 'multi_lable': did you mean"):
        RunIdentity(objective="multi_lable")


def test_exit_with_constant_labels_is_reported_as_collapsed(multi_label):
    outputs = multi_label_outputs(multi_label, 30, seed=7)
    logits = outputs.logits.copy()
    logits[0, 1] = [3.0, -1.0, 2.0]
    outputs = ExitOutputs(logits, outputs.labels, [1, 2, 4], identity=multi_label)
    codes = [4, 4, 4, 4, 5, 5]  # red is 1, blue is 4
    rows = [
        {"training": "t", "step": step, "loss": [[1.0] * 3], "predicted": [[-1, code, -1]]}
        for step, code in enumerate(codes)
    ]
    (failure,) = find_failures(rows, {"t": (1, 2, 4)}, outputs)
    expected = (2, "collapsed to 'red' and 'blue'", 4)
    assert (failure["exit"], failure["what"], failure["step"]) == expected


def test_training_steps_lower_multi_label_loss():
    graphdef, params = build()
    labels = params["heads"][str(EXITS[0])]["classifier"]["bias"].shape[-1]
    rows = BATCH["row_mask"].shape[0]
    targets = np.random.default_rng(0).random((rows, labels)) < 0.5
    batch = {**BATCH, "labels": jnp.asarray(targets)}
    step_settings = settings(graphdef, objective=MULTI_LABEL)
    step = jax.jit(lambda state: train_step(step_settings, state, batch))
    state, first = step(init_state(params, 1e-2, seed=3))
    for _ in range(3):
        state, last = step(state)
    assert first.loss.shape == first.predicted.shape == (len(EXITS),)
    assert (last.loss < first.loss).all()


# Regression.


@pytest.fixture
def regression_outputs() -> ExitOutputs:
    identity = RunIdentity(objective="regression", policy="stability")
    rng = np.random.default_rng(0)
    targets = (3 + rng.normal(size=70)).astype(np.float32)
    noise = rng.normal(size=(3, 70)) * np.asarray([1.0, 0.5, 0.2])[:, None]
    return ExitOutputs((targets + noise)[..., None], targets, [1, 2, 4], identity=identity)


def negative_error(targets, predicted):
    return -sklearn_metrics.mean_absolute_error(targets, predicted)


@pytest.mark.parametrize(
    ("metric", "oracle"),
    [
        ("neg_mean_absolute_error", negative_error),
        ("pearson", lambda targets, predicted: stats.pearsonr(targets, predicted).statistic),
    ],
)
def test_regression_curve_equals_loop_over_rows(regression_outputs, metric, oracle):
    curve = simulate(regression_outputs, "stability", metric=metric)
    values = regression_outputs.predictions[0].astype(np.float64)
    confidences = exit_confidences(regression_outputs, "stability")[0]
    assert np.isneginf(confidences[0]).all()
    np.testing.assert_allclose(confidences[1:], 1 / (1 + abs(np.diff(values, axis=0))))
    for threshold, cost, value in zip(
        curve.threshold[0], curve.cost[0], curve.score[0], strict=True
    ):
        expected = point_by_loop(regression_outputs, confidences, threshold, oracle)
        np.testing.assert_allclose((cost, value), expected, rtol=1e-5)


@pytest.mark.parametrize("exit", [0, 1, 2])
def test_nan_of_an_early_exit_changes_no_point_of_the_curve(exit):
    """A row does not answer at an exit whose number is NaN."""
    identity = RunIdentity(objective="regression", policy="stability")
    rng = np.random.default_rng(0)
    targets = rng.normal(size=50)
    noise = rng.normal(size=(4, 50)) * np.asarray([1.0, 0.6, 0.4, 0.2])[:, None]
    logits = (targets + noise).astype(np.float32)[..., None]  # [E, N, 1]
    logits[exit, 0] = np.nan
    outputs = ExitOutputs(logits, targets, [1, 2, 4, 6], identity=identity)
    confidences = exit_confidences(outputs, "stability")[0]
    curve = simulate(outputs, "stability")
    points = zip(curve.threshold[0], curve.cost[0], curve.score[0], strict=True)
    for threshold, cost, score in points:
        expected = point_by_loop(
            outputs, confidences, threshold, lambda y, predicted: -np.abs(y - predicted).mean()
        )
        np.testing.assert_allclose((cost, score), expected, rtol=1e-5)
    assert np.isfinite(curve.score).all()


@pytest.mark.parametrize(("offset", "deviation"), [(0, 1), (1e6, 0.5), (1.6e9, 1e3)])
def test_pearson_is_accurate_for_large_numbers(offset, deviation):
    rng = np.random.default_rng(0)
    targets = offset + deviation * rng.standard_normal(500)
    predicted = targets + 0.5 * deviation * rng.standard_normal(500)
    expected = stats.pearsonr(targets, predicted).statistic
    assert pearson(predicted, targets) == pytest.approx(expected, rel=1e-6)
    assert pearson(np.full(500, offset), targets) == 0
    assert np.isnan(pearson(np.full(500, np.nan), targets))


def test_no_row_leaves_at_first_exit_by_stability(regression_outputs):
    """The first exit's stability is minus infinity: even the threshold -inf does not select it."""
    analysis = analyse(regression_outputs, regression_outputs)
    point = analysis.operating_point(0, {"threshold": -np.inf})
    assert (analysis.exits_taken(0, point.threshold) == 1).all()
    assert point.validation[0] == pytest.approx(0.5)


def test_regression_has_operating_points_but_no_certificates(regression_outputs, tmp_path):
    regression_outputs.save(tmp_path / "x.npz")
    assert ExitOutputs.load(tmp_path / "x.npz").labels.dtype == np.float32
    assert deployable_policies(regression_outputs) == ("stability",)
    analysis = analyse(regression_outputs, regression_outputs)
    assert analysis.operating_point(0, {"cost": 0.9}).validation[0] <= 0.9
    point = analysis.operating_point(0, {"error": 0.25})
    assert -0.25 <= point.calibration[1] < -0.15
    area = tuning_area(
        regression_outputs.logits,
        regression_outputs.labels,
        [1, 2, 4],
        None,
        "pearson",
        regression_outputs.objective,
    )
    assert 0.5 < area[0] < 1
    for target, message in (("risk", "cannot be certified for regression"), ("accuracy", "error")):
        with pytest.raises(UserError, match=message):
            analysis.operating_point(0, {target: 0.1})
    with pytest.raises(UserError, match="of objective='regression' are not probabilities"):
        simulate(regression_outputs, "confidence")
    with pytest.raises(UserError, match="'patience' does not apply to objective='regression'"):
        simulate(regression_outputs, "patience")
    targets, predicted = regression_outputs.labels[0], regression_outputs.predictions[0, 1]
    measured = {name: measure(predicted, targets) for name, measure in REGRESSION.measures}
    assert measured == pytest.approx(
        {
            "mean_absolute_error": -negative_error(targets, predicted),
            "pearson": stats.pearsonr(targets, predicted).statistic,
            "spearman": stats.spearmanr(targets, predicted).statistic,
        },
        rel=1e-5,
    )


def test_regression_exit_loss_targets_closeness_of_prediction():
    logits = jnp.asarray([[[0.5], [2.0]], [[1.0], [-1.0]]])  # [E, B, 1]
    targets, scores = jnp.asarray([1.0, -1.0]), jnp.asarray([[0.3, 0.9], [1.0, 1.0]])
    batch = {"labels": targets, "row_mask": jnp.ones(2, bool)}
    metrics = compute_step_metrics(ModelOutput(logits, scores), batch, REGRESSION)
    expected = (scores - (1 - np.tanh([[0.5, 3.0], [0.0, 0.0]]))) ** 2
    np.testing.assert_allclose(metrics.exit_loss, expected.mean(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(
        metrics.loss, squared_error(logits, targets).mean(axis=-1), rtol=1e-6
    )
    assert metrics.predicted.tolist() == [-1, -1]
