"""The experiments end to end on a tiny model: what they run, resume, write and refuse."""

import argparse
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
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
from tiny import WORDS, write_checkpoint

from experiments import (
    ablation,
    cells,
    conflict,
    curves,
    grid,
    individual,
    isolation,
    large_at_small_cost,
    learning_to_exit,
    pcee_control,
    rates,
    render,
    sizes,
)
from experiments.options import cell, parser
from sweet_jax.config import Config, UserError
from sweet_jax.exits.analysis import analyse, curve_area
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.pipeline import run
from sweet_jax.training import loop, parallel
from sweet_jax.training.fit import fit

ROOT = Path(__file__).parent.parent
SCRIPTS = (
    *(individual, rates, curves, sizes, ablation, isolation, learning_to_exit),
    *(pcee_control, large_at_small_cost, render),
)


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
        assert replica["area"] == pytest.approx(curve_area(curve.cost[r], curve.score[r]), abs=1e-9)
    assert not list(out.parent.glob("work/*"))


def test_tables_say_what_the_records_say(finished, capsys):
    assert individual.run(finished) == 0
    text = (output(finished) / "tables" / "individual.md").read_text()
    record = json.loads((output(finished) / "cells" / "sst2-sweet.json").read_text())
    kept = [r for r in record["replicas"] if r["learning_rate"] == record["learning_rate"]]
    scores = np.asarray([[100 * e["score"] for e in r["individual"]] for r in kept])
    means, deviations = scores.mean(axis=0), scores.std(axis=0, ddof=1)
    stars = ["*" * any(d["exit"] == e for r in kept for d in r["diverged"]) for e in (1, 2)]
    cells = [f"{m:.1f} ± {s:.1f}{x}" for m, s, x in zip(means, deviations, stars, strict=True)]
    assert f"| sst2 | SWEET | {' | '.join(cells)} | 2 x 40 |" in text
    assert text in capsys.readouterr().out


def test_the_command_in_a_table_makes_it(finished, capsys):
    assert individual.run(finished) == 0
    made = re.search(r"Made by python -m experiments\.individual (.*?) \(", capsys.readouterr().out)
    assert made
    data = [option for option in finished if option.startswith("--data_dir=")]
    assert individual.run([*shlex.split(made[1]), *data, "--list"]) == 0
    assert "done  sst2-sweet" in capsys.readouterr().out


def test_an_output_has_a_workdir_of_its_own():
    seen: list[argparse.Namespace] = []
    for output in ("some/where", "some/where-else"):
        options = ["--render_only", f"--output={output}"]
        grid.main(None, lambda _: [], lambda options, _: seen.append(options), options)
    assert [str(o.workdir) for o in seen] == [
        *("runs/experiments/where", "runs/experiments/where-else")
    ]


def test_the_paper_s_numbers_stand_beside_those_of_any_model():
    options = parser(None).parse_args([])
    rows = individual.sections(options, {})[0].rows
    title = "paper, deberta-base, exits 1, 4, 6, 12, mean of 7 tasks"
    assert rows[1] == [title, "Early-Exit", "52.3", "70.9", "77.9", "81.7", "3"]
    options = parser(None).parse_args(["--model=deberta-large"])
    assert individual.sections(options, {})[0].rows[2][-2] == "82.7"
    options = parser(None).parse_args(["--exits=1,6"])  # other columns
    assert individual.sections(options, {})[0].rows == []


def test_gradients_of_another_encoder_have_a_folder_of_their_own():
    assert conflict.parse([]).output == "experiments/results/minilm-l6/conflict"
    other = conflict.parse(["--checkpoint=bert-base-uncased", "--exits=1,4,6,12"])
    assert other.output == "experiments/results/bert-base-uncased/conflict"


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
    assert sum(line.startswith("| sst2 | ") for line in text.splitlines()) == rows
    assert "Not done yet" not in text


def test_render_makes_one_page_of_all_that_is_done(finished):
    assert render.run(finished) == 0
    page = (output(finished) / "index.html").read_text()
    for title in ("Each exit alone", "Speed-accuracy curves", "Differences between methods at the"):
        assert title in page
    made = "Made by python -m experiments.individual --model=minilm-l6 --tasks=sst2 "
    assert made in page
    assert "(63 training rows without those held out; learning rates 0.001, 0.003;" in page
    assert "--sizes" not in page  # which individual has not
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "![" in (output(finished) / "README.md").read_text()


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s is not large_at_small_cost])
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


def test_control_of_accuracy_from_what_is_done(finished):
    assert pcee_control.run([*finished, "--splits=4", "--render_only"]) == 0
    text = (output(finished) / "tables" / "pcee_control.md").read_text()
    assert "Is the dial an accuracy?" in text
    for method in ("Multi-Model", "Early-Exit", "SWEET"):
        assert text.count(f"| sst2 | {method} | 2% |") == 1
        assert f"| {method}: error |" in text
    assert text.count("| sst2 | PCEE, isotonic |") == 1
    assert (output(finished) / "figures" / "pcee_control.png").exists()
    assert render.run(finished) == 0  # takes it over, without its minutes
    assert "Is the dial an accuracy?" in (output(finished) / "index.html").read_text()


def test_a_deep_model_against_shallow_ones(finished):
    assert large_at_small_cost.run([*finished, "--render_only"]) == 0
    text = (output(finished) / "tables" / "large_at_small_cost.md").read_text()
    for line in ("| sst2 | SWEET | layers |", "| sst2 | Early-Exit | clock |"):
        assert line in text
    assert "| full model of that depth |" in text


def test_replicas_of_a_cell_equal_their_solo_runs(finished, arguments, tmp_path):
    parsed = parser(None).parse_args(arguments)
    one = cell(parsed, "sst2", "sweet")
    saved = ExitOutputs.load(output(finished) / "outputs" / "sst2-sweet" / "validation.npz")
    solo = Config(**{**vars(one.config), "seeds": (1,), "learning_rates": (3e-3,)})
    run(solo, tmp_path / "solo")
    alone = ExitOutputs.load(tmp_path / "solo" / "exit_outputs" / "validation.npz")
    np.testing.assert_allclose(saved.logits[3], alone.logits[0], atol=1e-5)
    # The same rows under another path are the same run; other rows are not.
    moved = tmp_path / "moved"
    shutil.copytree(solo.data_dir, moved)
    run(Config(**{**vars(solo), "data_dir": str(moved)}), tmp_path / "solo")
    path = moved / "sst2" / "train.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(UserError, match=r"belongs to another.*data_sha256"):
        run(Config(**{**vars(solo), "data_dir": str(moved)}), tmp_path / "solo")


@pytest.mark.slow
def test_five_rates_by_three_seeds_are_one_program_and_each_its_solo_run(
    arguments, tmp_path, monkeypatch
):
    """With dropout, whose masks each replica must draw as it would alone."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=2, dropout=0.1)
    rates, seeds = (3e-4, 1e-3, 2e-3, 3e-3, 5e-3), (0, 1, 2)
    full = [
        *without(arguments, "--learning_rates", "--seeds", "--checkpoint"),
        *(f"--learning_rates={','.join(map(str, rates))}", "--seeds=0,1,2", "--methods=sweet"),
        f"--checkpoint={checkpoint}",
        *(f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"),
    ]
    fitted, programs = [], []
    compile_step = parallel.compile_step

    def compiled(settings, replicas, mesh):
        programs.append(replicas)
        return compile_step(settings, replicas, mesh)

    monkeypatch.setattr(parallel, "compile_step", compiled)

    def watched(job):
        fitted.append(len(job.rows))
        return fit(job)

    monkeypatch.setattr("sweet_jax.pipeline.fit", watched)
    assert individual.run(full) == 0
    assert fitted == programs == [15]
    saved = ExitOutputs.load(tmp_path / "out" / "outputs" / "sst2-sweet" / "validation.npz")
    one = cell(parser(None).parse_args(full), "sst2", "sweet")
    for r, (seed, rate) in enumerate(itertools.product(seeds, rates)):
        assert saved.identity.replicas[r] == (seed, rate)
        solo = Config(**{**vars(one.config), "seeds": (seed,), "learning_rates": (rate,)})
        run(solo, tmp_path / f"solo{r}", report=False)
        alone = ExitOutputs.load(tmp_path / f"solo{r}" / "exit_outputs" / "validation.npz")
        np.testing.assert_allclose(saved.logits[r], alone.logits[0], atol=1e-5)
    assert fitted == [15] + [1] * 15


@pytest.mark.slow
def test_killed_in_the_middle_it_finishes_with_the_same_numbers(
    finished, arguments, tmp_path, monkeypatch
):
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
    starts = []
    original = loop.run_steps

    def watched(plan, state, batch, step_log, *rest):
        starts.append(step_log.steps.start)
        return original(plan, state, batch, step_log, *rest)

    monkeypatch.setattr("sweet_jax.training.fit.run_steps", watched)
    assert individual.run(full) == 0
    assert len(starts) == 2
    assert starts[0] >= 2  # the one that was killed did not begin again
    for name in ("sst2-sweet", "sst2-early_exit"):
        ours, theirs = (
            ExitOutputs.load(folder / "outputs" / name / "validation.npz").logits
            for folder in (tmp_path / "out", output(finished))
        )
        np.testing.assert_array_equal(ours, theirs)


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
    assert individual.run(full) == 1  # it is not tried again, and said so
    assert "rte-sweet failed before: UserError: " in capsys.readouterr().err


def test_a_cell_whose_results_cannot_be_kept_has_failed(arguments, tmp_path, monkeypatch, capsys):
    full = [
        *without(arguments, "--learning_rates", "--seeds"),
        *("--methods=sweet", "--learning_rates=3e-3", "--seeds=0"),
        *(f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"),
    ]

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(cells.shutil, "copy", full_disk)
    assert individual.run(full) == 1
    states = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert states["sst2-sweet"] == {"state": "failed", "error": "OSError: No space left on device"}
    monkeypatch.setattr(cells.shutil, "copy", shutil.copy2)
    assert individual.run([*full, "--retry"]) == 0


@pytest.fixture
def two_tasks(finished, arguments, tmp_path) -> list[str]:
    """Options of sst2 alone, in an output where SWEET's cell of mrpc is done too."""
    shutil.copytree(output(finished), tmp_path / "out")
    other = cell(parser(None).parse_args(arguments), "mrpc", "sweet")
    record = json.loads((tmp_path / "out" / "cells" / "sst2-sweet.json").read_text())
    record |= {"config": cells.identity(other.config), "task": "mrpc"}
    (tmp_path / "out" / "cells" / "mrpc-sweet.json").write_text(json.dumps(record))
    return [*arguments, f"--output={tmp_path / 'out'}", "--render_only"]


def test_a_task_run_alone_leaves_the_others_in_the_table(two_tasks, monkeypatch, capsys):
    out = output(two_tasks)
    monkeypatch.chdir(out.parent)
    assert individual.run(two_tasks) == 0
    text = (out / "tables" / "individual.md").read_text()
    for row in ("| sst2 | SWEET |", "| sst2 | Early-Exit |", "| mrpc | SWEET |"):
        assert text.count(row) == 1
    missing = re.search(r"Not done yet: (.*?)\.", text)
    assert missing
    assert set(missing[1].split(", ")) == {"mrpc-early_exit", "mrpc-multi_model"}
    assert " --tasks=sst2,mrpc " in text
    assert " --output=out (" in text  # as seen from here, not from the root
    capsys.readouterr()
    (out / "cells" / "sst2-sweet.json").unlink()  # though the manifest says that it is done
    assert individual.run([*two_tasks, "--list"]) == 0
    assert "missing  sst2-sweet" in capsys.readouterr().out


def test_cells_of_other_rows_do_not_stand_in_one_table(two_tasks, capsys):
    path = output(two_tasks) / "cells" / "sst2-sweet.json"
    record = json.loads(path.read_text())
    assert len(record["data_sha256"]) == 64
    path.write_text(json.dumps(record | {"data_sha256": "0" * 64}))
    assert individual.run(two_tasks) == 2
    error = capsys.readouterr().err
    assert "was made with other rows of sst2 than" in error
    assert error.count("\n") == 1


def test_a_setting_without_a_limit_can_be_kept():
    options = parser(None).parse_args(["--set", "clip_norm=Infinity"])
    one = cell(options, "sst2", "sweet")
    assert json.loads(json.dumps(cells.identity(one.config), allow_nan=False))["clip_norm"] == "inf"


def test_other_settings_in_the_same_output_are_refused(finished, capsys):
    assert individual.run([*finished, "--set", "epochs=2"]) == 2
    assert "was made with epochs 1" in capsys.readouterr().err


def test_a_key_that_an_old_record_lacks_had_its_default(finished, arguments, tmp_path, capsys):
    shutil.copytree(output(finished), tmp_path / "out")
    path = tmp_path / "out" / "cells" / "sst2-sweet.json"
    record = json.loads(path.read_text())
    assert record["config"].pop("attention_dropout") == ""
    path.write_text(json.dumps(record))
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


def documented() -> list[str]:
    """The commands of the grid that the docs and docstrings give for the model that is here."""
    texts = [(ROOT / "docs" / "reproduction.md").read_text(), *(s.__doc__ for s in SCRIPTS)]
    names = "|".join(s.__name__.rpartition(".")[2] for s in SCRIPTS)
    command = rf"python -m experiments\.(?:{names}) [^`#\n]*--model=minilm-l6[^`#\n]*"
    return sorted({x.strip() for text in texts for x in re.findall(command, text)})


@pytest.mark.parametrize("command", documented())
def test_documented_commands_find_the_results_that_are_here(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    script, *options = command.split()[2:]
    assert importlib.import_module(script).run([*options, "--list"]) == 0
    assert "done  sst2-sweet" in capsys.readouterr().out


def test_every_script_documents_its_command():
    named = {command.split()[2].rpartition(".")[2] for command in documented()}
    assert named == {s.__name__.rpartition(".")[2] for s in SCRIPTS}


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
        (["--nope"], "unrecognized arguments: --nope"),
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


@pytest.mark.parametrize("script", [*SCRIPTS, conflict, grid])
def test_help_says_what_is_reproduced_for_what_and_what_to_expect(script, capsys):
    main = script.run if hasattr(script, "run") else script.main
    with pytest.raises(SystemExit) as stop:
        main(*([script.__doc__, None, None] if script is grid else []), ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert script.__doc__.splitlines()[0] in text
    assert script is grid or ("Cost: " in " ".join(text.split()) and "Expected" in text)
