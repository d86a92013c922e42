"""The panel of recipes: its scores, statistics, order of work and tables."""

import argparse
import contextlib
import csv
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import panel
from experiments.comparison import mean_to_full
from experiments.panel_criterion import choose_default, goals
from experiments.panel_records import (
    Record,
    Scores,
    bootstrap_replica_areas,
    draw_counts,
    read_record,
    record_path,
    score_run,
    write_record,
)
from experiments.panel_setfit import all_rows, with_draws
from experiments.panel_statistics import compare, holm, load_scores
from experiments.panel_variants import (
    AUTO_PROBE,
    CELLS,
    CHANGES,
    CORE,
    VARIANTS,
    config_of,
    stored_as,
    units,
)
from sweet_jax.config import from_mapping
from sweet_jax.directories import lock_directory
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.outputs import ExitOutputs, RunIdentity, layer_cost
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.simulation import simulate
from sweet_jax.preparation import prepare

RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "panel"


def outputs(metric: str, method: str = "early_exit", rows: int = 60) -> ExitOutputs:
    """Returns outputs of two seeds, three exits and three classes, with ties."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(2, 3, rows, 3)).round(1).astype(np.float32)
    labels = rng.integers(0, 3, rows)
    identity = RunIdentity(metric=metric, policy="confidence", classes=("a", "b", "c"))
    exits = (1, 2, 4)
    return ExitOutputs(
        logits, labels, np.asarray(exits), layer_cost(exits, method), identity=identity
    )


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
@pytest.mark.parametrize("method", ["early_exit", "multi_model"])
def test_areas_on_drawn_rows_are_those_of_the_simulator_on_these_rows(metric, method):
    rows = outputs(metric, method)
    analysis = analyse(rows, rows)
    scores = score_run(analysis)
    confidences = exit_confidences(rows, "confidence", analysis.calibrators)
    counts = draw_counts(60)
    for d in (0, 1):
        drawn = np.repeat(np.arange(60), counts[d])
        curve = simulate(rows.rows(drawn), lambda *_, at=drawn: confidences[..., at])
        expected = [mean_to_full(*pair) for pair in zip(curve.cost, curve.score, strict=True)]
        np.testing.assert_allclose(scores.drawn_area[d], expected, rtol=1e-12)
    ones = np.ones((1, 60), int)
    whole = [bootstrap_replica_areas(rows.replica(s), confidences[s], ones)[0] for s in range(2)]
    np.testing.assert_allclose(whole, scores.area, rtol=1e-12)


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_scores_on_drawn_rows_are_the_metric_of_these_rows(metric):
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, 50), rng.integers(0, 2, (3, 50))
    found = with_draws(metric, predictions, labels, 2)
    for d in (0, 7):
        at = np.repeat(np.arange(50), draw_counts(50)[d])
        expected = [compute_metric(metric, each[at], labels[at], 2) for each in predictions]
        np.testing.assert_allclose(found.drawn_area[d], expected, rtol=1e-12)
    np.testing.assert_allclose(found.area, found.exits[:, 0])


def record(area: float, seeds: int = 5, spread: float = 0.01, exits: int = 4) -> Record:
    """Returns a record with these scores as trained, and two points more as refitted."""
    rng = np.random.default_rng(0)
    scores = {}
    for kind, more in (("trained", 0.0), ("refit", 0.02)):
        areas = area + more + spread * rng.normal(size=seeds)
        drawn = areas + spread * rng.normal(size=(300, 1)) if exits > 1 else None
        scores[kind] = Scores(np.full((seeds, exits), area + more), areas, drawn)
    return Record({"exits": [1, 2, 4, 6]}, {"validation": 1000}, scores, {"cpu_seconds": 60})


def fill(output: Path, cells=("sst2-500", "mrpc-500")) -> None:
    """Writes a panel in which SWEET gains most by mean pooling and a probe."""
    areas = {"recipe": 0.85, "early_exit": 0.6, "sweet": 0.7, "multi_model": 0.65}
    one = {"probe_1": 0.7, "probe_2": 0.7, "probe_4": 0.7, "probe_6": 0.7, "tfidf": 0.86}
    for cell in cells:
        write_record(output, cell, "recipe", record(areas["recipe"]))
        write_record(output, cell, "plain", record(0.8, exits=1))
        for method in ("early_exit", "sweet", "multi_model"):
            write_record(output, cell, f"{method}-first-random", record(areas[method]))
            more = 0.16 if method == "sweet" else 0.05
            write_record(output, cell, f"{method}-mean-probe", record(areas[method] + more))
        kinds = {k: Scores(np.full((5, 1), v), np.full(5, v)) for k, v in one.items()}
        write_record(output, cell, "baselines", Record({}, {}, kinds, {"cpu_seconds": 60}))


def test_a_record_is_read_as_it_was_written_and_is_small(tmp_path):
    given = record(0.7)
    write_record(tmp_path, "sst2-500", "recipe", given)
    found = read_record(tmp_path, "sst2-500", "recipe")
    for kind, scores in given.scores.items():
        read = found.scores[kind]
        np.testing.assert_allclose(read.area, scores.area, atol=1e-6)
        np.testing.assert_allclose(read.exits, scores.exits, atol=1e-6)
        np.testing.assert_allclose(read.drawn_area, scores.drawn_area, atol=3e-5)
    assert record_path(tmp_path, "sst2-500", "recipe").stat().st_size < 10_000
    assert read_record(tmp_path, "sst2-500", "plain") is None


def test_holm_multiplies_by_the_hypotheses_that_are_left():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])


def test_a_difference_is_paired_by_seed_and_by_drawn_rows():
    one = record(0.7).scores["trained"]
    same_rows = Scores(one.exits, one.area - 0.01, one.drawn_area - 0.01)
    found = compare(one, same_rows)
    np.testing.assert_allclose(found[:3], [0.01] * 3, atol=1e-9)
    rng = np.random.default_rng(1)
    apart = Scores(one.exits, one.area - 0.01, one.area + rng.normal(size=(300, 5)) - 0.01)
    found = compare(one, apart)
    assert found.low < 0 < found.high
    assert found.p > 0.5


def test_the_default_is_the_largest_area_that_is_nowhere_significantly_below(tmp_path):
    fill(tmp_path)
    found, _ = load_scores(tmp_path)
    assert choose_default(found)[0] == "sweet-mean-probe refit"
    # Another variant has the largest mean, but is far below in one cell.
    write_record(tmp_path, "sst2-500", "recipe", record(0.99))
    write_record(tmp_path, "mrpc-500", "recipe", record(0.80))
    found, _ = load_scores(tmp_path)
    best, names = choose_default(found)
    assert names[0] == "recipe refit"
    assert best == "sweet-mean-probe refit"
    counts = {goal.text: goal.met_in for goal in goals(found, "recipe refit")}
    assert counts["area not significantly below any of these"] == 1
    assert counts["every exit at or above TF-IDF less 0.5"] == 1


def test_the_page_has_every_table_and_names_what_was_not_run(tmp_path):
    fill(tmp_path)
    assert panel.main(["--render_only", f"--output={tmp_path}"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "| sweet-mean-probe refit | 87.9" in page
    assert "Differences between the methods, by read-out" in page
    assert "- frozen: every cell" in page
    assert "+10.0; 2 above, 0 below of 2" in page  # SWEET - Early-Exit as published
    write_record(tmp_path, "sst2-500", "early_exit-distilled", record(0.68))
    assert panel.main(["--render_only", f"--output={tmp_path}"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "| early_exit-distilled | +3.0; 1 above, 0 below of 1 | +3.0;" in page
    assert "SetFit" not in page
    scores = {
        "setfit": record(0.8).scores["trained"],
        "recipe exit 6": record(0.85).scores["refit"],
    }
    beside = Record({}, {}, scores, {"cpu_seconds": 500})
    write_record(tmp_path, "sst2-500", "setfit", beside)
    assert panel.main(["--render_only", f"--output={tmp_path}"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert re.search(r"\| sst2-500 \| 80\.\d \| 5 \| \*\*\+6\.9 \[.*\]\*\* \| 100 \|", page)


def test_the_page_is_rendered_from_the_committed_records(tmp_path):
    shutil.copytree(RESULTS / "cells", tmp_path / "cells")
    assert panel.main(["--render_only", f"--output={tmp_path}"]) == 0
    assert (tmp_path / "README.md").read_bytes() == (RESULTS / "README.md").read_bytes()


def test_stages_have_all_units_once_and_the_core_first():
    every = units()
    pairs = [name for name in CELLS if stored_as(name, "recipe-mean") == "recipe-mean"]
    assert {CELLS[name].task for name in pairs} == {"mrpc", "rte", "qqp", "qnli", "mnli"}
    # A variant of another pooling of pairs is the other variant where a row is one text.
    same = (len(CELLS) - len(pairs)) * (1 + len(AUTO_PROBE))
    assert len(set(every)) == len(every) == len(CELLS) * (len(VARIANTS) + 1) - same
    assert every[: len(units(CORE))] == units(CORE)


def test_a_change_differs_from_the_variant_that_it_changes_in_what_it_says():
    options = argparse.Namespace(data_dir=Path("glue"), text_dir=Path("text"))
    for name, (base, change) in CHANGES.items():
        assert VARIANTS[name] == VARIANTS[base] | change
        assert config_of("sst2-500", name, options) != config_of("sst2-500", base, options)


def test_all_variants_of_a_cell_train_on_the_same_rows():
    options = argparse.Namespace(data_dir=Path("glue"), text_dir=Path("text"))
    rows = {
        (config.tunes, config.seeds, config.calibration_fraction, config.tuning_fraction)
        for variant in ("baselines", *VARIANTS)
        for config in [config_of("sst2-500", variant, options)]
    }
    assert rows == {(True, (0, 1, 2, 3, 4), 0.1, 0.1)}


def test_variants_of_one_run_have_its_scores_where_a_row_is_one_text(tmp_path):
    for cell in ("sst2-500", "mrpc-500"):
        write_record(tmp_path, cell, "recipe", record(0.9))
    found, records = load_scores(tmp_path)
    for kind in ("trained", "refit"):
        own, other = (found["sst2-500"][f"{name} {kind}"] for name in ("recipe", "recipe-mean"))
        np.testing.assert_array_equal(own.area, other.area)
    assert not [name for name in found["mrpc-500"] if "mean" in name]
    assert set(records) == {("sst2-500", "recipe"), ("mrpc-500", "recipe")}


def start(tmp_path: Path, *more: str) -> list[str]:
    """Returns arguments that run two units of one cell."""
    folders = [f"--{name}={tmp_path / name}" for name in ("workdir", "output")]
    return [*folders, f"--data_dir={tmp_path}", f"--text_dir={tmp_path}", "--cells=rte-100", *more]


def test_what_failed_is_left_until_retry_and_what_is_done_is_not_run_again(
    tmp_path, monkeypatch, capsys
):
    ran = []

    def run_variant(name, variant, options):
        ran.append(variant)
        if variant == "plain" and ran.count("plain") == 1:
            raise ValueError("no luck")
        return record(0.7, seeds=3)

    monkeypatch.setattr(panel, "run_variant", run_variant)
    monkeypatch.setattr(panel, "resolve_path", Path)  # the encoder may not be installed
    arguments = start(tmp_path, "--variants=recipe,plain,frozen")
    assert panel.main(arguments) == 1
    assert panel.main(arguments) == 1
    assert ran == ["recipe", "plain", "frozen"]
    assert panel.main([*arguments, "--list"]) == 0
    assert "failed" in capsys.readouterr().out
    assert panel.main([*arguments, "--retry"]) == 0
    assert ran == ["recipe", "plain", "frozen", "plain"]


def test_a_cell_that_another_process_is_in_is_left_to_it(tmp_path, monkeypatch):
    """The other process writes the record while this one waits."""
    monkeypatch.setattr(panel, "run_variant", lambda *_: pytest.fail("two in one cell"))
    monkeypatch.setattr(panel, "resolve_path", Path)
    with contextlib.ExitStack() as held:
        held.enter_context(lock_directory(tmp_path / "workdir" / "rte-100"))

        def finish(seconds):
            write_record(tmp_path / "output", "rte-100", "recipe", record(0.7, seeds=3))
            held.close()

        monkeypatch.setattr(panel.time, "sleep", finish)
        assert panel.main(start(tmp_path, "--variants=recipe")) == 0


def test_setfit_has_all_rows_of_a_seed_with_their_own_labels(checkpoint, rows):
    values = {"task": "tiny", "checkpoint": str(checkpoint), "exits": (1, 3), "seeds": (0, 1)}
    values |= {"data_files": str(rows), "text_columns": "text", "max_length": 16}
    values |= {"train_size": 60, "calibration_fraction": 0.1, "tuning_fraction": 0.1}
    job = prepare(from_mapping(values))
    classes = job.dataset.classes
    with rows.open(newline="") as file:
        given = {(row["text"], row["label"]) for row in csv.DictReader(file)}
    held_out = {text for (text,) in job.dataset.validation.texts}
    drawn = []
    for replica in (0, 1):
        texts, labels = all_rows(job, replica)
        assert len(texts) == len(set(texts)) == 60
        assert {(text, classes[label]) for text, label in zip(texts, labels, strict=True)} <= given
        assert not held_out & set(texts)
        drawn.append(set(texts))
    assert drawn[0] != drawn[1]


@pytest.mark.slow
def test_a_variant_is_trained_and_scored_on_the_same_validation_rows_as_the_baselines(
    checkpoint, rows, tmp_path, monkeypatch
):
    values = {
        "task": "tiny",
        "checkpoint": str(checkpoint),
        "exits": (1, 3),
        "data_files": str(rows),
        "text_columns": "text",
        "seeds": (0, 1),
        "max_length": 16,
        "train_size": 100,
        "head_refit": True,
        "pooling": "mean",
        "head_init": "probe",
        "method": "sweet",
        "epochs": 1,
    }
    first = jax.devices()[:1]  # compiled for one device, which is quicker than for four
    monkeypatch.setattr("sweet_jax.training.sharding.jax.devices", lambda: first)
    monkeypatch.setattr(panel, "config_of", lambda *_: from_mapping(values))
    monkeypatch.setattr(panel, "VALIDATION_ROWS", 20)
    options = argparse.Namespace(workdir=tmp_path)
    trained = panel.run_variant("rte-100", "sweet-mean-probe", options)
    assert trained.n["validation"] == 20
    for scores in trained.scores.values():
        assert scores.exits.shape == (2, 2)
        assert scores.drawn_area.shape == (300, 2)
    values["epochs"] = 0
    frozen = panel.run_variant("rte-100", "frozen", options)
    baselines = panel.run_variant("rte-100", "baselines", options)
    probes = [baselines.scores[f"probe_{layer}"].exits[:, 0] for layer in (1, 3)]
    np.testing.assert_allclose(frozen.scores["trained"].exits, np.stack(probes, axis=1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cells=sst2-50"], "unknown cell 'sst2-50': did you mean 'sst2-500'?"),
        (["--variants=recip"], "unknown variant 'recip': did you mean 'recipe'?"),
        (["--data_dir=nowhere", "--text_dir=."], "--data_dir 'nowhere' is not a directory: set it"),
        ([], "set --data_dir and --text_dir, or --list or --render_only"),
    ],
)
def test_bad_options_are_named(arguments, words, tmp_path, capsys):
    assert panel.main([*arguments, f"--output={tmp_path}"]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
