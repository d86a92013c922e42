"""The panel of recipes: scores, statistics, units and tables."""

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
    PAIR_PROBE,
    VARIANTS,
    config_of,
    stored_as,
    units,
)
from experiments.score_rows import score_rows
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
def test_bootstrap_areas_equal_simulation_of_drawn_rows(metric, method):
    rows = outputs(metric, method)
    analysis = analyse(rows, rows)
    scores = score_run(analysis)
    confidences = exit_confidences(rows, "confidence", analysis.calibrators)
    counts = draw_counts(60)
    for draw in (0, 1):
        drawn = np.repeat(np.arange(60), counts[draw])
        curve = simulate(rows.rows(drawn), lambda *_, drawn=drawn: confidences[..., drawn])
        expected = [mean_to_full(*pair) for pair in zip(curve.cost, curve.score, strict=True)]
        np.testing.assert_allclose(scores.drawn_area[draw], expected, rtol=1e-12)
    all_once = np.ones((1, 60), int)
    areas = [
        bootstrap_replica_areas(rows.replica(s), confidences[s], all_once)[0] for s in range(2)
    ]
    np.testing.assert_allclose(areas, scores.area, rtol=1e-12)


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_bootstrap_scores_equal_metric_of_drawn_rows(metric):
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, 50), rng.integers(0, 2, (3, 50))
    scores = with_draws(metric, predictions, labels, 2)
    for draw in (0, 7):
        drawn = np.repeat(np.arange(50), draw_counts(50)[draw])
        expected = [
            compute_metric(metric, of_seed[drawn], labels[drawn], 2) for of_seed in predictions
        ]
        np.testing.assert_allclose(scores.drawn_area[draw], expected, rtol=1e-12)
    np.testing.assert_allclose(scores.area, scores.exits[:, 0])


def config(seeds: int = 5) -> dict[str, object]:
    """Returns the values of a config that scores.csv has."""
    values = {"method": "sweet", "exits": [1, 2, 4, 6], "learning_rates": [1e-4]}
    return values | {"train_size": 500, "seeds": list(range(seeds))}


def record(area: float, seeds: int = 5, spread: float = 0.01, exits: int = 4) -> Record:
    """Returns a record whose refitted scores are two points above the trained ones."""
    rng = np.random.default_rng(0)
    scores = {}
    for kind, gain in (("trained", 0.0), ("refit", 0.02)):
        areas = area + gain + spread * rng.normal(size=seeds)
        drawn = areas + spread * rng.normal(size=(300, 1)) if exits > 1 else None
        scores[kind] = Scores(np.full((seeds, exits), area + gain), areas, drawn)
    return Record(config(seeds), {"validation": 1000}, scores, {"cpu_seconds": 60})


def write_panel(output: Path, cells=("sst2-500", "mrpc-500")) -> None:
    """Writes a panel in which SWEET gains most by mean pooling and a probe."""
    areas = {"recipe": 0.85, "early_exit": 0.6, "sweet": 0.7, "multi_model": 0.65}
    baselines = {"probe_1": 0.7, "probe_2": 0.7, "probe_4": 0.7, "probe_6": 0.7, "tfidf": 0.86}
    for cell in cells:
        write_record(output, cell, "recipe", record(areas["recipe"]))
        write_record(output, cell, "plain", record(0.8, exits=1))
        for method in ("early_exit", "sweet", "multi_model"):
            write_record(output, cell, f"{method}-first-random", record(areas[method]))
            gain = 0.16 if method == "sweet" else 0.05
            write_record(output, cell, f"{method}-mean-probe", record(areas[method] + gain))
        scores = {
            name: Scores(np.full((5, 1), score), np.full(5, score))
            for name, score in baselines.items()
        }
        write_record(
            output,
            cell,
            "baselines",
            Record(config(), {"validation": 9}, scores, {"cpu_seconds": 60}),
        )


def test_record_is_read_as_written_and_file_is_small(tmp_path):
    written = record(0.7)
    write_record(tmp_path, "sst2-500", "recipe", written)
    read = read_record(tmp_path, "sst2-500", "recipe")
    for kind, scores in written.scores.items():
        actual = read.scores[kind]
        np.testing.assert_allclose(actual.area, scores.area, atol=1e-6)
        np.testing.assert_allclose(actual.exits, scores.exits, atol=1e-6)
        np.testing.assert_allclose(actual.drawn_area, scores.drawn_area, atol=3e-5)
    assert record_path(tmp_path, "sst2-500", "recipe").stat().st_size < 10_000
    assert read_record(tmp_path, "sst2-500", "plain") is None


def test_holm_multiplies_by_the_number_of_remaining_hypotheses():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])


def test_difference_is_paired_by_seed_and_by_drawn_rows():
    scores = record(0.7).scores["trained"]
    same_rows = Scores(scores.exits, scores.area - 0.01, scores.drawn_area - 0.01)
    difference = compare(scores, same_rows)
    np.testing.assert_allclose(difference[:3], [0.01] * 3, atol=1e-9)
    rng = np.random.default_rng(1)
    other_rows = Scores(
        scores.exits, scores.area - 0.01, scores.area + rng.normal(size=(300, 5)) - 0.01
    )
    difference = compare(scores, other_rows)
    assert difference.low < 0 < difference.high
    assert difference.p > 0.5


def test_default_has_largest_area_among_variants_never_significantly_below(tmp_path):
    write_panel(tmp_path)
    scores, _ = load_scores(tmp_path)
    assert choose_default(scores)[0] == "sweet-mean-probe refit"
    # Another variant has the largest mean, but is far below in one cell.
    write_record(tmp_path, "sst2-500", "recipe", record(0.99))
    write_record(tmp_path, "mrpc-500", "recipe", record(0.80))
    scores, _ = load_scores(tmp_path)
    best, names = choose_default(scores)
    assert names[0] == "recipe refit"
    assert best == "sweet-mean-probe refit"
    counts = {goal.text: goal.met_in for goal in goals(scores, "recipe refit")}
    assert counts["area not significantly below any of these"] == 1
    assert counts["every exit at or above TF-IDF less 0.5"] == 1


def test_score_exactly_at_the_margin_meets_a_goal(tmp_path):
    """In floating point, 0.785 + 0.02 is less than 0.81 - 0.005."""
    write_panel(tmp_path, cells=("sst2-500",))
    write_record(tmp_path, "sst2-500", "recipe", record(0.785))
    probes = {f"probe_{layer}": 0.81 for layer in (1, 2, 4, 6)} | {"tfidf": 0.81}
    scores = {name: Scores(np.full((5, 1), x), np.full(5, x)) for name, x in probes.items()}
    write_record(
        tmp_path,
        "sst2-500",
        "baselines",
        Record(config(), {"validation": 9}, scores, {"cpu_seconds": 60}),
    )
    met = {goal.text: goal.met_in for goal in goals(load_scores(tmp_path)[0], "recipe refit")}
    assert met["every exit at or above the frozen probe less 0.5"] == 1
    assert met["every exit at or above TF-IDF less 0.5"] == 1


def test_page_has_every_table_and_names_variants_not_run(tmp_path):
    write_panel(tmp_path)
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
    setfit = Record({}, {}, scores, {"cpu_seconds": 500})
    write_record(tmp_path, "sst2-500", "setfit", setfit)
    assert panel.main(["--render_only", f"--output={tmp_path}"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert re.search(r"\| sst2-500 \| 80\.\d \| 5 \| \*\*\+6\.9 \[.*\]\*\* \| 100 \|", page)


def test_committed_page_and_scores_equal_those_rendered_from_records(tmp_path):
    shutil.copytree(RESULTS / "cells", tmp_path / "cells")
    assert panel.main(["--render_only", f"--output={tmp_path}"]) == 0
    for name in ("README.md", "scores.csv"):
        assert (tmp_path / name).read_bytes() == (RESULTS / name).read_bytes()


def test_score_rows_name_the_exit_the_learning_rate_and_the_metric():
    exits = np.asarray([[0.1, 0.2], [0.3, 0.4]])
    values = {"method": "sweet", "exits": [1, 2, 4], "seeds": [5, 7], "train_size": 500}
    about = {"search": {"learning_rate": 3e-4}, "metric": "matthews"}
    kinds = {"refit": Scores(exits, exits.mean(1))}
    searched = Record(values | {"learning_rates": [1e-4, 3e-4]}, {"validation": 9}, kinds, about)
    rows = score_rows("panel", "cola", "recipe", searched)
    columns = ("seed", "exit", "value", "learning_rate", "metric", "area", "diverged")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        (5, 2, "0.100000", 3e-4, "matthews", "0.150000", "not recorded"),
        (5, 4, "0.200000", 3e-4, "matthews", "0.150000", "not recorded"),
        (7, 2, "0.300000", 3e-4, "matthews", "0.350000", "not recorded"),
        (7, 4, "0.400000", 3e-4, "matthews", "0.350000", "not recorded"),
    ]
    one_rate = Record(values | {"learning_rates": [1e-4]}, {"validation": 9}, kinds, {})
    assert {r["learning_rate"] for r in score_rows("panel", "cola", "plain", one_rate)} == {1e-4}
    one_exit = Scores(exits[:1, :1], exits[:1, 0])  # the same for all seeds
    baselines = Record(
        one_rate.config, {"validation": 9}, {"tfidf": one_exit, "probe_4": one_exit}, {}
    )
    rows = score_rows("panel", "cola", "baselines", baselines)
    columns = ("method", "seed", "exit", "value", "learning_rate", "diverged")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        ("tfidf", 5, "", "0.100000", "", ""),
        ("tfidf", 7, "", "0.100000", "", ""),
        ("probe_4", 5, 4, "0.100000", "", ""),
        ("probe_4", 7, 4, "0.100000", "", ""),
    ]


def test_units_are_unique_and_start_with_the_core():
    all_units = units()
    pairs = [name for name in CELLS if stored_as(name, "recipe-mean") == "recipe-mean"]
    assert {CELLS[name].task for name in pairs} == {"mrpc", "rte", "qqp", "qnli", "mnli"}
    # For single texts, a variant that only changes the pooling of pairs is its base variant.
    shared = (len(CELLS) - len(pairs)) * (3 + len(PAIR_PROBE) + len(AUTO_PROBE))
    assert len(set(all_units)) == len(all_units) == len(CELLS) * (len(VARIANTS) + 1) - shared
    assert all_units[: len(units(CORE))] == units(CORE)


def test_change_differs_from_its_base_variant_only_as_declared():
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


def test_variants_stored_as_one_run_share_its_scores_for_single_texts(tmp_path):
    for cell in ("sst2-500", "mrpc-500"):
        write_record(tmp_path, cell, "recipe", record(0.9))
    scores, records = load_scores(tmp_path)
    for kind in ("trained", "refit"):
        of_cell = scores["sst2-500"]
        areas = [
            of_cell[f"{name} {kind}"].area for name in ("recipe", "recipe-pair", "recipe-mean")
        ]
        np.testing.assert_array_equal(areas, [areas[0]] * 3)
    assert set(scores["mrpc-500"]) == {"recipe trained", "recipe refit"}
    assert set(records) == {("sst2-500", "recipe"), ("mrpc-500", "recipe")}


def unit_arguments(tmp_path: Path, *options: str) -> list[str]:
    """Returns arguments that run units of one cell."""
    folders = [f"--{name}={tmp_path / name}" for name in ("workdir", "output")]
    data = [f"--data_dir={tmp_path}", f"--text_dir={tmp_path}"]
    return [*folders, *data, "--cells=rte-100", *options]


def test_failed_units_wait_for_retry_and_finished_units_are_not_rerun(
    tmp_path, monkeypatch, capsys
):
    variants_run = []

    def run_variant(name, variant, options):
        variants_run.append(variant)
        if variant == "plain" and variants_run.count("plain") == 1:
            raise ValueError("no luck")
        return record(0.7, seeds=3)

    monkeypatch.setattr(panel, "run_variant", run_variant)
    monkeypatch.setattr(panel, "resolve_path", Path)  # the encoder may not be installed
    arguments = unit_arguments(tmp_path, "--variants=recipe,plain,frozen")
    assert panel.main(arguments) == 1
    assert panel.main(arguments) == 1
    assert variants_run == ["recipe", "plain", "frozen"]
    assert panel.main([*arguments, "--list"]) == 0
    assert "failed" in capsys.readouterr().out
    assert panel.main([*arguments, "--retry"]) == 0
    assert variants_run == ["recipe", "plain", "frozen", "plain"]


def test_cell_locked_by_another_process_is_not_run(tmp_path, monkeypatch):
    """Another process writes the record while this one waits."""
    monkeypatch.setattr(panel, "run_variant", lambda *_: pytest.fail("the cell is locked"))
    monkeypatch.setattr(panel, "resolve_path", Path)
    with contextlib.ExitStack() as lock:
        lock.enter_context(lock_directory(tmp_path / "workdir" / "rte-100"))

        def finish(seconds):
            write_record(tmp_path / "output", "rte-100", "recipe", record(0.7, seeds=3))
            lock.close()

        monkeypatch.setattr(panel.time, "sleep", finish)
        assert panel.main(unit_arguments(tmp_path, "--variants=recipe")) == 0


def test_setfit_trains_on_all_rows_of_its_seed_with_their_labels(checkpoint, rows):
    values = {"task": "tiny", "checkpoint": str(checkpoint), "exits": (1, 3), "seeds": (0, 1)}
    values |= {"data_files": str(rows), "text_columns": "text", "max_length": 16}
    values |= {"train_size": 60, "calibration_fraction": 0.1, "tuning_fraction": 0.1}
    job = prepare(from_mapping(values))
    classes = job.dataset.classes
    with rows.open(newline="") as file:
        file_rows = {(row["text"], row["label"]) for row in csv.DictReader(file)}
    held_out = {text for (text,) in job.dataset.validation.texts}
    texts_of_seeds = []
    for replica in (0, 1):
        texts, labels = all_rows(job, replica)
        assert len(texts) == len(set(texts)) == 60
        labelled = {(text, classes[y]) for text, y in zip(texts, labels, strict=True)}
        assert labelled <= file_rows
        assert not held_out & set(texts)
        texts_of_seeds.append(set(texts))
    assert texts_of_seeds[0] != texts_of_seeds[1]


@pytest.mark.nightly
def test_variants_and_baselines_are_scored_on_the_same_validation_rows(
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
    first = jax.devices()[:1]  # one device compiles more quickly than four
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
def test_invalid_options_are_refused_by_name(arguments, words, tmp_path, capsys):
    assert panel.main([*arguments, f"--output={tmp_path}"]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
