"""Tuning rows: who reads them, the best state, the search for a learning rate, the refit."""

import json

import jax
import numpy as np
import pytest

from sweet_jax import ExitOutputs
from sweet_jax.config import UserError, from_mapping
from sweet_jax.data.batches import steps_per_epoch, training_batch_indices
from sweet_jax.data.splits import split_tuning_rows
from sweet_jax.exits.analysis import analyse, curve_area
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.simulation import simulate
from sweet_jax.head_fitting import refit_heads
from sweet_jax.learning_rate_search import choose_rate
from sweet_jax.pipeline import run, train_and_evaluate
from sweet_jax.preparation import prepare
from sweet_jax.training import early_stopping, schedule
from sweet_jax.training.early_stopping import standard_error, tuning_area
from sweet_jax.training.metrics import read_metrics, read_tuning

RECIPE = {"pooling": "mean", "head_init": "probe", "epochs": "auto", "learning_rates": (1e-3,)}


@pytest.fixture
def recipe(options) -> dict:
    return options | RECIPE | {"tuning_fraction": 0.2}


def test_no_row_is_read_for_two_things(recipe):
    job = prepare(from_mapping(recipe | {"seeds": (0, 1)}))
    for (own, held), tuning in zip(job.rows, job.tuning, strict=True):
        parts = [own, held, tuning]
        assert sum(map(len, parts)) == len(set(np.concatenate(parts)))
        texts = [{job.texts[i] for i in part} for part in parts]
        assert not texts[0] & (texts[1] | texts[2])
        assert (len(own), len(held), len(tuning)) == (72, 10, 18)
    assert set(job.tuning[0]) != set(job.tuning[1])
    # Without anything to tune there are none, and the other rows are as they always were.
    usual = prepare(from_mapping(recipe | {"epochs": 2, "head_init": "random"}))
    assert len(usual.tuning[0]) == 0
    calibration = [[j.texts[i] for i in j.rows[0][1]] for j in (job, usual)]
    assert calibration[0] == calibration[1]
    same = np.union1d(job.rows[0][0], job.tuning[0])
    kept = [job.texts[i] for i in same]
    assert sorted(kept) == sorted(usual.texts[i] for i in usual.rows[0][0])


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


def test_an_automatic_run_has_eight_evaluations_and_a_fixed_one_none():
    assert schedule.check_interval("auto", 320) == 40
    assert schedule.check_interval("auto", 322) == 41
    assert schedule.check_interval("auto", 3) == 1
    assert schedule.check_interval("auto", 0) == 0
    assert schedule.check_interval(5, 320) == 0
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


def states(config, workdir, monkeypatch, areas):
    """What a run keeps whose evaluations have these areas, [evaluations, R]."""
    given = iter(areas)

    def next_area(logits, *_):
        return np.asarray(next(given), float)

    monkeypatch.setattr("sweet_jax.training.early_stopping.tuning_area", next_area)
    workdir.mkdir()
    outcome = train_and_evaluate(prepare(from_mapping(config)), workdir)
    return outcome


def test_the_best_state_is_kept_and_training_ends_without_a_better_one(
    recipe, tmp_path, one_device, monkeypatch
):
    monkeypatch.setattr(schedule, "_EXAMPLES", 40)
    config = recipe | {"head_init": "random"}
    monkeypatch.setattr("sweet_jax.training.schedule.CHECKS", 12)
    # 18 tuning rows: a standard error of 0.1 to 0.12.
    rising = [[0.1], [0.3], [0.6], [0.55], [0.4], [0.4], [0.2]]
    outcome = states(config, tmp_path / "auto", monkeypatch, rising)
    log = read_tuning(tmp_path / "auto")
    interval = log[1]["step"]
    # The later of two that so few rows cannot tell apart; then three that are clearly worse.
    assert outcome.best_steps == {"exits_1_2_3": [3 * interval]}
    assert [row["step"] for row in log] == [interval * i for i in range(7)]
    assert [row["area"] for row in log] == rising
    assert len(read_metrics(tmp_path / "auto")) == 6 * interval
    # The parameters are those of that step, bit for bit.
    short = config | {"max_steps": 3 * interval}
    wanted = states(short, tmp_path / "short", monkeypatch, [[v] for v in np.linspace(0, 1, 20)])
    assert wanted.best_steps == outcome.best_steps  # evaluated after the last step too
    for a, b in zip(
        jax.tree.leaves(outcome.models[0].params),
        jax.tree.leaves(wanted.models[0].params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_each_replica_keeps_its_own_best_state(recipe, tmp_path, one_device, monkeypatch):
    monkeypatch.setattr(schedule, "_EXAMPLES", 20)
    config = recipe | {"head_init": "random", "seeds": (0, 1)}
    areas = [[0.1, 0.9], [0.5, 0.7], [0.2, 0.7], [0.2, 0.6], [0.2, 0.6]]
    outcome = states(config, tmp_path / "run", monkeypatch, areas)
    interval = read_tuning(tmp_path / "run")[1]["step"]
    assert outcome.best_steps == {"exits_1_2_3": [interval, 0]}
    start = states(
        recipe | {"head_init": "random", "seeds": (1,), "max_steps": 1},
        tmp_path / "start",
        monkeypatch,
        [[0.9], [0.8]],
    )
    assert outcome.validation.logits.shape[0] == 2
    np.testing.assert_allclose(
        outcome.validation.logits[1], start.validation.logits[0], rtol=1e-5, atol=1e-6
    )


def test_a_run_that_ended_early_is_not_trained_on(recipe, tmp_path, one_device, monkeypatch):
    monkeypatch.setattr(schedule, "_EXAMPLES", 20)
    config = recipe | {"head_init": "random"}
    falling = [[0.5], [0.1], [0.1], [0.1]]
    first = states(config, tmp_path / "run", monkeypatch, falling)
    again = train_and_evaluate(prepare(from_mapping(config)), tmp_path / "run")
    np.testing.assert_array_equal(first.validation.logits, again.validation.logits)
    assert again.best_steps == first.best_steps == {"exits_1_2_3": [0]}
    assert again.timing["train_examples"] == 0


def test_the_first_rate_is_kept_unless_another_is_clearly_better():
    def chosen(areas, rows, metric="accuracy"):
        return choose_rate(np.asarray(areas), rows, metric)

    assert chosen([0.80, 0.82, 0.78], 180) == 0  # a standard error is 0.029
    assert chosen([0.80, 0.84, 0.83], 180) == 1
    assert chosen([0.80, 0.82, 0.78], 18_000) == 1
    assert chosen([0.95, 1.0], 20) == 0  # one row
    assert chosen([-np.inf, 0.5, -np.inf], 18) == 1
    assert chosen([-np.inf, -np.inf], 18) == 0
    assert chosen([-0.01, 0.05], 180, "matthews") == 0  # a standard error is 0.075
    assert chosen([-0.01, 0.10], 180, "matthews") == 1


def test_standard_errors():
    found = standard_error(np.array([0.5, 1.0, -np.inf]), 96, "accuracy")
    np.testing.assert_allclose(found, [0.05, np.sqrt(0.98 * 0.02 / 100), 0.0])
    np.testing.assert_allclose(standard_error(0.6, 64, "matthews"), (1 - 0.36) / 8)


@pytest.mark.parametrize("alone", [True, False])
def test_the_rate_with_the_largest_area_is_trained(
    alone, recipe, tmp_path, one_device, monkeypatch
):
    monkeypatch.setattr(schedule, "_SHORTEST", 4)
    found = []
    given = iter([0.2, 0.7, 0.6])

    def chosen(logits, *_):
        found.append(logits.shape)
        return np.asarray([next(given) for _ in logits])

    monkeypatch.setattr("sweet_jax.learning_rate_search.tuning_area", chosen)
    monkeypatch.setattr(
        "sweet_jax.learning_rate_search.jax.device_count", lambda: 1 if alone else 4
    )
    rates = (1e-4, 1e-3, 3e-3)
    config = recipe | {
        "learning_rates": rates,
        "rate_search": "short",
        "seeds": (0, 1),
        "epochs": 1,
    }
    results = run(from_mapping(config), tmp_path / "run")
    # Of the first seed, on its tuning rows: one run after the other, or all in one program.
    assert found == ([(1, 3, 18, 2)] * 3 if alone else [(3, 3, 18, 2)])
    kept = [(r["seed"], r["learning_rate"]) for r in results["replicas"]]
    assert kept == [(0, 1e-3), (1, 1e-3)]
    search = results["rate_search"]
    assert (search["learning_rate"], search["seed"], search["tuning_rows"]) == (1e-3, 0, 18)
    assert search["area"] == [0.2, 0.7, 0.6]
    assert json.loads((tmp_path / "run" / "rate_search.json").read_text()) == search
    assert not (tmp_path / "run" / "rate_search").exists()
    exits = json.loads((tmp_path / "run" / "model" / "exits.json").read_text())
    assert exits["learning_rate"] == 1e-3
    # The same rate alone is the same run; and a second start searches nothing.
    single = run(from_mapping(config | {"learning_rates": (1e-3,)}), tmp_path / "single")
    assert single["replicas"][0]["individual"] == results["replicas"][0]["individual"]
    assert run(from_mapping(config), tmp_path / "run")["replicas"] == results["replicas"]
    assert len(found) == (3 if alone else 1)


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
    from sweet_jax.training.fit import fit
    from sweet_jax.training.initialization import model_specs
    from sweet_jax.training.job import TrainingJob

    (training,) = model_specs(job.config)
    workdir = tmp_path / "again"
    workdir.mkdir()
    rows = [own for own, _ in job.rows]
    graphdef, params, _ = fit(
        TrainingJob(job.config, job.checkpoint, training, 2, job.train, rows, workdir)
    )
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


def test_a_replica_that_diverged_keeps_its_heads_and_spoils_no_other(recipe, tmp_path, one_device):
    changes = {"epochs": 1, "head_refit": True, "learning_rates": (1e-3, 1e30)}
    results = run(from_mapping(recipe | changes), tmp_path / "run")
    sound, bad = results["replicas"]
    assert bad["diverged"]
    assert not sound["diverged"]
    assert results["best_replica"] == 0
    alone = run(from_mapping(recipe | changes | {"learning_rates": (1e-3,)}), tmp_path / "alone")
    assert sound["individual"] == alone["replicas"][0]["individual"]


def test_a_probe_alone_is_one_replica_whatever_the_rates(recipe, tmp_path, one_device):
    changes = {"epochs": 0, "head_refit": True, "learning_rates": (1e-3, 3e-3), "seeds": (0, 1)}
    results = run(from_mapping(recipe | changes), tmp_path)
    assert [(r["seed"], r["learning_rate"]) for r in results["replicas"]] == [(0, 1e-3), (1, 1e-3)]
    outputs = ExitOutputs.load(tmp_path / "exit_outputs" / "validation.npz")
    with np.load(tmp_path / "probe.npz") as arrays:
        predictions = arrays["predictions"][[0, 2]]
    np.testing.assert_array_equal(outputs.predictions, predictions)


def test_early_stopping_is_named_where_it_is_needed(recipe):
    assert early_stopping.initial_best_state({"a": np.zeros(2)}, np.float32(1)).area == -np.inf
    with pytest.raises(UserError, match="epochs must be"):
        from_mapping(recipe | {"epochs": 0, "head_init": "random"})
    with pytest.raises(UserError, match="epochs must be"):
        from_mapping(recipe | {"epochs": "some"})
    assert from_mapping(recipe | {"epochs": "3"}).epochs == 3
    for changes in ({"epochs": 0}, {"head_refit": True}):
        with pytest.raises(UserError, match="learning_to_exit is 'joint', but"):
            from_mapping(recipe | {"learning_to_exit": "joint"} | changes)
