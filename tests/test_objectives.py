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
def test_single_label_predicts_and_gives_probabilities_of_either_kind_of_array(module):
    objective = OBJECTIVES["single_label"]
    logits = module.asarray(LOGITS)
    found = objective.probabilities(logits)
    assert isinstance(found, type(logits))
    np.testing.assert_allclose(found, softmax(LOGITS, axis=-1), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(objective.predict(logits), LOGITS.argmax(axis=-1))


def test_the_loss_is_the_mean_over_rows_that_are_no_padding():
    objective = OBJECTIVES["single_label"]
    logits, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    rows = -log_softmax(LOGITS.astype(np.float64), axis=-1)[:, np.arange(5), LABELS]  # [E, B]
    np.testing.assert_allclose(objective.row_loss(logits, labels), rows, rtol=1e-5, atol=1e-5)
    mask = np.array([True, False, True, True, False])
    found = objective.mean_loss(logits, labels, jnp.asarray(mask))
    np.testing.assert_allclose(found, rows[:, mask].mean(axis=-1), rtol=1e-5)
    right = LOGITS.argmax(axis=-1) == LABELS
    np.testing.assert_array_equal(objective.is_correct(logits, labels), right)


def test_weights_and_the_focal_factor_multiply_the_cross_entropy():
    rows = -log_softmax(LOGITS.astype(np.float64) / 20, axis=-1)[:, np.arange(5), LABELS]  # [E, B]
    logits, labels = jnp.asarray(LOGITS / 20), jnp.asarray(LABELS)
    weights = balanced_weights(LABELS, 3)
    assert weights == (5 / 6, 5 / 6, 5 / 3)
    by_class = np.asarray(weights)[LABELS]
    found = reweighted(SINGLE_LABEL, weights).row_loss(logits, labels)
    np.testing.assert_allclose(found, by_class * rows, rtol=1e-5)
    found = reweighted(SINGLE_LABEL, weights, 2.0).row_loss(logits, labels)
    np.testing.assert_allclose(found, by_class * (1 - np.exp(-rows)) ** 2 * rows, rtol=1e-4)
    # Certain rows have no gradient that is not a number.
    certain = jax.grad(lambda z: reweighted(SINGLE_LABEL, (), 0.5).row_loss(z, labels).sum())
    assert np.isfinite(certain(jnp.asarray(LOGITS * 10))).all()


def test_linear_models_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 5)).astype(np.float32)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    y = x @ rng.normal(size=(5, 3)) + rng.normal(size=(80, 3))
    labels, penalty = y > 0.3, 0.01
    weights = reweighted(SINGLE_LABEL, (1.0, 3.0)).linear.solver(5, 2)
    plain = LogisticRegression(C=1 / (penalty * 80), tol=1e-8, class_weight={0: 1, 1: 3})
    kernel, bias = weights(x, labels[:, 0].astype(int), penalty)
    plain.fit(x, labels[:, 0])
    np.testing.assert_allclose(kernel[:, 1] - kernel[:, 0], plain.coef_[0], atol=1e-3)
    solve = MULTI_LABEL.linear.solver(5, 3)
    solve(x, labels, 1.0)  # from whose result the next one starts
    kernel, bias = solve(x, labels, penalty)
    for c in range(3):
        plain = LogisticRegression(C=1 / (penalty * 80), tol=1e-8).fit(x, labels[:, c])
        np.testing.assert_allclose(kernel[:, c], plain.coef_[0], atol=5e-3)
        np.testing.assert_allclose(bias[c], plain.intercept_[0], atol=5e-3)
    kernel, bias = REGRESSION.linear.solver(5, 1)(x, y[:, 0].astype(np.float32), penalty)
    plain = Ridge(alpha=penalty * 80).fit(x, y[:, 0])
    np.testing.assert_allclose(kernel[:, 0], plain.coef_, atol=1e-5)
    np.testing.assert_allclose(bias[0], plain.intercept_, atol=1e-5)


# Rows with any number of labels.


@pytest.fixture
def multi_label() -> RunIdentity:
    names = ("red", "green", "blue")
    return RunIdentity(objective="multi_label", classes=names, replicas=((0, 1e-3),))


def labelled(identity: RunIdentity, rows: int, seed: int) -> ExitOutputs:
    """Logits whose later exits know more of the targets, and are too certain of it."""
    rng = np.random.default_rng(seed)
    targets = rng.random((rows, 3)) < [0.2, 0.5, 0.7]
    sure = np.asarray([0.4, 1.2, 2.5])[:, None, None]
    logits = 2 * (np.where(targets, sure, -sure) + rng.normal(size=(3, rows, 3)))
    return ExitOutputs(logits, targets, [1, 2, 4], identity=identity)


def loop(outputs, confidences, threshold, metric):
    """(cost, metric) of one threshold, row by row."""
    exits, rows = confidences.shape
    taken = [
        next((e for e in range(exits - 1) if confidences[e, n] >= threshold), exits - 1)
        for n in range(rows)
    ]
    answers = np.stack([outputs.predictions[0, e, n] for n, e in enumerate(taken)])
    return np.mean([outputs.cost[e] for e in taken]), metric(outputs.labels[0], answers)


def micro_f1(targets, answers):
    return f1_score(targets, answers, average="micro", zero_division=0.0)


def certainty(logits, temperatures):
    p = expit(logits.astype(np.float64) / temperatures[:, None, None])
    return p, np.maximum(p, 1 - p).mean(axis=-1)


def test_a_temperature_of_several_labels_minimises_the_objective_s_loss(multi_label):
    outputs = labelled(multi_label, 400, seed=1)
    (calibrator,) = fit_calibrators(outputs)
    assert (abs(calibrator.temperatures - 1) > 0.2).all()
    for e, found in enumerate(calibrator.temperatures):
        around = found * np.asarray([1, 0.9, 0.99, 1.01, 1.1])
        scaled = jnp.asarray(outputs.logits[0, e] / around[:, None, None], jnp.float32)
        losses = binary_cross_entropy(scaled, outputs.labels[0]).mean(axis=-1)
        assert int(losses.argmin()) == 0
    p, wanted = certainty(outputs.logits[0], calibrator.temperatures)
    found = exit_confidences(outputs, "confidence", [calibrator])[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    entropies = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)).mean(axis=-1)
    found = exit_confidences(outputs, "entropy", [calibrator])[0]
    np.testing.assert_allclose(found, 1 - entropies, atol=1e-9)
    found = exit_confidences(outputs, "margin", [calibrator])[0]
    np.testing.assert_allclose(found, np.abs(2 * p - 1).mean(axis=-1), atol=1e-12)


def test_the_least_certain_label_decides(multi_label):
    outputs = labelled(multi_label, 30, seed=3)
    (calibrator,) = fit_calibrators(outputs)
    scaled = outputs.logits[0].astype(np.float64) / calibrator.temperatures[:, None, None]
    found = exit_confidences(outputs, "min_confidence", [calibrator])[0]
    np.testing.assert_allclose(found, expit(np.abs(scaled)).min(axis=-1), rtol=1e-12)
    assert "min_confidence" in deployable_policies(outputs)
    single = ExitOutputs(outputs.logits, np.zeros(30, int), [1, 2, 4])
    assert "min_confidence" not in deployable_policies(single)


@pytest.mark.parametrize("policy", ["confidence", "patience", "voting", "pcee_isotonic"])
def test_a_curve_of_several_labels_equals_a_loop(multi_label, policy):
    calibration, outputs = (labelled(multi_label, rows, seed=rows) for rows in (80, 60))
    curve = simulate(outputs, policy, calibration=calibration)
    confidences = exit_confidences(outputs, policy, fit_calibrators(calibration))[0]
    for threshold, cost, metric in zip(
        curve.threshold[0], curve.cost[0], curve.score[0], strict=True
    ):
        wanted = loop(outputs, confidences, threshold, micro_f1)
        np.testing.assert_allclose((cost, metric), wanted, atol=1e-12)
    assert len(np.unique(curve.cost)) >= 3
    exact = simulate(outputs, policy, calibration=calibration, metric="subset_accuracy")
    whole = (outputs.predictions[0, -1] == outputs.labels[0]).all(axis=-1).mean()
    assert exact.score[0, -1] == whole
    with pytest.raises(UserError, match="unknown metric 'matthews'"):
        simulate(outputs, policy, calibration=calibration, metric="matthews")


def test_an_operating_point_of_several_labels_is_the_best_within_its_cost(multi_label):
    calibration, validation = (labelled(multi_label, rows, seed=rows) for rows in (120, 90))
    resolver = make_resolver(calibration, ("confidence", "patience"))
    assert resolver.full == micro_f1(calibration.labels[0], calibration.predictions[0, -1])
    threshold, calibrator = resolver.threshold("confidence", cost=0.6)
    curve = simulate(calibration, calibrators=[calibrator])
    within = curve.score[0, curve.cost[0] <= 0.6 + 1e-12]
    point = simulate(calibration, calibrators=[calibrator], thresholds=np.asarray([threshold]))
    assert point.score[0, 0] == within.max()
    found = analyse(calibration, validation, "confidence").operating_point(0, {"cost": 0.6})
    assert found.threshold == threshold
    _, confidences = certainty(validation.logits[0], calibrator.temperatures)
    np.testing.assert_allclose(found.validation, loop(validation, confidences, threshold, micro_f1))
    agreement = resolver.certificate("confidence", "agreement", 0.9)
    assert agreement.rows == 60
    area = tuning_area(
        calibration.logits, calibration.labels, [1, 2, 4], None, "micro_f1", MULTI_LABEL
    )
    assert 0.5 < area[0] < 1


def test_metrics_of_several_labels_are_scikit_learn_s(multi_label):
    outputs = labelled(multi_label, 70, seed=2)
    targets, given = outputs.labels[0], outputs.predictions[0, 0]
    wanted = {
        "micro_f1": micro_f1(targets, given),
        "macro_f1": f1_score(targets, given, average="macro", zero_division=0.0),
        "subset_accuracy": sklearn_metrics.accuracy_score(targets, given),
        "hamming_loss": sklearn_metrics.hamming_loss(targets, given),
    }
    measured = {name: measure(given, targets) for name, measure in MULTI_LABEL.measures}
    assert measured == pytest.approx(wanted, abs=1e-12)
    for metric in MULTI_LABEL.metrics:
        sign = -1 if metric.is_error else 1
        value = sign * compute_metric(metric, given, targets, 3)
        assert value == pytest.approx(wanted[metric.name.removeprefix("neg_")], abs=1e-12)


def test_certificates_are_of_what_the_metric_calls_right(multi_label):
    outputs = labelled(multi_label, 200, seed=4)
    given, targets = outputs.predictions[0], outputs.labels[0]
    whole = (given == targets).all(axis=-1)
    np.testing.assert_array_equal(exit_losses(outputs, 0, "risk"), whole[-1] & ~whole)
    by_label = dataclasses.replace(multi_label, metric="neg_hamming_loss")
    partial = ExitOutputs(outputs.logits, targets, [1, 2, 4], identity=by_label)
    right = (given == targets).mean(axis=-1)
    wanted = np.maximum(right[-1] - right, 0)
    np.testing.assert_allclose(exit_losses(partial, 0, "risk"), wanted)
    wanted = (given != given[-1]).mean(axis=-1)
    np.testing.assert_allclose(exit_losses(partial, 0, "agreement"), wanted)
    counts = LossCounts("risk", np.asarray([0.9, 0.6]), np.asarray([0.0, 7.25]), 100)
    bounds = candidate_bounds(counts, 0.95)
    # e times the chance of so small a sum is 5%, if each row were harmed wholly or not at all.
    chance = stats.binom.cdf([0, 8], 100, bounds)
    np.testing.assert_allclose(np.e * chance, 0.05, rtol=1e-6)
    assert LossCounts.from_dict(counts.as_dict()).harmed.tolist() == [0.0, 7.25]
    resolver = make_resolver(partial, ("confidence",))
    assert resolver.certificate("confidence", "risk", 0.5).threshold is not None
    restored = ThresholdResolver.from_dict(json.loads(json.dumps(resolver.as_dict())))
    assert restored.resolve("confidence", {"error": 0.2}) is not None
    with pytest.raises(
        UserError, match="metric of this run is neg_hamming_loss: set a maximum error"
    ):
        restored.resolve("confidence", {"accuracy": 0.9})


@pytest.mark.parametrize("policy", ["confidence", "pcee"])
def test_an_error_is_a_target_where_the_metric_is_one(multi_label, policy):
    outputs = labelled(multi_label, 100, seed=4)
    by_label = dataclasses.replace(multi_label, metric="neg_hamming_loss")
    resolver = make_resolver(outputs, (policy,))
    assert resolver.resolve(policy, {"accuracy": 0.75}).threshold is not None
    with pytest.raises(
        UserError, match=r"error=0\.25 is set, but the metric of this run is not an"
    ):
        resolver.resolve(policy, {"error": 0.25})
    resolver = make_resolver(dataclasses.replace(outputs, identity=by_label), (policy,))
    assert resolver.resolve(policy, {"error": 0.25}).threshold is not None
    with pytest.raises(
        UserError, match=r"accuracy=0\.75 is set, but the metric of this run is neg_h"
    ):
        resolver.resolve(policy, {"accuracy": 0.75})


def test_a_decision_threshold_has_the_best_f1_of_its_label():
    rng = np.random.default_rng(0)
    targets = rng.random((300, 2)) < [0.15, 0.5]
    logits = np.where(targets, -0.5, -2.5) + rng.normal(size=(300, 2))  # too low by 1
    shifts = best_f1_shifts(logits, targets)
    assert (shifts < -0.2).all()
    for own, true, shift in zip(logits.T, targets.T, shifts, strict=True):
        hits, given = (
            np.asarray([part(t) for t in (shift, *own)])
            for part in (
                lambda t, own=own, true=true: (true & (own > t)).sum(),
                lambda t, own=own: (own > t).sum(),
            )
        )
        f1 = 2 * hits / (given + true.sum())
        assert f1[0] > f1.max() - 0.02
    assert best_f1_shifts(logits, np.zeros_like(targets)).tolist() == [0, 0]


def test_a_bootstrap_of_several_labels_equals_drawing_rows(multi_label):
    outputs = labelled(multi_label, 50, seed=5)
    band = bootstrap_curve(outputs, points=4, draws=20)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(20):
        rows = outputs.rows(rng.integers(0, 50, 50))
        drawn.append(simulate(rows, thresholds=band.threshold[0]).score[0])
    wanted = np.quantile(drawn, [0.025, 0.975], axis=0).T
    np.testing.assert_allclose(band.score_interval[0], wanted, atol=1e-6)


def test_outputs_of_several_labels_are_saved_and_checked(multi_label, tmp_path):
    outputs = labelled(multi_label, 20, seed=6)
    outputs.save(tmp_path / "x.npz")
    again = ExitOutputs.load(tmp_path / "x.npz")
    assert again.objective is MULTI_LABEL
    assert again.metric.name == "micro_f1"
    assert again.labels.dtype == bool
    np.testing.assert_array_equal(again.labels, outputs.labels)
    with pytest.raises(ValueError, match=r"labels must be \[N, C\] = \(20, 3\)"):
        ExitOutputs(outputs.logits, outputs.labels[0, :, 0], [1, 2, 4], identity=multi_label)
    with pytest.raises(UserError, match="unknown objective 'multi_lable': did you mean"):
        RunIdentity(objective="multi_lable")


def test_an_exit_that_gives_all_rows_the_same_labels_has_collapsed(multi_label):
    outputs = labelled(multi_label, 30, seed=7)
    logits = outputs.logits.copy()
    logits[0, 1] = [3.0, -1.0, 2.0]
    outputs = ExitOutputs(logits, outputs.labels, [1, 2, 4], identity=multi_label)
    codes = [4, 4, 4, 4, 5, 5]  # red is 1, blue is 4
    rows = [
        {"training": "t", "step": step, "loss": [[1.0] * 3], "predicted": [[-1, code, -1]]}
        for step, code in enumerate(codes)
    ]
    (found,) = find_failures(rows, {"t": (1, 2, 4)}, outputs)
    assert (found["exit"], found["what"], found["step"]) == (2, "collapsed to 'red' and 'blue'", 4)


def test_a_step_of_training_lowers_the_loss_of_several_labels():
    graphdef, params = build()
    outputs = params["heads"][str(EXITS[0])]["classifier"]["bias"].shape[-1]
    rows = BATCH["row_mask"].shape[0]
    targets = np.random.default_rng(0).random((rows, outputs)) < 0.5
    batch = {**BATCH, "labels": jnp.asarray(targets)}
    chosen = settings(graphdef, objective=MULTI_LABEL)
    step = jax.jit(lambda state: train_step(chosen, state, batch))
    state, first = step(init_state(params, 1e-2, seed=3))
    for _ in range(3):
        state, last = step(state)
    assert first.loss.shape == first.predicted.shape == (len(EXITS),)
    assert (last.loss < first.loss).all()


# Rows with a number.


@pytest.fixture
def numbers() -> ExitOutputs:
    identity = RunIdentity(objective="regression", policy="stability")
    rng = np.random.default_rng(0)
    targets = (3 + rng.normal(size=70)).astype(np.float32)
    noise = rng.normal(size=(3, 70)) * np.asarray([1.0, 0.5, 0.2])[:, None]
    return ExitOutputs((targets + noise)[..., None], targets, [1, 2, 4], identity=identity)


def negative_error(targets, given):
    return -sklearn_metrics.mean_absolute_error(targets, given)


@pytest.mark.parametrize(
    ("metric", "oracle"),
    [
        ("neg_mean_absolute_error", negative_error),
        ("pearson", lambda targets, given: stats.pearsonr(targets, given).statistic),
    ],
)
def test_a_curve_of_numbers_equals_a_loop(numbers, metric, oracle):
    curve = simulate(numbers, "stability", metric=metric)
    values = numbers.predictions[0].astype(np.float64)
    confidences = exit_confidences(numbers, "stability")[0]
    assert np.isneginf(confidences[0]).all()
    np.testing.assert_allclose(confidences[1:], 1 / (1 + abs(np.diff(values, axis=0))))
    for threshold, cost, value in zip(
        curve.threshold[0], curve.cost[0], curve.score[0], strict=True
    ):
        wanted = loop(numbers, confidences, threshold, oracle)
        np.testing.assert_allclose((cost, value), wanted, rtol=1e-5)


@pytest.mark.parametrize(("offset", "deviation"), [(0, 1), (1e6, 0.5), (1.6e9, 1e3)])
def test_the_correlation_of_large_numbers(offset, deviation):
    rng = np.random.default_rng(0)
    numbers = offset + deviation * rng.standard_normal(500)
    given = numbers + 0.5 * deviation * rng.standard_normal(500)
    wanted = stats.pearsonr(numbers, given).statistic
    assert pearson(given, numbers) == pytest.approx(wanted, rel=1e-6)
    assert pearson(np.full(500, offset), numbers) == 0
    assert np.isnan(pearson(np.full(500, np.nan), numbers))


def test_nothing_leaves_at_an_exit_without_a_confidence(numbers):
    """The first exit's stability is minus infinity, which no threshold lies at or below."""
    analysis = analyse(numbers, numbers)
    point = analysis.operating_point(0, {"threshold": -np.inf})
    assert (analysis.exits_taken(0, point.threshold) == 1).all()
    assert point.validation[0] == pytest.approx(0.5)


def test_numbers_have_operating_points_and_no_certificates(numbers, tmp_path):
    numbers.save(tmp_path / "x.npz")
    assert ExitOutputs.load(tmp_path / "x.npz").labels.dtype == np.float32
    assert deployable_policies(numbers) == ("stability",)
    analysis = analyse(numbers, numbers)
    assert analysis.operating_point(0, {"cost": 0.9}).validation[0] <= 0.9
    point = analysis.operating_point(0, {"error": 0.25})
    assert -0.25 <= point.calibration[1] < -0.15
    area = tuning_area(
        numbers.logits, numbers.labels, [1, 2, 4], None, "pearson", numbers.objective
    )
    assert 0.5 < area[0] < 1
    for target, refusal in (("risk", "cannot be certified for regression"), ("accuracy", "error")):
        with pytest.raises(UserError, match=refusal):
            analysis.operating_point(0, {target: 0.1})
    with pytest.raises(UserError, match="of objective='regression' are not probabilities"):
        simulate(numbers, "confidence")
    with pytest.raises(UserError, match="'patience' does not apply to objective='regression'"):
        simulate(numbers, "patience")
    targets, given = numbers.labels[0], numbers.predictions[0, 1]
    measured = {name: measure(given, targets) for name, measure in REGRESSION.measures}
    assert measured == pytest.approx(
        {
            "mean_absolute_error": -negative_error(targets, given),
            "pearson": stats.pearsonr(targets, given).statistic,
            "spearman": stats.spearmanr(targets, given).statistic,
        },
        rel=1e-5,
    )


def test_a_learned_error_head_estimates_the_closeness_of_its_exit():
    logits = jnp.asarray([[[0.5], [2.0]], [[1.0], [-1.0]]])  # [E, B, 1]
    targets, scores = jnp.asarray([1.0, -1.0]), jnp.asarray([[0.3, 0.9], [1.0, 1.0]])
    batch = {"labels": targets, "row_mask": jnp.ones(2, bool)}
    found = compute_step_metrics(ModelOutput(logits, scores), batch, REGRESSION)
    wanted = (scores - (1 - np.tanh([[0.5, 3.0], [0.0, 0.0]]))) ** 2
    np.testing.assert_allclose(found.exit_loss, wanted.mean(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(found.loss, squared_error(logits, targets).mean(axis=-1), rtol=1e-6)
    assert found.predicted.tolist() == [-1, -1]
