"""Objectives: single-label classification, and two others that only their entry in a table adds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit, log_softmax, softmax
from sklearn.metrics import f1_score, r2_score
from test_early_exit import BATCH, EXITS, build
from test_step import settings

from sweet_jax import ExitOutputs, simulate
from sweet_jax.config import METRICS, UserError
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.bootstrap import bootstrap_curve
from sweet_jax.exits.calibration import fit_calibrators
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.operating_point import deployable_policies, make_resolver
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.objectives import OBJECTIVES, Metric, Objective
from sweet_jax.objectives.objective import CategoricalVariables, accuracy_metric, ratio
from sweet_jax.training.early_stopping import tuning_area
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
    assert tuple(metric.name for metric in objective.metrics) == METRICS


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


# What one file in objectives/ would hold for rows with any number of labels.


def same_labels(given, others):
    return (given == others).all(axis=-1)


def binary_cross_entropy(logits, targets):
    targets = jnp.broadcast_to(targets, logits.shape).astype(logits.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


def sigmoid(logits):
    return 1 / (1 + logits.__array_namespace__().exp(-logits))


def constant_labels(logits, row_mask):
    """The labels as binary digits."""
    xp = logits.__array_namespace__()
    present = xp.broadcast_to(row_mask[:, None], logits.shape)
    every = ((logits > 0) | ~present).all(axis=-2)
    none = ((logits <= 0) | ~present).all(axis=-2)
    digits = xp.broadcast_to(2 ** xp.arange(logits.shape[-1]), every.shape)
    return xp.where((every | none).all(axis=-1), (every * digits).sum(axis=-1), -1).astype("int32")


MICRO_F1 = Metric(
    "micro_f1",
    lambda given, targets, outputs: np.stack([(given & targets).sum(-1), given.sum(-1)], axis=-1),
    lambda targets, outputs: targets.sum(axis=-1, keepdims=True),
    lambda sums, totals: ratio(2.0 * sums[..., 0], sums[..., 1] + totals[..., 0]),
)
MULTI_LABEL = Objective(
    name="multi_label",
    metrics=(MICRO_F1, accuracy_metric(same_labels)),
    row_loss=binary_cross_entropy,
    predict=lambda logits: logits > 0,
    agrees=same_labels,
    probabilities=sigmoid,
    constant_prediction=constant_labels,
    describe=lambda given, names: " and ".join(np.asarray(names)[given]) or "no label",
    read_targets=lambda targets, outputs: np.asarray(targets, bool),
    target_per_output=True,
    categorical=CategoricalVariables(
        logits=lambda logits: np.stack([np.zeros_like(logits), logits], axis=-1),
        outcomes=lambda targets: targets.astype(int),
    ),
)


@pytest.fixture
def multi_label(monkeypatch) -> RunIdentity:
    monkeypatch.setitem(OBJECTIVES, "multi_label", MULTI_LABEL)
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
    exact = simulate(outputs, policy, calibration=calibration, metric="accuracy")
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
    assert again.metric is MICRO_F1
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
    assert (found["exit"], found["what"], found["step"]) == (2, "collapsed to red and blue", 4)


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


# And for rows with a number.

R2 = Metric(
    "r2",
    lambda given, targets, outputs: ((given - targets) ** 2)[..., None].astype(float),
    lambda targets, outputs: np.stack([targets, targets**2, targets**0], axis=-1).astype(float),
    lambda sums, totals: 1 - sums[..., 0] / (totals[..., 1] - totals[..., 0] ** 2 / totals[..., 2]),
)
REGRESSION = Objective(
    name="regression",
    metrics=(R2,),
    row_loss=lambda logits, targets: (logits[..., 0] - targets) ** 2,
    predict=lambda logits: logits[..., 0],
    agrees=lambda given, others: abs(given - others) < 0.5,
    probabilities=lambda logits: logits,
    constant_prediction=lambda logits, row_mask: np.where(np.ptp(logits) == 0, 0, -1),
    describe=lambda given, names: f"{given:g}",
    read_targets=lambda targets, outputs: np.asarray(targets, np.float32),
)


def test_a_number_is_predicted_without_probabilities(monkeypatch, tmp_path):
    monkeypatch.setitem(OBJECTIVES, "regression", REGRESSION)
    identity = RunIdentity(objective="regression", policy="patience")
    rng = np.random.default_rng(0)
    targets = rng.normal(size=70).astype(np.float32)
    noise = rng.normal(size=(3, 70)) * np.asarray([1.0, 0.5, 0.2])[:, None]
    outputs = ExitOutputs((targets + noise)[..., None], targets, [1, 2, 4], identity=identity)
    outputs.save(tmp_path / "x.npz")
    assert ExitOutputs.load(tmp_path / "x.npz").labels.dtype == np.float32
    curve = simulate(outputs, "patience")
    confidences = exit_confidences(outputs, "patience")[0]
    for threshold, cost, metric in zip(
        curve.threshold[0], curve.cost[0], curve.score[0], strict=True
    ):
        wanted = loop(outputs, confidences, threshold, r2_score)
        np.testing.assert_allclose((cost, metric), wanted, rtol=1e-5)
    last = outputs.predictions[0, -1]
    np.testing.assert_allclose(compute_metric(R2, last, targets, 1), r2_score(targets, last))
    assert deployable_policies(outputs) == ("patience",)
    assert analyse(outputs, outputs).operating_point(0, {"cost": 0.5}).validation[0] <= 0.5
    area = tuning_area(outputs.logits, outputs.labels, [1, 2, 4], None, "r2", REGRESSION)
    assert 0.5 < area[0] < 1
    with pytest.raises(UserError, match="of the objective 'regression' are not probabilities"):
        simulate(outputs, "confidence")
