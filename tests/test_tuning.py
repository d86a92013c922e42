"""Tests of tuning rows: their split, the best state, the learning-rate search and the refit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import read_tuning

from sweet_jax import ExitOutputs
from sweet_jax.config import Config, from_mapping
from sweet_jax.data.batches import steps_per_epoch, training_batch_indices
from sweet_jax.data.splits import split_tuning_rows
from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import analyse, curve_area
from sweet_jax.exits.metrics import compute_metric, jackknife_error
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.simulation import simulate
from sweet_jax.head_fitting import refit_heads
from sweet_jax.learning_rate_search import _one_rate_at_a_time, choose_rate
from sweet_jax.objectives.label_metrics import NEG_HAMMING_LOSS
from sweet_jax.objectives.objective import share_standard_error
from sweet_jax.pipeline import run, train_and_evaluate
from sweet_jax.preparation import prepare
from sweet_jax.training import schedule
from sweet_jax.training.best_state import (
    initial_best_state,
    standard_error,
    tuning_area,
    update_best_state,
)
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.metrics import read_metrics
from sweet_jax.training.probe import LinearClassifiers, Probe

RECIPE = {"pooling": "mean", "head_init": "probe", "epochs": "auto", "learning_rates": (1e-3,)}


@pytest.fixture
def recipe(options) -> dict:
    return options | RECIPE | {"tuning_fraction": 0.2}


def test_training_calibration_and_tuning_rows_are_disjoint(recipe):
    job = prepare(from_mapping(recipe | {"seeds": (0, 1)}))
    for training, calibration_rows, tuning in zip(*job.rows, strict=True):
        parts = [training, calibration_rows, tuning]
        assert sum(map(len, parts)) == len(set(np.concatenate(parts)))
        texts = [{job.texts[i] for i in part} for part in parts]
        assert not texts[0] & (texts[1] | texts[2])
        assert (len(training), len(calibration_rows), len(tuning)) == (72, 10, 18)
    assert set(job.rows.tuning[0]) != set(job.rows.tuning[1])
    # With nothing to tune, tuning rows become training rows, and calibration rows stay the same.
    untuned = prepare(from_mapping(recipe | {"epochs": 2, "head_init": "random"}))
    assert untuned.rows.tuning.shape == (1, 0)
    calibration = [[j.texts[i] for i in j.rows.calibration[0]] for j in (job, untuned)]
    assert calibration[0] == calibration[1]
    rows = np.union1d(job.rows.training[0], job.rows.tuning[0])
    texts_with_tuning = [job.texts[i] for i in rows]
    assert sorted(texts_with_tuning) == sorted(untuned.texts[i] for i in untuned.rows.training[0])


def test_tuning_rows_are_stratified_and_depend_on_seed():
    labels = np.repeat([0, 1], [300, 100])
    rows = np.arange(0, 400, 2)
    training, tuning = split_tuning_rows(labels, rows, 0.1, 3)
    assert len(tuning) == 20
    assert labels[tuning].sum() == 5
    np.testing.assert_array_equal(np.union1d(training, tuning), rows)
    assert (split_tuning_rows(labels, rows, 0.1, 4)[1] != tuning).any()
    with pytest.raises(UserError, match=r"too few to hold out a fraction of 0\.1 for tuning"):
        split_tuning_rows(labels, rows[:3], 0.1, 0)


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"),
    [(2, 90, 12), (0, 90, 0), ("auto", 400, 120), ("auto", 1600, 240), ("auto", 100_000, 6250)],
)
def test_number_of_training_steps_by_epochs_and_rows(epochs, rows, steps):
    assert schedule.training_steps(epochs, rows, 16) == steps


def test_check_interval_and_search_steps_by_training_steps():
    assert schedule.check_interval(320) == 40
    assert schedule.check_interval(322) == 41
    assert schedule.check_interval(3) == 1
    assert schedule.check_interval(0) == 0
    assert schedule.search_steps(30) == 30
    assert schedule.search_steps(322) == 40
    assert schedule.search_steps(1001) == 101


def test_length_grouped_batches_hold_every_row_once_per_epoch():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 100, 3000)
    rows = [np.arange(0, 3000, 2), np.arange(1, 3000, 2)]
    steps = steps_per_epoch(1500, 16)
    for epoch in (0, 1):
        batches = [
            training_batch_indices(rows, [5, 6], epoch * steps + step, 16, lengths)
            for step in range(steps)
        ]
        indices = np.stack(batches)  # [steps, R, B]
        for r in (0, 1):
            np.testing.assert_array_equal(np.sort(indices[:, r][indices[:, r] >= 0]), rows[r])
    spread = [np.ptp(lengths[row[row >= 0]]) for row in indices[:, 0]]
    assert np.median(spread) < 10  # of uniformly random batches about 80
    longest = lengths[indices[:-1]].max(axis=-1)  # [steps, R]
    assert np.abs(np.diff(longest, axis=1)).max() < 30  # replicas have their long rows together
    first = training_batch_indices(rows, [5, 6], 0, 16, lengths)
    np.testing.assert_array_equal(training_batch_indices(rows, [5, 6], 0, 16, lengths), first)
    assert (training_batch_indices(rows, [5, 6], steps, 16, lengths) != first).any()


def test_tuning_area_equals_area_of_exact_curve():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 2, 50, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (3, 50))
    logits[2, 1, 7] = np.nan
    areas = tuning_area(logits, labels, (1, 3), np.array([1 / 3, 1.0]), "accuracy")
    curve = simulate(ExitOutputs(logits[:2], labels[:2], np.array([1, 3])), "raw_confidence")
    expected = [curve_area(c, s) for c, s in zip(curve.cost, curve.score, strict=True)]
    np.testing.assert_allclose(areas[:2], expected)
    assert areas[2] == -np.inf


def update_best_states(areas, interval=5):
    """Returns the best states after evaluations with these areas [evaluations, R].

    The parameters of each state are its number. With 18 tuning rows, standard errors are 0.1 to
    0.12.
    """
    replicas = len(areas[0])
    best = initial_best_state({"w": jnp.zeros((replicas, 2))}, np.zeros(replicas, np.float32))
    for number, area in enumerate(areas):
        params = {"w": jnp.full((replicas, 2), float(number))}
        area = np.asarray(area, np.float32)
        error = share_standard_error(np.maximum(area, best.area), 18)
        best = update_best_state(best, params, area, error, interval * number)
    np.testing.assert_array_equal(best.params["w"][:, 0] * interval, best.step)
    return best


def test_best_state_is_latest_within_a_standard_error_of_the_best():
    # 0.55 is within a standard error of 0.6, and the last three areas are not.
    areas = [[0.1], [0.3], [0.6], [0.55], [0.4], [0.4], [0.2]]
    best = update_best_states(areas)
    assert best.step.tolist() == [15]
    assert best.area == np.float32(0.6)
    # A later state may still replace it, after any number of worse ones.
    assert update_best_states([*areas, [0.58]]).step.tolist() == [35]


def test_each_replica_keeps_its_own_best_state():
    areas = [[0.1, 0.9], [0.5, 0.7], [0.2, 0.7], [0.2, 0.6], [0.2, 0.6], [0.2, 0.6]]
    assert update_best_states(areas).step.tolist() == [5, 0]
    best = update_best_states([[-np.inf, 0.5], [-np.inf, 0.6], [0.1, -np.inf]])
    assert best.step.tolist() == [10, 5]


@pytest.mark.slow
def test_run_keeps_parameters_of_best_step_or_initial_ones_if_diverged(
    recipe, tmp_path, one_device
):
    """Bit for bit."""
    config = recipe | {"tuning_fraction": 0.29, "learning_rates": (1e-3, 1e30)}
    job = prepare(from_mapping(config))
    assert job.rows.training.shape == (2, 64)  # "auto" is 96 steps, 12 whole epochs
    outcome = train_and_evaluate(job, tmp_path / "auto")
    log = read_tuning(tmp_path / "auto")
    assert [row["step"] for row in log] == list(range(0, 12 * len(log), 12))
    assert all(row["area"][1] is None for row in log[1:])
    areas = np.array([row["area"] for row in log], float)  # NaN for None
    best = np.nanargmax(areas[:, 0])
    within_error = areas[:, 0] >= areas[best, 0] - share_standard_error(areas[best, 0], 26)
    step = 12 * int(np.flatnonzero(within_error)[-1])
    assert outcome.best_steps == {"exits_1_2_3": [step, 0]}
    fixed = config | {"epochs": 12, "max_steps": step}
    expected = train_and_evaluate(prepare(from_mapping(fixed)), tmp_path / "fixed")
    params, expected_params = (jax.tree.leaves(o.models[0].params) for o in (outcome, expected))
    for a, b in zip(params, expected_params, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    initial = train_and_evaluate(prepare(from_mapping(config | {"epochs": 0})), tmp_path / "start")
    for a, b in zip(params, jax.tree.leaves(initial.models[0].params), strict=True):
        np.testing.assert_array_equal(a[1], b[1])


def test_initial_encoder_is_kept_when_fine_tuning_does_not_help(
    recipe, tmp_path, one_device, caplog
):
    job = prepare(from_mapping(recipe | {"learning_rates": (1e30,)}))
    with caplog.at_level("INFO"):
        outcome = train_and_evaluate(job, tmp_path)
    steps = len(read_metrics(tmp_path))
    assert read_tuning(tmp_path)[-1]["step"] == steps  # training did not stop early
    (line,) = [text for text in caplog.messages if "fine-tuning did not help" in text]
    assert line == (
        "the encoder is kept as it was (step 0): fine-tuning did not help; on the tuning rows, "
        f"later models, up to step {steps}, were more than one standard error below the best"
    )
    resumed = train_and_evaluate(job, tmp_path)
    np.testing.assert_array_equal(outcome.validation.logits, resumed.validation.logits)
    assert resumed.best_steps == outcome.best_steps == {"exits_1_2_3": [0]}
    assert resumed.timing["train_examples"] == 0


def test_first_learning_rate_is_chosen_unless_another_is_clearly_better():
    def chosen(areas, rows):
        areas = np.asarray(areas)
        logits, labels = np.zeros((len(areas), 1, rows, 2)), np.zeros((len(areas), rows), int)
        return choose_rate(areas, standard_error(areas, logits, labels, "accuracy"))

    assert chosen([0.80, 0.82, 0.78], 180) == 0  # a standard error is 0.029
    assert chosen([0.80, 0.84, 0.83], 180) == 1
    assert chosen([0.80, 0.82, 0.78], 18_000) == 1
    assert chosen([0.95, 1.0], 20) == 0  # one row
    assert chosen([-np.inf, 0.5, -np.inf], 18) == 1
    assert chosen([-np.inf, -np.inf], 18) == 0


def test_standard_error_of_accuracy_and_of_diverged_replica():
    errors = share_standard_error(np.array([0.5, 1.0]), 96)
    np.testing.assert_allclose(errors, [0.05, np.sqrt(0.98 * 0.02 / 100)])
    logits, labels = np.zeros((2, 1, 96, 2)), np.zeros((2, 96), int)
    errors = standard_error(np.array([0.5, -np.inf]), logits, labels, "accuracy")
    np.testing.assert_allclose(errors, [0.05, 0.0])


@pytest.mark.parametrize(
    ("metric", "classes"),
    [("f1", 2), ("matthews", 2), ("macro_f1", 3), ("balanced_accuracy", 3)],
)
def test_standard_error_with_rare_classes_matches_resampled_rows(metric, classes):
    """The standard error of a share of as many rows would be a quarter to a half of it."""
    rng = np.random.default_rng(3)
    share = [0.95, 0.05] if classes == 2 else [0.9, 0.05, 0.05]
    scores, errors = [], []
    for _ in range(150):
        labels = rng.choice(classes, 400, p=share)
        predictions = np.where(rng.random(400) < 0.8, labels, rng.choice(classes, 400, p=share))
        scores.append(compute_metric(metric, predictions, labels, classes))
        logits = 4.0 * np.eye(classes)[predictions][None, None]  # [R, E, M, C]
        errors.extend(standard_error(np.array([0.5]), logits, labels[None], metric))
    assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.25)


def test_jackknife_error_equals_leave_one_out_estimate():
    rng = np.random.default_rng(4)
    labels, predictions = rng.random((30, 4)) < 0.3, rng.random((2, 30, 4)) < 0.3
    leave_one_out = [
        np.mean([compute_metric(NEG_HAMMING_LOSS, g[rows], labels[rows], 4) for g in predictions])
        for rows in ~np.eye(30, dtype=bool)
    ]
    expected = np.sqrt(29 * np.var(leave_one_out))
    assert jackknife_error(NEG_HAMMING_LOSS, predictions, labels, 4) == pytest.approx(expected)
    # A single row cannot be left out.
    of_one_row = jackknife_error(NEG_HAMMING_LOSS, predictions[:, :1], labels[:1], 4)
    assert of_one_row == pytest.approx(share_standard_error(1.0, 1))
    # Without errors, two rows of either kind are added, as in share_standard_error.
    correct = np.stack([labels, labels])
    expected = np.sqrt(32 / 34 * 2 / 34 / 34)
    assert jackknife_error(NEG_HAMMING_LOSS, correct, labels, 4) == pytest.approx(expected)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.nightly)])
def test_rate_search_trains_learning_rate_with_largest_area(
    devices, recipe, tmp_path, request, caplog
):
    """On one CPU device the short runs are sequential, otherwise they share a program."""
    if devices == 1:
        request.getfixturevalue("one_device")
    config = recipe | {"learning_rates": (1e30, 1e-3, 1e28), "rate_search": "short"}
    config |= {"seeds": (0, 1), "epochs": 1}
    with caplog.at_level("INFO"):
        results = run(from_mapping(config), tmp_path / "run")
    assert "2 seeds, 3 learning rates: each rate is tried briefly, one is trained" in caplog.text
    assert "chosen 0.001: better than the first by more than a standard error" in caplog.text
    replicas = [(r["seed"], r["learning_rate"]) for r in results["replicas"]]
    assert replicas == [(0, 1e-3), (1, 1e-3)]
    # The search has the first seed and its tuning rows; two of the rates diverge.
    search = results["rate_search"]
    assert (search["learning_rate"], search["seed"], search["tuning_rows"]) == (1e-3, 0, 18)
    assert [area is not None for area in search["area"]] == [False, True, False]
    assert json.loads((tmp_path / "run" / "rate_search.json").read_text()) == search
    assert not (tmp_path / "run" / "rate_search").exists()
    exits = json.loads((tmp_path / "run" / "model" / "exits.json").read_text())
    assert exits["learning_rate"] == 1e-3
    # A run on this rate alone gives the same results, and resuming does not search again.
    single = run(from_mapping(config | {"learning_rates": (1e-3,)}), tmp_path / "single")
    assert single["replicas"][0]["individual"] == results["replicas"][0]["individual"]
    modified = (tmp_path / "run" / "rate_search.json").stat().st_mtime_ns
    assert run(from_mapping(config), tmp_path / "run")["replicas"] == results["replicas"]
    assert (tmp_path / "run" / "rate_search.json").stat().st_mtime_ns == modified


@pytest.mark.nightly
def test_full_model_baseline_searches_its_own_learning_rate(recipe, tmp_path, one_device):
    """Among the rates of the run, as a run of the full model alone does."""
    config = recipe | {"learning_rates": (1e-9, 1e30, 1e-2), "rate_search": "short", "epochs": 4}
    results = run(from_mapping(config | {"baselines": "full"}), tmp_path / "run")
    record = json.loads((tmp_path / "run/baselines/fine_tuned/rate_search.json").read_text())
    assert record["learning_rates"] == [1e-9, 1e30, 1e-2]
    assert (record["seed"], record["tuning_rows"]) == (0, 18)
    full_model = {"method": "early_exit", "exits": (3,), "pooling": "first", "head_init": "random"}
    alone = run(from_mapping(config | full_model), tmp_path / "alone")
    assert alone["rate_search"] == record
    score = alone["replicas"][0]["individual"][0]["score"]
    assert results["baselines"]["fine_tuned"]["score"] == score


@pytest.mark.nightly
def test_tuning_rows_are_evaluated_without_dropout(recipe, with_dropout, tmp_path, one_device):
    """Even with preset=reference, which calibrates with dropout on validation rows."""
    config = recipe | with_dropout | {"epochs": 1, "preset": "reference", "checkpoint_every": 5}
    outcome = train_and_evaluate(prepare(from_mapping(config)), tmp_path)
    job = prepare(from_mapping(config | {"calibration": "validation"}))
    without_dropout = train_and_evaluate(job, tmp_path)  # from the last checkpoint
    assert without_dropout.timing["train_examples"] == 0
    assert not np.array_equal(outcome.calibration.logits, without_dropout.calibration.logits)
    np.testing.assert_array_equal(outcome.tuning.logits, without_dropout.tuning.logits)
    np.testing.assert_array_equal(outcome.tuning.labels, without_dropout.tuning.labels)


def test_saved_replica_is_best_of_chosen_learning_rate():
    """Even if a replica of another rate has the largest area."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    truth = np.eye(2)[labels] * 2 - 1

    def outputs(right: float) -> np.ndarray:
        wrong = rng.random(200) >= right
        return np.where(wrong[:, None], -truth, truth)[None].repeat(2, axis=0)

    logits = np.stack([outputs(q) for q in (0.6, 0.99, 0.85, 0.9)])  # [R, E, N, C]
    identity = RunIdentity(replicas=((0, 1e-4), (0, 1e-3), (1, 1e-3), (1, 1e-4)))
    analysed = ExitOutputs(logits, labels, np.array([1, 2]), identity=identity)
    swapped = ExitOutputs(logits[[1, 0, 2, 3]], labels, np.array([1, 2]), identity=identity)
    assert analyse(analysed, analysed).best == 1
    analysis = analyse(swapped, swapped)  # 0.99 and 0.9 at 1e-4, 0.6 and 0.85 at 1e-3
    assert [analysis.replicas[r][1] for r in analysis.chosen] == [1e-4, 1e-4]
    assert analysis.best == 0
    # With tuning rows, they choose the replica, and calibration rows compare only this one.
    tuned = analyse(swapped, swapped, tuning=analysed)
    assert tuned.best == 1
    assert tuned.resolver(1).compared == 1
    assert analysis.resolver(0).compared == 4


def test_head_refit_changes_only_the_classifiers(recipe, tmp_path, one_device):
    config = recipe | {"epochs": 1, "head_init": "random", "head_refit": True}
    results = run(from_mapping(config), tmp_path / "refit")
    assert results["head_refit"] is True
    job = prepare(from_mapping(config))
    (training,) = model_specs(job.config)
    workdir = tmp_path / "again"
    workdir.mkdir()
    graphdef, params, _ = fit(job.training_job(training, workdir))
    refitted = refit_heads(job, training, graphdef, params, workdir)
    changed = {
        tuple(p.key for p in path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(refitted), strict=True
        )
        if np.any(a != b)
    }
    classifiers = {
        ("heads", str(e), "classifier", k) for e in (1, 2, 3) for k in ("kernel", "bias")
    }
    assert changed == classifiers
    # If the best state is that of step 0, the heads remain those of the probe.
    with_probe = dataclasses.replace(
        job, probe=Probe(LinearClassifiers(*[np.zeros((1, 3))] * 3), np.zeros(0))
    )
    for steps, unchanged in (((0,), True), ((8,), False)):
        heads = refit_heads(with_probe, training, graphdef, params, workdir, steps)
        pairs = zip(jax.tree.leaves(heads), jax.tree.leaves(params), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == unchanged


def test_diverged_replica_does_not_change_refit_of_other_replica(recipe, tmp_path, one_device):
    changes = {"epochs": 1, "head_refit": True, "learning_rates": (1e-3, 1e30)}
    results = run(from_mapping(recipe | changes), tmp_path / "run")
    finite, diverged = results["replicas"]
    assert diverged["diverged"]
    assert not finite["diverged"]
    assert results["best_replica"] == 0
    alone = run(from_mapping(recipe | changes | {"learning_rates": (1e-3,)}), tmp_path / "alone")
    assert finite["individual"] == alone["replicas"][0]["individual"]


def test_probe_without_training_ignores_all_but_first_learning_rate(
    recipe, tmp_path, one_device, with_figures
):
    changes = {"epochs": 0, "head_refit": True, "learning_rates": (1e-3, 3e-3), "seeds": (0, 1)}
    results = run(from_mapping(recipe | changes), tmp_path)
    assert [(r["seed"], r["learning_rate"]) for r in results["replicas"]] == [(0, 1e-3), (1, 1e-3)]
    outputs = ExitOutputs.load(tmp_path / "exit_outputs" / "validation.npz")
    with np.load(tmp_path / "probe.npz") as arrays:
        predictions = arrays["predictions"][[0, 2]]
    np.testing.assert_array_equal(outputs.predictions, predictions)


def test_values_incompatible_with_zero_epochs_or_refit_are_refused(recipe):
    with pytest.raises(UserError, match="epochs must be"):
        from_mapping(recipe | {"epochs": 0, "head_init": "random"})
    with pytest.raises(UserError, match="epochs must be"):
        from_mapping(recipe | {"epochs": "some"})
    for value in ("3", 3.0, "3.0"):
        assert from_mapping(recipe | {"epochs": value}).epochs == 3
    for changes in ({"epochs": 0}, {"head_refit": True}):
        with pytest.raises(UserError, match="learning_to_exit='joint' cannot be combined"):
            from_mapping(recipe | {"learning_to_exit": "joint"} | changes)


@pytest.mark.parametrize(
    ("backend", "devices", "seeds", "steps", "one_at_a_time"),
    [
        ("cpu", 1, (0, 1), 10**6, True),
        ("cpu", 4, (0,), 40, False),
        ("gpu", 1, (0,), 40, True),  # shares its program with the training that follows
        ("gpu", 1, (0, 1), 40, False),
        ("gpu", 1, (0,), 10_000, False),  # long enough to repay compiling a second program
    ],
)
def test_learning_rates_share_a_program_when_that_is_faster(
    monkeypatch, backend, devices, seeds, steps, one_at_a_time
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [None] * devices)
    config = Config(task="own", seeds=seeds, learning_rates=(1e-4, 3e-4), max_length=128)
    assert _one_rate_at_a_time(config.resolved(), steps) == one_at_a_time
