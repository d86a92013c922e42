"""Full disks, what killed runs leave behind, and the script that kills runs."""

import contextlib
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
from sweet_jax.inference.audit_log import AuditLog
from sweet_jax.inference.prediction_file import OutputFile
from sweet_jax.main import main
from sweet_jax.run_directory import claim_run_directory
from sweet_jax.storage_errors import storage_failure


def chained(first: BaseException, second: BaseException) -> BaseException:
    """Returns the second of two errors, as raised while the first was handled."""
    second.__context__ = first
    return second


@pytest.mark.parametrize(
    ("error", "description"),
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
def test_storage_failure_describes_full_or_read_only_disk(error, description):
    assert description in storage_failure(error)
    assert description in storage_failure(chained(error, KeyError("on the way out")))


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "x"), ValueError("loss error 28"), KeyError("a")]
)
def test_storage_failure_is_none_for_other_errors(error):
    assert storage_failure(error) is None


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.ENOSPC, "", "a"), 1, "cannot be written (No space left on device, 'a')"),
        (PermissionError(errno.EACCES, "", "b"), 2, "or written (Permission denied, 'b')"),
        (RuntimeError("Permission denied (os error 13)"), 2, "written (Permission denied)"),
        (UserError("no"), 2, "error: no\n"),
        (KeyboardInterrupt(), 1, "interrupted; again\n"),
        (chained(KeyboardInterrupt(), ImportError("initialization failed")), 1, "interrupted; a"),
    ],
)  # fmt: skip
def test_command_reports_user_and_system_errors_in_one_line(error, status, message, capsys):
    def fail():
        raise error

    assert run_command(fail, "again") == status
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1
    with pytest.raises(KeyError):
        run_command(lambda: {}["a bug"])


def test_run_on_full_disk_fails_in_one_line_and_leaves_only_lock(options, tmp_path, capsys):
    """A limit of 0 bytes for files acts like a full disk."""
    config = tmp_path / "recipe.py"
    config.write_text(f"def get_config():\n    return {options!r}\n")
    arguments = ["main", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        status = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    errors = capsys.readouterr().err.strip().splitlines()
    assert status == 1
    assert len(errors) == 1
    assert "files cannot be written (File too large" in errors[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_partial_files_of_killed_run_are_removed(tmp_path):
    for name in ("figures/.curve.123.part.png", ".results.123.part.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    write_json(tmp_path / "config.json", {"task": "a"})
    (tmp_path / "figures" / "curve.png").write_text("whole")
    with claim_run_directory(tmp_path, {"task": "a"}, (), dict):
        pass
    remaining = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert remaining == {".lock", "config.json", "curve.png"}


def test_workdir_with_config_json_of_a_model_is_refused(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    message = r"is not the config of a run \(it has no data_sha256\): choose another workdir"
    claim = claim_run_directory(
        tmp_path, {"task": "a", "data_sha256": "b"}, (), lambda values: {"task": "sst2"} | values
    )
    with pytest.raises(UserError, match=message), claim:
        pass


@pytest.mark.parametrize("kill_step", [1, 2, 3])
def test_replaced_directory_is_complete_after_kill_at_any_step(tmp_path, monkeypatch, kill_step):
    """Killed before the first rename, the second, or before the old directory is removed."""
    for name in ("model", ".model.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    steps = []

    def killed_at_step(step):
        def run_step(*arguments, **options):
            steps.append(step)
            if len(steps) == kill_step:
                raise KeyboardInterrupt
            return step(*arguments, **options)

        return run_step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_at_step(Path.rename))
        patch.setattr(shutil, "rmtree", killed_at_step(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            replace_directory(tmp_path / ".model.part", tmp_path / "model")
    write_json(tmp_path / "config.json", {})
    with claim_run_directory(tmp_path, {}, (), dict):
        pass
    expected = "model" if kill_step < 3 else ".model.part"
    assert (tmp_path / "model" / "weights").read_text() == expected
    assert not list(tmp_path.glob("*.replaced"))


def test_copy_additions_keeps_added_files_only_beside_equal_files(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, version in ((old, "1"), (new, "2")):
        (folder / "depth_01").mkdir(parents=True)
        for directory in (folder, folder / "depth_01"):
            (directory / "weights").write_text("same")
        (folder / "about").write_text(version)
    (old / "depth_01" / "times").write_text("measured")
    copy_additions(old, new, ignored=("about",))
    assert (new / "about").read_text() == "2"
    assert (new / "depth_01" / "times").read_text() == "measured"
    (old / "more").write_text("of other weights")
    (new / "weights").write_text("else")
    copy_additions(old, new, ignored=("about",))
    assert not (new / "more").exists()


def test_directory_is_written_completely_or_not_at_all(tmp_path):
    def write(text: str) -> None:
        with whole_directory(tmp_path / "new") as partial:
            (partial / "part").write_text(text)
            assert text == "whole"

    with pytest.raises(AssertionError):
        write("half")
    assert not list(tmp_path.iterdir())
    write("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    with pytest.raises(UserError, match="exists: choose another"):
        write("whole")


def test_directory_in_use_by_another_run_is_refused_and_unchanged(tmp_path):
    """The lock also excludes a second opening by the process that holds it."""
    output = tmp_path / "new"
    with whole_directory(output) as partial:
        (partial / "part").write_text("first")
        message = "new' is in use by another run: wait for it, or choose another"
        with pytest.raises(UserError, match=message), whole_directory(output):
            pass
        assert (partial / "part").read_text() == "first"
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["new", "new/part"]


def test_partial_directory_of_killed_process_is_removed(tmp_path):
    (tmp_path / ".new.part" / "new").mkdir(parents=True)
    (tmp_path / ".new.part" / "new" / "half").write_text("of the killed")
    (tmp_path / ".new.part" / ".lock").touch()
    with whole_directory(tmp_path / "new") as partial:
        (partial / "part").touch()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["new", "new/part"]


def test_directory_created_meanwhile_is_not_replaced(tmp_path):
    writing = whole_directory(tmp_path / "new")
    with pytest.raises(UserError, match="exists: choose another"), writing:
        (tmp_path / "new").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_copies_of_read_only_files_are_writable(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "within").mkdir(parents=True)
    new.mkdir()
    for directory in (old, old / "within"):
        for name in ("file", "left out"):
            (directory / name).write_text(name)
            (directory / name).chmod(0o444)
        directory.chmod(0o555)
    copy_files(old, new, ["left out"])
    copied = {str(path.relative_to(new)) for path in new.rglob("*")}
    assert copied == {"file", "within", "within/file"}
    assert all(path.stat().st_mode & 0o200 for path in new.rglob("*"))


def test_file_is_synced_before_renaming(tmp_path, monkeypatch):
    """Otherwise a disk error would leave an empty config.json, which no command accepts."""
    path, calls = tmp_path / "config.json", []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        calls.append(("synced", os.fstat(descriptor).st_size, path.exists()))
        fsync(descriptor)

    def record_rename(source, target) -> None:
        calls.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    write_json(path, {"task": "a"})
    assert calls == [("synced", path.stat().st_size, False), "renamed"]


def test_differing_bits_are_counted_except_in_times(tmp_path):
    for name, value, seconds in (("first", 0, 1.5), ("second", 5, 2.5)):
        run = tmp_path / name
        run.mkdir()
        np.savez(run / "probe.npz", kernel=np.zeros(3, np.int8), bias=np.int8([1, value]))
        write_json(run / "results.json", {"score": 0.5, "timing": {"train_seconds": seconds}})
    (tmp_path / "first" / "metrics.jsonl").write_text("ab")
    bits, names = differing_bits(tmp_path / "first", tmp_path / "second")
    assert names == ["metrics.jsonl: 16", "probe.npz/bias: 2"]
    assert count_bits(names) == 18
    assert bits == 8 * (2 + 3 + 2 + len(json.dumps({"score": 0.5})))
    assert differing_bits(tmp_path / "first", tmp_path / "first") == (bits, [])


def test_watch_reads_phase_from_files_of_this_attempt(tmp_path):
    run, errors = tmp_path / "run", tmp_path / "0.err"
    errors.write_text("")
    checkpoints = run / "checkpoints" / "exits_1_2_3"
    for name in ("config.json", "exit_outputs/validation.npz", "results.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("of an older attempt")
        os.utime(run / name, (1, 1))
    os.utime(run / "exit_outputs", (1, 1))
    phases = []

    def step(name: str, text: str = "") -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
        phases.append(watch.phase())

    watch = Watch(run, time.time() - 1, errors, last_step=20, total=160)
    phases.append(watch.phase())
    step("config.json")
    step("probe.npz")
    step("rate_search.json")
    errors.write_text(
        "training, exits 1, 2, 3:   0%|   | 0/160 [00:00<?]\r"
        "training, exits 1, 2, 3:   5%|   | 8/160 [00:01]"
    )
    phases.append(watch.phase())
    (checkpoints / "20.orbax-checkpoint-tmp-1").mkdir(parents=True)
    phases.append(watch.phase())
    (checkpoints / "20.orbax-checkpoint-tmp-1").rename(checkpoints / "20")
    phases.append(watch.phase())
    step("checkpoints/exits_1_2_3/20.digest.json")
    step("refit/exits_1_2_3.npz")
    step("exit_outputs/calibration.npz")
    step("results.json")
    assert phases == [
        *("start-up", "probe", "rate search", "compile", "training", "checkpoint", "checkpoint"),
        *("refit", "evaluation", "report", "ended"),
    ]


def test_kill_plans_prefer_phases_with_fewest_kills():
    undisturbed = reference.Reference(10.0, {"probe": (2.0, 5.0), "report": (1.0, 9.0)}, 20, 160)
    rng, kills_by_phase = random.Random(0), Counter({"probe": 3, "report": 0})
    phases = ["probe", "report"]
    chosen = [plans.plan_kill(rng, kills_by_phase, undisturbed, phases) for _ in range(50)]
    aimed = Counter(plan.phase for plan in chosen)
    assert aimed["report"] > aimed["probe"] > 0  # other kills may come at any time
    assert all(plan.delay <= {"report": 1.0, "probe": 2.0}[plan.phase] for plan in chosen)


def test_missed_kill_is_planned_again_among_phases_ahead(tmp_path):
    (tmp_path / "run" / "exit_outputs").mkdir(parents=True)
    write_json(tmp_path / "run" / "config.json", {})
    watch = Watch(tmp_path / "run", time.time() - 1, tmp_path / "0.err")
    requests = []

    def choose(ahead: list[str]) -> plans.Plan:
        requests.append(list(ahead))
        return plans.Plan(ahead[0], 0.0)

    assert plans.wait_for_plan(choose, ["probe", "training", "report"], watch, lambda: True) == (
        plans.Plan("report", 0.0)
    )
    assert requests == [["probe", "training", "report"], ["report"]]
    assert plans.wait_for_plan(choose, ["probe"], watch, lambda: True) is None
    assert plans.wait_for_plan(choose, ["report"], watch, lambda: False) is None


def test_work_of_cell_with_automatic_epochs_is_estimated():
    """The cells that are killed on Ray have automatic epochs."""
    config = Config(exits=(1, 2), train_size=400, epochs="auto", batch_size=16)
    assert Cell("sst2-sweet", config).work == pytest.approx(4.8 * 400 * 40 * 2, rel=0.01)


@pytest.mark.parametrize("error_type", [ValueError, jax.errors.JaxRuntimeError])
def test_lost_process_is_reported_in_one_line_for_each_jax_error(error_type, monkeypatch, capsys):
    """JAX raises a ValueError if a compiled computation fails while it is dispatched."""
    exit_codes = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", exit_codes.append)
    with distributed.abort_together():
        raise error_type("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    with distributed.abort_together():
        raise ValueError("a mistake of this process")
    lines = capsys.readouterr().err.splitlines()
    assert exit_codes == [1, 1]
    assert lines[0].startswith("process 0 of 2: another process is gone (UNKNOWN: Gloo AllGather")
    assert lines[1] == "Traceback (most recent call last):"


def test_input_error_ends_single_process_and_shared_error_is_raised(monkeypatch, capsys):
    """The process must not wait for the others, which would wait for it in the next step."""
    exit_codes = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(os, "_exit", exit_codes.append)
    with distributed.abort_together():
        raise UserError("it is wrong: change it")
    with distributed.abort_together():
        raise ValueError("not written") from PermissionError(errno.EACCES, "", "/run/a.npz")
    lines = capsys.readouterr().err.splitlines()
    assert exit_codes == [2, 2]
    assert lines[0] == "error: it is wrong: change it"
    assert lines[1].startswith("process 1 of 2: a file cannot be read or written (Permission den")
    monkeypatch.setattr(distributed, "all_gather", lambda own: [b"it is wrong", own])
    shared = pytest.raises(distributed.SharedUserError, match="process 0: it is wrong")
    with shared, distributed.abort_together(), distributed.raise_on_all():
        pass
    assert exit_codes == [2, 2]


def test_workdir_without_write_permission_is_refused(tmp_path, monkeypatch):
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())

    def deny(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("sweet_jax.directories.tempfile.TemporaryFile", deny)
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
def test_faults_script_refuses_unsupported_test_or_mode_in_one_line(arguments, message, capsys):
    assert run_command(lambda: faults.main(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_summary_keeps_counts_of_modes_that_were_not_rerun(tmp_path):
    record = {"mode": "two", "round": 0, "cold": False, "bits": 7, "differing": 0, "left": []}
    record["kills"] = [{"phase": "probe", "victims": [0]}]
    first, second, output = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    for folder, records in ((first, [record]), (second, [record | {"mode": "four"}] * 2)):
        folder.mkdir()
        (folder / "any.0.jsonl").write_text("\n".join(map(json.dumps, records)))
        summary.report(folder, output)
    counts = json.loads((output / "kills.json").read_text())
    kills_by_mode = {mode: row["kills"] for mode, row in counts["modes"].items()}
    assert kills_by_mode == {"two": 1, "four": 2}
    assert counts["total"] == {"kills": 3, "runs": 3, "bits_compared": 21, "differing_bits": 0}


@pytest.mark.nightly
def test_killed_run_resumes_without_differing_bits_and_is_counted(tmp_path):
    """The run has fewer steps than those of the script."""
    changes = {"head_init": "random", "head_refit": False, "rate_search": "full", "epochs": 1}
    changes |= {"learning_rates": (1e-3,), "baselines": "none", "checkpoint_every": 4}
    config = write_inputs(tmp_path / "inputs", **changes)
    undisturbed, cache = tmp_path / "single" / "whole", tmp_path / "single" / "cache"
    launch.run_to_end(launch.Setup(config, cache), undisturbed)
    assert not (undisturbed / "probe.npz").exists()
    timing = {"seconds": 4.0, "phases": {}, "last_step": 12, "total": 96}
    write_json(tmp_path / "reference.json", timing)
    setup, run = launch.Setup(config, cache), tmp_path / "run"
    with launch.started(setup, run) as attempt:
        watch = Watch(run, attempt.start, attempt.errors[0], 12, 96)
        plan = plans.Plan("probe", 0.0)  # no probe: this phase lasts until the outputs
        assert plans.wait_for_moment(plan, watch, attempt.is_whole)
        killed = kills.kill_processes(
            random.Random(0), plan, watch, attempt, reference.MODES["single"].signal
        )
    assert killed == {"phase": "probe", "victims": [0], "aimed": "probe"}
    launch.run_to_end(setup, run)
    bits, names = differing_bits(undisturbed, run)
    assert names == []
    assert bits > 100_000
    record = {"mode": "single", "round": 0, "cold": False, "kills": [killed]}
    record |= {"bits": bits, "differing": 0, "names": [], "left": []}
    (tmp_path / "single.0.jsonl").write_text(json.dumps(record) + "\n")
    summary.report(tmp_path, tmp_path / "out")
    counts = json.loads((tmp_path / "out" / "kills.json").read_text())
    assert counts["total"] == {"kills": 1, "runs": 1, "bits_compared": bits, "differing_bits": 0}


@pytest.mark.parametrize(
    "lock",
    [
        lambda folder: lock_directory(folder / "run"),
        lambda folder: whole_directory(folder / "copy"),
        lambda folder: OutputFile(folder / "rows.csv").open([]),
        lambda folder: contextlib.closing(AuditLog(str(folder / "audit.jsonl"), {}, 1000)),
    ],
    ids=["run", "export", "predict", "audit"],
)
def test_command_is_refused_without_files_when_system_has_no_locks(tmp_path, monkeypatch, lock):
    """As on Windows, where the package can still be imported and models opened."""
    monkeypatch.setattr(file_lock, "fcntl", None)
    refusal = r"^this command locks files, which needs Linux or macOS"
    with pytest.raises(UserError, match=refusal), lock(tmp_path):
        pass
    assert not [*tmp_path.iterdir()]
