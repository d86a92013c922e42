"""Tuning rows: who reads them, the best state, the search for a learning rate, the refit."""

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


def test_no_row_is_read_for_two_things(recipe):
    job = prepare(from_mapping(recipe | {"seeds": (0, 1)}))
    for own, held, tuning in zip(*job.rows, strict=True):
        parts = [own, held, tuning]
        assert sum(map(len, parts)) == len(set(np.concatenate(parts)))
        texts = [{job.texts[i] for i in part} for part in parts]
        assert not texts[0] & (texts[1] | texts[2])
        assert (len(own), len(held), len(tuning)) == (72, 10, 18)
    assert set(job.rows.tuning[0]) != set(job.rows.tuning[1])
    # Without anything to tune there are none, and the other rows are as they always were.
    usual = prepare(from_mapping(recipe | {"epochs": 2, "head_init": "random"}))
    assert usual.rows.tuning.shape == (1, 0)
    calibration = [[j.texts[i] for i in j.rows.calibration[0]] for j in (job, usual)]
    assert calibration[0] == calibration[1]
    same = np.union1d(job.rows.training[0], job.rows.tuning[0])
    kept = [job.texts[i] for i in same]
    assert sorted(kept) == sorted(usual.texts[i] for i in usual.rows.training[0])


def test_tuning_rows_are_drawn_in_proportion_by_the_seed():
    labels = np.repeat([0, 1], [300, 100])
    rows = np.arange(0, 400, 2)
    own, held = split_tuning_rows(labels, rows, 0.1, 3)
    assert len(held) == 20
    assert labels[held].sum() == 5
    np.testing.assert_array_equal(np.union1d(own, held), rows)
    assert (split_tuning_rows(labels, rows, 0.1, 4)[1] != held).any()
    with pytest.raises(UserError, match=r"too few to hold out a fraction of 0\.1 for tuning"):
        split_tuning_rows(labels, rows[:3], 0.1, 0)


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"),
    [(2, 90, 12), (0, 90, 0), ("auto", 400, 120), ("auto", 1600, 240), ("auto", 100_000, 6250)],
)
def test_steps(epochs, rows, steps):
    assert schedule.training_steps(epochs, rows, 16) == steps


def test_an_automatic_run_has_eight_evaluations():
    assert schedule.check_interval(320) == 40
    assert schedule.check_interval(322) == 41
    assert schedule.check_interval(3) == 1
    assert schedule.check_interval(0) == 0
    assert schedule.search_steps(30) == 30
    assert schedule.search_steps(322) == 40
    assert schedule.search_steps(1001) == 101


def test_batches_of_one_length_hold_every_row_once_an_epoch():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 100, 3000)
    rows = [np.arange(0, 3000, 2), np.arange(1, 3000, 2)]
    steps = steps_per_epoch(1500, 16)
    for epoch in (0, 1):
        picked = [
            training_batch_indices(rows, [5, 6], epoch * steps + step, 16, lengths)
            for step in range(steps)
        ]
        whole = np.stack(picked)  # [steps, R, B]
        for r in (0, 1):
            np.testing.assert_array_equal(np.sort(whole[:, r][whole[:, r] >= 0]), rows[r])
    spread = [np.ptp(lengths[row[row >= 0]]) for row in whole[:, 0]]
    assert np.median(spread) < 10  # of uniformly random batches about 80
    longest = lengths[whole[:-1]].max(axis=-1)  # [steps, R]
    assert np.abs(np.diff(longest, axis=1)).max() < 30  # replicas have their long rows together
    first = training_batch_indices(rows, [5, 6], 0, 16, lengths)
    np.testing.assert_array_equal(training_batch_indices(rows, [5, 6], 0, 16, lengths), first)
    assert (training_batch_indices(rows, [5, 6], steps, 16, lengths) != first).any()


def test_the_area_of_tuning_rows_is_that_of_the_exact_curve():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 2, 50, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (3, 50))
    logits[2, 1, 7] = np.nan
    found = tuning_area(logits, labels, (1, 3), np.array([1 / 3, 1.0]), "accuracy")
    curve = simulate(ExitOutputs(logits[:2], labels[:2], np.array([1, 3])), "raw_confidence")
    wanted = [curve_area(c, s) for c, s in zip(curve.cost, curve.score, strict=True)]
    np.testing.assert_allclose(found[:2], wanted)
    assert found[2] == -np.inf


def kept_states(areas, interval=5):
    """The best states by areas [evaluations, R].

    The parameters of each state are its number. 18 tuning rows: a standard error of 0.1 to 0.12.
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


def test_the_latest_state_that_rows_cannot_tell_from_the_best_is_kept():
    # 0.55 cannot be told from 0.6; then three that are clearly worse.
    worse = [[0.1], [0.3], [0.6], [0.55], [0.4], [0.4], [0.2]]
    best = kept_states(worse)
    assert best.step.tolist() == [15]
    assert best.area == np.float32(0.6)
    # However many are worse, training goes on: the last may be the best.
    assert kept_states([*worse, [0.58]]).step.tolist() == [35]


def test_each_replica_keeps_its_own_best_state():
    areas = [[0.1, 0.9], [0.5, 0.7], [0.2, 0.7], [0.2, 0.6], [0.2, 0.6], [0.2, 0.6]]
    assert kept_states(areas).step.tolist() == [5, 0]
    best = kept_states([[-np.inf, 0.5], [-np.inf, 0.6], [0.1, -np.inf]])
    assert best.step.tolist() == [10, 5]


@pytest.mark.slow
def test_a_run_keeps_the_parameters_of_the_best_step(recipe, tmp_path, one_device):
    """Bit for bit; and a replica that diverges at once those that it began with."""
    config = recipe | {"tuning_fraction": 0.29, "learning_rates": (1e-3, 1e30)}
    job = prepare(from_mapping(config))
    assert job.rows.training.shape == (2, 64)  # "auto" is 96 steps, 12 whole epochs
    outcome = train_and_evaluate(job, tmp_path / "auto")
    log = read_tuning(tmp_path / "auto")
    assert [row["step"] for row in log] == list(range(0, 12 * len(log), 12))
    assert all(row["area"][1] is None for row in log[1:])
    areas = np.array([row["area"] for row in log], float)  # NaN for None
    best = np.nanargmax(areas[:, 0])
    close = areas[:, 0] >= areas[best, 0] - share_standard_error(areas[best, 0], 26)
    step = 12 * int(np.flatnonzero(close)[-1])
    assert outcome.best_steps == {"exits_1_2_3": [step, 0]}
    fixed = config | {"epochs": 12, "max_steps": step}
    wanted = train_and_evaluate(prepare(from_mapping(fixed)), tmp_path / "fixed")
    ours, theirs = (jax.tree.leaves(o.models[0].params) for o in (outcome, wanted))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    start = train_and_evaluate(prepare(from_mapping(config | {"epochs": 0})), tmp_path / "start")
    for a, b in zip(ours, jax.tree.leaves(start.models[0].params), strict=True):
        np.testing.assert_array_equal(a[1], b[1])


def test_a_run_that_gains_nothing_keeps_the_encoder(recipe, tmp_path, one_device, caplog):
    job = prepare(from_mapping(recipe | {"learning_rates": (1e30,)}))
    with caplog.at_level("INFO"):
        first = train_and_evaluate(job, tmp_path)
    steps = len(read_metrics(tmp_path))
    assert read_tuning(tmp_path)[-1]["step"] == steps  # to its end: no rule ends it before
    (line,) = [text for text in caplog.messages if "fine-tuning did not help" in text]
    assert line == (
        "the encoder is kept as it was (step 0): fine-tuning did not help; on the tuning rows, "
        f"later models, up to step {steps}, were more than one standard error below the best"
    )
    again = train_and_evaluate(job, tmp_path)
    np.testing.assert_array_equal(first.validation.logits, again.validation.logits)
    assert again.best_steps == first.best_steps == {"exits_1_2_3": [0]}
    assert again.timing["train_examples"] == 0


def test_the_first_rate_is_kept_unless_another_is_clearly_better():
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


def test_standard_errors():
    found = share_standard_error(np.array([0.5, 1.0]), 96)
    np.testing.assert_allclose(found, [0.05, np.sqrt(0.98 * 0.02 / 100)])
    logits, labels = np.zeros((2, 1, 96, 2)), np.zeros((2, 96), int)
    found = standard_error(np.array([0.5, -np.inf]), logits, labels, "accuracy")
    np.testing.assert_allclose(found, [0.05, 0.0])


@pytest.mark.parametrize(
    ("metric", "classes"),
    [("f1", 2), ("matthews", 2), ("macro_f1", 3), ("balanced_accuracy", 3)],
)
def test_the_standard_error_of_rare_classes_is_that_of_rows_drawn_anew(metric, classes):
    """That of a share of as many rows would be a quarter to a half of it."""
    rng = np.random.default_rng(3)
    share = [0.95, 0.05] if classes == 2 else [0.9, 0.05, 0.05]
    scores, errors = [], []
    for _ in range(150):
        labels = rng.choice(classes, 400, p=share)
        given = np.where(rng.random(400) < 0.8, labels, rng.choice(classes, 400, p=share))
        scores.append(compute_metric(metric, given, labels, classes))
        logits = 4.0 * np.eye(classes)[given][None, None]  # [R, E, M, C]
        errors.extend(standard_error(np.array([0.5]), logits, labels[None], metric))
    assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.25)


def test_the_jackknife_is_that_of_the_metric_without_each_row():
    rng = np.random.default_rng(4)
    labels, given = rng.random((30, 4)) < 0.3, rng.random((2, 30, 4)) < 0.3
    without = [
        np.mean([compute_metric(NEG_HAMMING_LOSS, g[kept], labels[kept], 4) for g in given])
        for kept in ~np.eye(30, dtype=bool)
    ]
    wanted = np.sqrt(29 * np.var(without))
    assert jackknife_error(NEG_HAMMING_LOSS, given, labels, 4) == pytest.approx(wanted)
    # Of one row there is none without it.
    one = jackknife_error(NEG_HAMMING_LOSS, given[:, :1], labels[:1], 4)
    assert one == pytest.approx(share_standard_error(1.0, 1))
    right = np.stack([labels, labels])  # two rows more of either kind, see share_standard_error
    wanted = np.sqrt(32 / 34 * 2 / 34 / 34)
    assert jackknife_error(NEG_HAMMING_LOSS, right, labels, 4) == pytest.approx(wanted)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_rate_with_the_largest_area_is_trained(devices, recipe, tmp_path, request, caplog):
    """One short run after the other on a single CPU device, else all in one program."""
    if devices == 1:
        request.getfixturevalue("one_device")
    config = recipe | {"learning_rates": (1e30, 1e-3, 1e28), "rate_search": "short"}
    config |= {"seeds": (0, 1), "epochs": 1}
    with caplog.at_level("INFO"):
        results = run(from_mapping(config), tmp_path / "run")
    assert "2 seeds, 3 learning rates: each rate is tried briefly, one is trained" in caplog.text
    assert "chosen 0.001: better than the first by more than a standard error" in caplog.text
    kept = [(r["seed"], r["learning_rate"]) for r in results["replicas"]]
    assert kept == [(0, 1e-3), (1, 1e-3)]
    # Of the first seed, on its tuning rows; two of the rates diverge.
    search = results["rate_search"]
    assert (search["learning_rate"], search["seed"], search["tuning_rows"]) == (1e-3, 0, 18)
    assert [area is not None for area in search["area"]] == [False, True, False]
    assert json.loads((tmp_path / "run" / "rate_search.json").read_text()) == search
    assert not (tmp_path / "run" / "rate_search").exists()
    exits = json.loads((tmp_path / "run" / "model" / "exits.json").read_text())
    assert exits["learning_rate"] == 1e-3
    # The same rate alone is the same run; and a second start searches nothing.
    single = run(from_mapping(config | {"learning_rates": (1e-3,)}), tmp_path / "single")
    assert single["replicas"][0]["individual"] == results["replicas"][0]["individual"]
    written = (tmp_path / "run" / "rate_search.json").stat().st_mtime_ns
    assert run(from_mapping(config), tmp_path / "run")["replicas"] == results["replicas"]
    assert (tmp_path / "run" / "rate_search.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_the_plain_full_model_has_a_search_of_its_own(recipe, tmp_path, one_device):
    """Searches the rates that the run chooses from, as a run of the plain model alone would."""
    config = recipe | {"learning_rates": (1e-9, 1e30, 1e-2), "rate_search": "short", "epochs": 4}
    results = run(from_mapping(config | {"baselines": "full"}), tmp_path / "run")
    record = json.loads((tmp_path / "run/baselines/fine_tuned/rate_search.json").read_text())
    assert record["learning_rates"] == [1e-9, 1e30, 1e-2]
    assert (record["seed"], record["tuning_rows"]) == (0, 18)
    plain = {"method": "early_exit", "exits": (3,), "pooling": "first", "head_init": "random"}
    alone = run(from_mapping(config | plain), tmp_path / "alone")
    assert alone["rate_search"] == record
    score = alone["replicas"][0]["individual"][0]["score"]
    assert results["baselines"]["fine_tuned"]["score"] == score


@pytest.mark.slow
def test_tuning_rows_are_evaluated_without_dropout(recipe, with_dropout, tmp_path, one_device):
    """Also under the release's preset, which leaves it on where it fits temperatures."""
    config = recipe | with_dropout | {"epochs": 1, "preset": "reference", "checkpoint_every": 5}
    outcome = train_and_evaluate(prepare(from_mapping(config)), tmp_path)
    job = prepare(from_mapping(config | {"calibration": "validation"}))
    plain = train_and_evaluate(job, tmp_path)  # from the last checkpoint
    assert plain.timing["train_examples"] == 0
    assert not np.array_equal(outcome.calibration.logits, plain.calibration.logits)
    np.testing.assert_array_equal(outcome.tuning.logits, plain.tuning.logits)
    np.testing.assert_array_equal(outcome.tuning.labels, plain.tuning.labels)


def test_the_saved_replica_is_the_best_of_the_chosen_rate():
    """Also where a replica of another rate has the largest area of all."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    truth = np.eye(2)[labels] * 2 - 1

    def outputs(right: float) -> np.ndarray:
        wrong = rng.random(200) >= right
        return np.where(wrong[:, None], -truth, truth)[None].repeat(2, axis=0)

    logits = np.stack([outputs(q) for q in (0.6, 0.99, 0.85, 0.9)])  # [R, E, N, C]
    identity = RunIdentity(replicas=((0, 1e-4), (0, 1e-3), (1, 1e-3), (1, 1e-4)))
    made = ExitOutputs(logits, labels, np.array([1, 2]), identity=identity)
    swapped = ExitOutputs(logits[[1, 0, 2, 3]], labels, np.array([1, 2]), identity=identity)
    assert analyse(made, made).best == 1
    best = analyse(swapped, swapped)  # 0.99 and 0.9 at 1e-4, 0.6 and 0.85 at 1e-3
    assert [best.replicas[r][1] for r in best.chosen] == [1e-4, 1e-4]
    assert best.best == 0
    # Tuning rows choose, where there are any; then calibration rows had nothing to choose between.
    tuned = analyse(swapped, swapped, tuning=made)
    assert tuned.best == 1
    assert tuned.resolver(1).compared == 1
    assert best.resolver(0).compared == 4


def test_a_refit_replaces_the_classifiers_alone_and_fits_the_trained_features(
    recipe, tmp_path, one_device
):
    config = recipe | {"epochs": 1, "head_init": "random", "head_refit": True}
    plain = from_mapping(config | {"head_refit": False, "rate_search": "full"})
    results = run(from_mapping(config), tmp_path / "refit")
    assert results["head_refit"] is True
    job = prepare(from_mapping(config))
    (training,) = model_specs(job.config)
    workdir = tmp_path / "again"
    workdir.mkdir()
    graphdef, params, _ = fit(job.training_job(training, workdir))
    new = refit_heads(job, training, graphdef, params, workdir)
    assert plain.head_refit is False
    changed = {
        tuple(p.key for p in path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(new), strict=True
        )
        if np.any(a != b)
    }
    wanted = {("heads", str(e), "classifier", k) for e in (1, 2, 3) for k in ("kernel", "bias")}
    assert changed == wanted
    # Where no step was better than the probe that training began with, the heads stay the probe's.
    begun = dataclasses.replace(
        job, probe=Probe(LinearClassifiers(*[np.zeros((1, 3))] * 3), np.zeros(0))
    )
    for steps, same in (((0,), True), ((8,), False)):
        kept = refit_heads(begun, training, graphdef, params, workdir, steps)
        pairs = zip(jax.tree.leaves(kept), jax.tree.leaves(params), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == same


def test_a_replica_that_diverged_keeps_its_heads_and_spoils_no_other(recipe, tmp_path, one_device):
    changes = {"epochs": 1, "head_refit": True, "learning_rates": (1e-3, 1e30)}
    results = run(from_mapping(recipe | changes), tmp_path / "run")
    sound, bad = results["replicas"]
    assert bad["diverged"]
    assert not sound["diverged"]
    assert results["best_replica"] == 0
    alone = run(from_mapping(recipe | changes | {"learning_rates": (1e-3,)}), tmp_path / "alone")
    assert sound["individual"] == alone["replicas"][0]["individual"]


def test_a_probe_alone_is_one_replica_whatever_the_rates(
    recipe, tmp_path, one_device, with_figures
):
    changes = {"epochs": 0, "head_refit": True, "learning_rates": (1e-3, 3e-3), "seeds": (0, 1)}
    results = run(from_mapping(recipe | changes), tmp_path)
    assert [(r["seed"], r["learning_rate"]) for r in results["replicas"]] == [(0, 1e-3), (1, 1e-3)]
    outputs = ExitOutputs.load(tmp_path / "exit_outputs" / "validation.npz")
    with np.load(tmp_path / "probe.npz") as arrays:
        predictions = arrays["predictions"][[0, 2]]
    np.testing.assert_array_equal(outputs.predictions, predictions)


def test_values_that_go_with_no_training_are_refused(recipe):
    with pytest.raises(UserError, match="epochs must be"):
        from_mapping(recipe | {"epochs": 0, "head_init": "random"})
    with pytest.raises(UserError, match="epochs must be"):
        from_mapping(recipe | {"epochs": "some"})
    assert from_mapping(recipe | {"epochs": "3"}).epochs == 3
    for changes in ({"epochs": 0}, {"head_refit": True}):
        with pytest.raises(UserError, match="learning_to_exit='joint' cannot be combined"):
            from_mapping(recipe | {"learning_to_exit": "joint"} | changes)


@pytest.mark.parametrize(
    ("backend", "devices", "seeds", "steps", "alone"),
    [
        ("cpu", 1, (0, 1), 10**6, True),
        ("cpu", 4, (0,), 40, False),
        ("gpu", 1, (0,), 40, True),  # shares its program with the training that follows
        ("gpu", 1, (0, 1), 40, False),
        ("gpu", 1, (0,), 10_000, False),  # a second program pays
    ],
)
def test_rates_share_a_program_where_that_saves_time(
    monkeypatch, backend, devices, seeds, steps, alone
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [None] * devices)
    config = Config(task="own", seeds=seeds, learning_rates=(1e-4, 3e-4), max_length=128)
    assert _one_rate_at_a_time(config.resolved(), steps) == alone
