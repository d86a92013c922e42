"""Disks that take no more writes, what killed runs leave, and the script that kills runs."""

import errno
import json
import os
import random
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.cells import Cell
from experiments.faults import __main__ as faults
from experiments.faults import kills, launch, plans, reference, summary
from experiments.faults.compare import count_bits, differing_bits
from experiments.faults.inputs import write_inputs
from experiments.faults.phases import Watch
from sweet_jax import distributed, file_lock
from sweet_jax.arguments import run_command
from sweet_jax.config import Config
from sweet_jax.directories import (
    check_writable,
    copy_additions,
    copy_files,
    lock_directory,
    replace_directory,
    whole_directory,
)
from sweet_jax.errors import UserError
from sweet_jax.files import write_json
from sweet_jax.main import main
from sweet_jax.run_directory import claim_run_directory
from sweet_jax.storage_errors import storage_failure


def during(first: BaseException, second: BaseException) -> BaseException:
    """The second of two errors, raised in the handling of the first."""
    second.__context__ = first
    return second


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "", "/run/a.npz"), "(No space left on device, '/run/a.npz')"),
        (OSError(errno.EROFS, ""), "(Read-only file system)"),
        (
            ValueError("Error writing local file \"/a/b\": no space [os_error_code='28']"),
            "(No space left on device, '/a/b')",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "(No space left on dev"),
    ],
)
def test_a_disk_that_takes_no_more_is_said_in_a_sentence(error, said):
    assert said in storage_failure(error)
    assert said in storage_failure(during(error, KeyError("on the way out")))


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "x"), ValueError("loss error 28"), KeyError("a")]
)
def test_other_errors_are_not_taken_for_the_disk_s(error):
    assert storage_failure(error) is None


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OSError(errno.ENOSPC, "", "a"), 1, "cannot be written (No space left on device, 'a')"),
        (PermissionError(errno.EACCES, "", "b"), 2, "or written (Permission denied, 'b')"),
        (RuntimeError("Permission denied (os error 13)"), 2, "written (Permission denied)"),
        (UserError("no"), 2, "error: no\n"),
        (KeyboardInterrupt(), 1, "interrupted; again\n"),
        (during(KeyboardInterrupt(), ImportError("initialization failed")), 1, "interrupted; a"),
    ],
)  # fmt: skip
def test_what_the_system_refuses_a_command_is_one_line(error, status, line, capsys):
    def fails():
        raise error

    assert run_command(fails, "again") == status
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.count("\n") == 1
    with pytest.raises(KeyError):
        run_command(lambda: {}["of ours"])


def test_a_disk_without_space_is_one_line_and_the_command_works_later(options, tmp_path, capsys):
    """Files may have no byte here, as on a disk that is full."""
    config = tmp_path / "recipe.py"
    config.write_text(f"def get_config():\n    return {options!r}\n")
    line = ["main", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        status = main(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    errors = capsys.readouterr().err.strip().splitlines()
    assert status == 1
    assert len(errors) == 1
    assert "files cannot be written (File too large" in errors[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_parts_of_files_that_a_killed_run_left_are_removed(tmp_path):
    for name in ("figures/.curve.123.part.png", ".results.123.part.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    write_json(tmp_path / "config.json", {"task": "a"})
    (tmp_path / "figures" / "curve.png").write_text("whole")
    with claim_run_directory(tmp_path, {"task": "a"}, (), {}):
        pass
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".lock", "config.json", "curve.png"}


def test_another_config_json_is_not_taken_for_a_run_s(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    words = r"is not the config of a run \(it has no data_sha256\): choose another workdir"
    claim = claim_run_directory(tmp_path, {"task": "a", "data_sha256": "b"}, (), {"task": "sst2"})
    with pytest.raises(UserError, match=words), claim:
        pass


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_directory_is_replaced_whole_whenever_the_process_is_killed(
    tmp_path, monkeypatch, killed_at
):
    """Killed before the first rename, the second, or before the old directory is removed."""
    for name in ("model", ".model.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    steps = []

    def until_killed(step):
        def do(*arguments, **options):
            steps.append(step)
            if len(steps) == killed_at:
                raise KeyboardInterrupt
            return step(*arguments, **options)

        return do

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", until_killed(Path.rename))
        patch.setattr(shutil, "rmtree", until_killed(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            replace_directory(tmp_path / ".model.part", tmp_path / "model")
    write_json(tmp_path / "config.json", {})
    with claim_run_directory(tmp_path, {}, (), {}):
        pass
    wanted = "model" if killed_at < 3 else ".model.part"
    assert (tmp_path / "model" / "weights").read_text() == wanted
    assert not list(tmp_path.glob("*.replaced"))


def test_what_was_added_to_a_directory_is_kept_beside_the_same_files(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, about in ((old, "1"), (new, "2")):
        (folder / "depth_01").mkdir(parents=True)
        for place in (folder, folder / "depth_01"):
            (place / "weights").write_text("same")
        (folder / "about").write_text(about)
    (old / "depth_01" / "times").write_text("mine")
    copy_additions(old, new, ignored=("about",))
    assert (new / "about").read_text() == "2"
    assert (new / "depth_01" / "times").read_text() == "mine"
    (old / "more").write_text("of other weights")
    (new / "weights").write_text("else")
    copy_additions(old, new, ignored=("about",))
    assert not (new / "more").exists()


def test_a_directory_is_written_whole_or_not_at_all(tmp_path):
    def write(text: str) -> None:
        with whole_directory(tmp_path / "new") as aside:
            (aside / "part").write_text(text)
            assert text == "whole"

    with pytest.raises(AssertionError):
        write("half")
    assert not list(tmp_path.iterdir())
    write("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    with pytest.raises(UserError, match="exists: choose another"):
        write("whole")


def test_a_directory_that_another_process_writes_is_refused_and_left_alone(tmp_path):
    """A lock of this process, too, excludes a second opening of the file."""
    output = tmp_path / "new"
    with whole_directory(output) as first:
        (first / "part").write_text("first")
        words = "new' is in use by another run: wait for it, or choose another"
        with pytest.raises(UserError, match=words), whole_directory(output):
            pass
        assert (first / "part").read_text() == "first"
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["new", "new/part"]


def test_what_a_killed_process_left_of_a_directory_is_removed(tmp_path):
    (tmp_path / ".new.part" / "new").mkdir(parents=True)
    (tmp_path / ".new.part" / "new" / "half").write_text("of the killed")
    (tmp_path / ".new.part" / ".lock").touch()
    with whole_directory(tmp_path / "new") as aside:
        (aside / "part").touch()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["new", "new/part"]


def test_a_directory_that_is_made_meanwhile_is_not_replaced(tmp_path):
    made = whole_directory(tmp_path / "new")
    with pytest.raises(UserError, match="exists: choose another"), made:
        (tmp_path / "new").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_copies_of_what_is_read_only_can_be_written_to(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "within").mkdir(parents=True)
    new.mkdir()
    for place in (old, old / "within"):
        for name in ("file", "left out"):
            (place / name).write_text(name)
            (place / name).chmod(0o444)
        place.chmod(0o555)
    copy_files(old, new, ["left out"])
    found = {str(path.relative_to(new)) for path in new.rglob("*")}
    assert found == {"file", "within", "within/file"}
    assert all(path.stat().st_mode & 0o200 for path in new.rglob("*"))


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    """Otherwise an error of the disk leaves an empty config.json, which no command accepts."""
    path, order = tmp_path / "config.json", []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        order.append(("synced", os.fstat(descriptor).st_size, path.exists()))
        fsync(descriptor)

    def renamed(one, other) -> None:
        order.append("renamed")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_json(path, {"task": "a"})
    assert order == [("synced", path.stat().st_size, False), "renamed"]


def test_bits_that_differ_are_counted_and_times_are_not(tmp_path):
    for name, value, seconds in (("one", 0, 1.5), ("other", 5, 2.5)):
        run = tmp_path / name
        run.mkdir()
        np.savez(run / "probe.npz", kernel=np.zeros(3, np.int8), bias=np.int8([1, value]))
        write_json(run / "results.json", {"score": 0.5, "timing": {"train_seconds": seconds}})
    (tmp_path / "one" / "metrics.jsonl").write_text("ab")
    bits, names = differing_bits(tmp_path / "one", tmp_path / "other")
    assert names == ["metrics.jsonl: 16", "probe.npz/bias: 2"]
    assert count_bits(names) == 18
    assert bits == 8 * (2 + 3 + 2 + len(json.dumps({"score": 0.5})))
    assert differing_bits(tmp_path / "one", tmp_path / "one") == (bits, [])


def test_phases_are_told_by_the_files_of_this_attempt(tmp_path):
    run, errors = tmp_path / "run", tmp_path / "0.err"
    errors.write_text("")
    trained = run / "checkpoints" / "exits_1_2_3"
    for name in ("config.json", "exit_outputs/validation.npz", "results.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("of an older attempt")
        os.utime(run / name, (1, 1))
    os.utime(run / "exit_outputs", (1, 1))
    seen = []

    def step(name: str, text: str = "") -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
        seen.append(watch.phase())

    watch = Watch(run, time.time() - 1, errors, last_step=20, total=160)
    seen.append(watch.phase())
    step("config.json")
    step("probe.npz")
    step("rate_search.json")
    errors.write_text(
        "training, exits 1, 2, 3:   0%|   | 0/160 [00:00<?]\r"
        "training, exits 1, 2, 3:   5%|   | 8/160 [00:01]"
    )
    seen.append(watch.phase())
    (trained / "20.orbax-checkpoint-tmp-1").mkdir(parents=True)
    seen.append(watch.phase())
    (trained / "20.orbax-checkpoint-tmp-1").rename(trained / "20")
    seen.append(watch.phase())
    step("checkpoints/exits_1_2_3/20.digest.json")
    step("refit/exits_1_2_3.npz")
    step("exit_outputs/calibration.npz")
    step("results.json")
    assert seen == [
        *("start-up", "probe", "rate search", "compile", "training", "checkpoint", "checkpoint"),
        *("refit", "evaluation", "report", "ended"),
    ]


def test_plans_prefer_the_phases_that_were_hit_least():
    known = reference.Reference(10.0, {"probe": (2.0, 5.0), "report": (1.0, 9.0)}, 20, 160)
    rng, hit = random.Random(0), Counter({"probe": 3, "report": 0})
    chosen = [plans.plan_kill(rng, hit, known, ["probe", "report"]) for _ in range(50)]
    aimed = Counter(plan.phase for plan in chosen)
    assert aimed["report"] > aimed["probe"] > 0  # the rest: at any time of the run
    assert all(plan.delay <= {"report": 1.0, "probe": 2.0}[plan.phase] for plan in chosen)


def test_a_moment_that_was_missed_is_chosen_anew_of_the_phases_ahead(tmp_path):
    (tmp_path / "run" / "exit_outputs").mkdir(parents=True)
    write_json(tmp_path / "run" / "config.json", {})
    watch = Watch(tmp_path / "run", time.time() - 1, tmp_path / "0.err")
    asked = []

    def choose(ahead: list[str]) -> plans.Plan:
        asked.append(list(ahead))
        return plans.Plan(ahead[0], 0.0)

    assert plans.wait_for_plan(choose, ["probe", "training", "report"], watch, lambda: True) == (
        plans.Plan("report", 0.0)
    )
    assert asked == [["probe", "training", "report"], ["report"]]
    assert plans.wait_for_plan(choose, ["probe"], watch, lambda: True) is None
    assert plans.wait_for_plan(choose, ["report"], watch, lambda: False) is None


def test_the_work_of_a_cell_that_ends_by_itself_is_estimated():
    """The grid of the kills on Ray has such cells."""
    config = Config(exits=(1, 2), train_size=400, epochs="auto", batch_size=16)
    assert Cell("sst2-sweet", config).work == pytest.approx(4.8 * 400 * 40 * 2, rel=0.01)


@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
def test_a_process_that_is_gone_is_said_in_a_line_whatever_jax_raises(kind, monkeypatch, capsys):
    """JAX raises a ValueError where a compiled computation fails as it is dispatched."""
    ended = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", ended.append)
    with distributed.abort_together():
        raise kind("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    with distributed.abort_together():
        raise ValueError("a mistake of this process")
    lines = capsys.readouterr().err.splitlines()
    assert ended == [1, 1]
    assert lines[0].startswith("process 0 of 2: another process is gone (UNKNOWN: Gloo AllGather")
    assert lines[1] == "Traceback (most recent call last):"


def test_wrong_input_of_one_process_ends_it_in_a_line_and_of_all_as_usual(monkeypatch, capsys):
    """Its exit must not wait for the others, which wait for it in the next step."""
    ended = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(os, "_exit", ended.append)
    with distributed.abort_together():
        raise UserError("it is wrong: change it")
    with distributed.abort_together():
        raise ValueError("not written") from PermissionError(errno.EACCES, "", "/run/a.npz")
    lines = capsys.readouterr().err.splitlines()
    assert ended == [2, 2]
    assert lines[0] == "error: it is wrong: change it"
    assert lines[1].startswith("process 1 of 2: a file cannot be read or written (Permission den")
    monkeypatch.setattr(distributed, "all_gather", lambda own: [b"it is wrong", own])
    shared = pytest.raises(distributed.SharedUserError, match="process 0: it is wrong")
    with shared, distributed.abort_together(), distributed.raise_on_all():
        pass
    assert ended == [2, 2]


def test_a_workdir_that_a_process_cannot_write_to_is_refused(tmp_path, monkeypatch):
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())

    def denied(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("sweet_jax.directories.tempfile.TemporaryFile", denied)
    with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\): give a dir"):
        check_writable(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stall"], "invalid choice: 'stall'"),
        (["stalls", "--mode=single"], "stalls needs several processes: --mode=single has one"),
        (["storage", "--mode=ray"], "storage has no --mode=ray: choose one of single, two"),
    ],
)
def test_tests_and_modes_that_do_not_fit_are_refused_in_a_line(arguments, message, capsys):
    assert run_command(lambda: faults.main(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_modes_that_were_not_run_again_keep_their_counts(tmp_path):
    record = {"mode": "two", "round": 0, "cold": False, "bits": 7, "differing": 0, "left": []}
    record["kills"] = [{"phase": "probe", "victims": [0]}]
    one, other, output = tmp_path / "one", tmp_path / "other", tmp_path / "out"
    for folder, records in ((one, [record]), (other, [record | {"mode": "four"}] * 2)):
        folder.mkdir()
        (folder / "any.0.jsonl").write_text("\n".join(map(json.dumps, records)))
        summary.report(folder, output)
    found = json.loads((output / "kills.json").read_text())
    assert {mode: each["kills"] for mode, each in found["modes"].items()} == {"two": 1, "four": 2}
    assert found["total"] == {"kills": 3, "runs": 3, "bits_compared": 21, "differing_bits": 0}


@pytest.mark.slow
def test_killed_runs_are_counted_and_have_no_differing_bit(tmp_path):
    """One run of few steps; the script's own undisturbed runs are longer."""
    changes = {"head_init": "random", "head_refit": False, "rate_search": "full", "epochs": 1}
    changes |= {"learning_rates": (1e-3,), "baselines": "none", "checkpoint_every": 4}
    config = write_inputs(tmp_path / "inputs", **changes)
    whole, cache = tmp_path / "single" / "whole", tmp_path / "single" / "cache"
    launch.run_to_end(launch.Setup(config, cache), whole)
    assert not (whole / "probe.npz").exists()
    known = {"seconds": 4.0, "phases": {}, "last_step": 12, "total": 96}
    write_json(tmp_path / "reference.json", known)
    setup, run = launch.Setup(config, cache), tmp_path / "run"
    with launch.started(setup, run) as attempt:
        watch = Watch(run, attempt.start, attempt.errors[0], 12, 96)
        plan = plans.Plan("probe", 0.0)  # there is no probe: from the claim to the outputs
        assert plans.wait_for_moment(plan, watch, attempt.is_whole)
        killed = kills.kill_processes(
            random.Random(0), plan, watch, attempt, reference.MODES["single"].signal
        )
    assert killed == {"phase": "probe", "victims": [0], "aimed": "probe"}
    launch.run_to_end(setup, run)
    bits, names = differing_bits(whole, run)
    assert names == []
    assert bits > 100_000
    record = {"mode": "single", "round": 0, "cold": False, "kills": [killed]}
    record |= {"bits": bits, "differing": 0, "names": [], "left": []}
    (tmp_path / "single.0.jsonl").write_text(json.dumps(record) + "\n")
    summary.report(tmp_path, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "kills.json").read_text())
    assert found["total"] == {"kills": 1, "runs": 1, "bits_compared": bits, "differing_bits": 0}


def test_where_the_operating_system_has_no_such_locks_a_run_is_refused(tmp_path, monkeypatch):
    """As on Windows, where the package is imported and models can be opened."""
    monkeypatch.setattr(file_lock, "fcntl", None)
    refusal = r"^this command locks files, which needs Linux or macOS"
    with pytest.raises(UserError, match=refusal), lock_directory(tmp_path / "run"):
        pass
