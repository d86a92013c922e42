"""The experiments end to end on a tiny model: what they run, resume, write and refuse."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_policies import known_table
from tiny import WORDS, write_checkpoint

from experiments import (
    ablation,
    cells,
    curves,
    grid,
    individual,
    isolation,
    large_at_small_cost,
    learning_to_exit,
    pcee_control,
    rates,
    render,
    rendering,
    sizes,
)
from sweet_jax.config import Config
from sweet_jax.exits.analysis import analyse, area
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.pipeline import run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs of seconds are compiled for one device, which is quicker than for four."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweet_jax.training.sharding.jax.devices", lambda: first)
        yield


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """Options of cells that take seconds: two layers, learnable rows, two seeds, two rates."""
    data = tmp_path_factory.mktemp("glue")
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "shallow", layers=2)
    rng = np.random.default_rng(0)
    (data / "sst2").mkdir()
    for split, count in (("train", 80), ("validation", 40)):
        labels = rng.integers(0, 2, count)
        noise = [" ".join(rng.choice(WORDS[2:], rng.integers(1, 12))) for _ in labels]
        texts = [f"{WORDS[y]} {words}" for y, words in zip(labels, noise, strict=True)]
        table = pa.table({"sentence": texts, "label": labels, "idx": np.arange(count)})
        pq.write_table(table, data / "sst2" / f"{split}.parquet")
    return [
        *(f"--data_dir={data}", f"--checkpoint={checkpoint}", "--exits=1,2"),
        *("--tasks=sst2", "--seeds=0,1", "--learning_rates=1e-3,3e-3", "--max_length=32"),
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
    return Path(next(a for a in arguments if a.startswith("--output=")).partition("=")[2])


def without(arguments: list[str], *names: str) -> list[str]:
    return [a for a in arguments if a.partition("=")[0] not in names]


def test_cells_leave_records_outputs_and_no_checkpoints(finished):
    out = output(finished)
    states = json.loads((out / "manifest.json").read_text())
    names = {f"sst2-{m}" for m in ("sweet", "early_exit", "multi_model")}
    assert set(states) == names
    assert all(state["state"] == "done" for state in states.values())
    record = json.loads((out / "cells" / "sst2-sweet.json").read_text())
    assert [(r["seed"], r["learning_rate"]) for r in record["replicas"]] == [
        (0, 1e-3), (0, 3e-3), (1, 1e-3), (1, 3e-3)
    ]  # fmt: skip
    halves = [
        ExitOutputs.load(out / "outputs" / "sst2-sweet" / f"{split}.npz")
        for split in ("calibration", "validation")
    ]
    assert halves[1].logits.shape == (4, 2, 40, 2)
    curve = analyse(*halves).curve
    for r, replica in enumerate(record["replicas"]):
        assert replica["area"] == pytest.approx(area(curve.cost[r], curve.score[r]), abs=1e-9)
    assert not list(out.parent.glob("work/*"))


def test_tables_say_what_the_records_say(finished, capsys):
    assert individual.run(finished) == 0
    text = (output(finished) / "tables" / "individual.md").read_text()
    record = json.loads((output(finished) / "cells" / "sst2-sweet.json").read_text())
    kept = [r for r in record["replicas"] if r["learning_rate"] == record["learning_rate"]]
    scores = np.asarray([[100 * e["score"] for e in r["individual"]] for r in kept])
    means, deviations = scores.mean(axis=0), scores.std(axis=0, ddof=1)
    cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(means, deviations, strict=True)]
    assert f"| sst2 | SWEET | {' | '.join(cells)} | 2 x 40 |" in text
    assert text in capsys.readouterr().out


def test_differences_are_paired_by_seed_and_their_mean_over_tasks_too():
    def made(scores):  # of seeds 0, 1, 2 at two exits
        replicas = [
            {"seed": s, "learning_rate": 1e-4, "individual": [{"score": v} for v in row]}
            for s, row in enumerate(scores)
        ]
        return {"learning_rate": 1e-4, "replicas": replicas[::-1]}

    base = made([[0.5, 0.6], [0.6, 0.7], [0.7, 0.8]])
    pairs = {
        "a": (made([[0.52, 0.6], [0.62, 0.7], [0.72, 0.81]]), base),
        "b": (made([[0.54, 0.6], [0.64, 0.7], [0.74, 0.79]]), base),
        "c": (None, base),
    }
    rows = rendering.differences("gap", pairs, rendering.exit_scores)
    assert rows == [
        ["gap", "a", "**+2.0 ± 0.0**", "+0.3 ± 1.4"],
        ["gap", "b", "**+4.0 ± 0.0**", "-0.3 ± 1.4"],
        ["gap", "mean of 2 tasks", "**+3.0 ± 0.0**", rows[2][3]],
    ]
    assert rows[2][3] in ("+0.0 ± 0.0", "-0.0 ± 0.0")


def test_a_second_start_runs_nothing(finished, monkeypatch):
    monkeypatch.setattr(cells, "run", None)  # calling it would fail
    for script in (individual, rates, curves):
        assert script.run(finished) == 0
    assert (output(finished) / "figures" / "curves.svg").stat().st_size > 1000


@pytest.fixture(scope="module")
def small(tmp_path_factory, arguments) -> list[str]:
    """Options of single runs, with an output of their own."""
    folder = tmp_path_factory.mktemp("small")
    return [
        *without(arguments, "--tasks", "--seeds", "--learning_rates"),
        *("--tasks=sst2", "--seeds=0", "--learning_rates=3e-3", "--methods=sweet,early_exit"),
        *(f"--output={folder / 'out'}", f"--workdir={folder / 'work'}"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "more", "rows"),
    [
        (sizes, ["--sizes=40"], 2),
        (ablation, [], 4),
        (isolation, [], 5),
        (learning_to_exit, ["--methods=sweet"], 4),
    ],
)
def test_each_script_runs_its_cells(small, script, more, rows, monkeypatch):
    # Every kind of change once: each setting is a program of its own to compile.
    monkeypatch.setattr(isolation, "DIALS", (*isolation.DIALS[:3], *isolation.DIALS[-3:-1]))
    monkeypatch.setattr(ablation, "VARIANTS", (ablation.VARIANTS[0], ablation.VARIANTS[-1]))
    assert script.run([*small, *more]) == 0
    name = script.__name__.rpartition(".")[2]
    text = (output(small) / "tables" / f"{name}.md").read_text()
    assert text.count("| sst2 | ") - text.count(" | sst2 | +") - text.count(" | sst2 | -") == rows
    assert "Not done yet" not in text


def test_render_makes_one_page_of_all_that_is_done(finished):
    assert render.run(finished) == 0
    page = (output(finished) / "index.html").read_text()
    assert "Each exit alone" in page
    assert "Speed-accuracy curves" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "![" in (output(finished) / "README.md").read_text()


@pytest.mark.parametrize(
    "script",
    [individual, rates, curves, sizes, ablation, isolation, learning_to_exit, pcee_control, render],
)
def test_with_nothing_done_there_are_empty_tables_and_no_figure(arguments, script, tmp_path):
    other = [*without(arguments, "--output"), f"--output={tmp_path}", "--render_only"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an empty figure, say
        assert script.run(other) == 0
    assert not list(tmp_path.rglob("*.png"))


def test_a_second_rendering_writes_the_same_bytes(finished):
    folder = output(finished)
    assert render.run(finished) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(path.suffix == ".svg" for path in before)
    assert render.run(finished) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_many_unfinished_cells_are_counted_and_few_named():
    assert rendering.missing_note(["a-x", "b-x"], {"b-x": {}}) == " Not done yet: a-x."
    many = rendering.missing_note([f"a-{n}" for n in range(5)] + ["b-1"], {})
    assert many == " Not done yet: 6 cells, of a, b (--list names them)."
    assert rendering.missing_note(["a"], {"a": {}}) == ""


def test_control_of_accuracy_from_what_is_done(finished):
    assert pcee_control.run([*finished, "--splits=4", "--render_only"]) == 0
    text = (output(finished) / "tables" / "pcee_control.md").read_text()
    assert "Is the dial an accuracy?" in text
    assert text.count("| sst2 | 2% |") == text.count("| sst2 | 10% |") == 1
    assert (output(finished) / "figures" / "pcee_control.png").exists()


def test_control_finds_what_is_achieved():
    """Exits that err alone: their confidence is an accuracy, and rules that know it hit it."""
    rows, chance = known_table(4000, seed=1)
    right = (rows.predictions == rows.labels[:, None])[0].mean(axis=-1)
    found = pcee_control.control(rows, np.asarray([0.8]), splits=3)
    for number, (_, policy, choose) in enumerate(pcee_control.RULES):
        accuracy, cost = found[number, 0].mean(axis=0)
        assert 1 / 3 <= cost <= 1
        if choose:
            assert accuracy == pytest.approx(0.8, abs=0.03)
        elif policy == "pcee_isotonic":  # near it: the last exit takes what is left
            assert accuracy == pytest.approx(0.8, abs=0.05)
    assert right.mean() == pytest.approx(chance.mean(), abs=0.02)
    certified = pcee_control.violations(rows, 400, draws=20)
    assert certified[:, 1].max() <= 4  # of 20, at alpha = 5%
    assert np.all(np.diff(certified[:, 2]) <= 1e-12)  # a looser promise is never dearer


def test_a_deep_model_against_shallow_ones(finished):
    assert large_at_small_cost.run([*finished, "--render_only"]) == 0
    text = (output(finished) / "tables" / "large_at_small_cost.md").read_text()
    for line in ("| sst2 | SWEET | layers |", "| sst2 | Early-Exit | clock |"):
        assert line in text
    assert "| full model of that depth |" in text


def test_at_equal_cost_the_threshold_is_the_calibration_rows_best(tmp_path):
    tables = known_table(300, seed=2)[0], known_table(500, seed=3)[0]
    for split, rows in zip(("calibration", "validation"), tables, strict=True):
        rows.save(tmp_path / f"{split}.npz")
    cost = np.asarray([1.0, 3.0, 4.0])  # milliseconds, say
    found = large_at_small_cost.at_cost(tmp_path, 0, cost, np.asarray([0.5, 1.0, 2.5, 4.0]))
    assert np.isnan(found[0])
    right = (tables[1].predictions == tables[1].labels[:, None])[0].mean(axis=-1)
    assert found[1] == pytest.approx(right[0])
    assert found[2] >= right[0]


def test_replicas_of_a_cell_equal_their_solo_runs(finished, arguments, tmp_path):
    parsed = grid.parser(None).parse_args(arguments)
    one = grid.cell(parsed, "sst2", "sweet")
    saved = ExitOutputs.load(output(finished) / "outputs" / "sst2-sweet" / "validation.npz")
    solo = Config(**{**vars(one.config), "seeds": (1,), "learning_rates": (3e-3,)})
    run(solo, tmp_path / "solo")
    alone = ExitOutputs.load(tmp_path / "solo" / "exit_outputs" / "validation.npz")
    np.testing.assert_allclose(saved.logits[3], alone.logits[0], atol=1e-5)


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
        while not list((tmp_path / "work").glob("*/checkpoints/*/2*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert individual.run([*full, "--list"]) == 0
    assert individual.run(full) == 0
    for name in ("sst2-sweet", "sst2-early_exit"):
        ours, theirs = (
            json.loads((folder / "cells" / f"{name}.json").read_text())
            for folder in (tmp_path / "out", output(finished))
        )
        for replica, other in zip(ours["replicas"], theirs["replicas"], strict=True):
            scores = [[e["score"] for e in r["individual"]] for r in (replica, other)]
            assert scores[0] == scores[1]
            assert replica["area"] == pytest.approx(other["area"], abs=1e-6)


def test_a_failed_cell_does_not_stop_the_others(arguments, tmp_path, capsys):
    full = [
        *without(arguments, "--learning_rates", "--seeds", "--tasks"),
        *("--tasks=rte,sst2", "--methods=sweet", "--learning_rates=3e-3", "--seeds=0"),
        *(f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"),
    ]
    assert individual.run(full) == 1  # there are no rows of rte
    states = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert states["rte-sweet"]["state"] == "failed"
    assert "rte" in states["rte-sweet"]["error"]
    assert states["sst2-sweet"]["state"] == "done"
    capsys.readouterr()
    assert individual.run([*full, "--list"]) == 0
    assert "failed  rte-sweet" in capsys.readouterr().out


def test_other_settings_in_the_same_output_are_refused(finished, capsys):
    assert individual.run([*finished, "--set", "epochs=2"]) == 2
    assert "was made with epochs 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks=sst3"], "did you mean 'sst2'"),
        (["--methods=sweat"], "did you mean 'sweet'"),
        (["--seeds=a"], "--seeds must be numbers"),
        (["--set", "epoch=3"], "did you mean 'epochs'"),
    ],
)
def test_wrong_options_get_one_line(arguments, more, message, capsys):
    assert individual.run([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "script",
    [
        *(individual, rates, curves, sizes, ablation, isolation, learning_to_exit),
        *(render, grid, pcee_control, large_at_small_cost),
    ],
)
def test_help_says_what_is_reproduced(script, capsys):
    run_script = script.run if hasattr(script, "run") else None
    main = run_script if script is not grid else lambda a: grid.main(grid.__doc__, None, None, a)
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert script.__doc__.splitlines()[0] in capsys.readouterr().out
