"""Two processes of two devices each: the same numbers as one, and no process left waiting."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import write_checkpoint

from sweet_jax import ExitOutputs, distributed, input_digest
from sweet_jax.config import Config, from_mapping
from sweet_jax.devices import check_devices
from sweet_jax.errors import UserError
from sweet_jax.input_digest import input_digests
from sweet_jax.main import main
from sweet_jax.preparation import prepare
from sweet_jax.training.parallel import check_layout

# Of the line of each rank, as Gloo writes them.
GLOO = (
    *("[Gloo] Rank ", " is connected to ", " peer ranks. "),
    "Expected number of connected peer ranks is : ",
)
SECONDS = 240  # until a process that should have ended counts as hanging


def recipe(folder: Path, options: dict, **changes) -> Path:
    path = folder / "recipe.py"
    values = options | {"learning_rates": (1e-4,), "checkpoint_every": 3} | changes
    path.write_text(f"def get_config():\n    return {values!r}\n")
    return path


def start(
    config: Path, workdir: Path, devices: int, *more: str, variables: dict[str, str] | None = None
) -> subprocess.Popen:
    command = [sys.executable, "-m", "sweet_jax.main", f"--config={config}"]
    command += [f"--workdir={workdir}", *more]
    return subprocess.Popen(
        command,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | (variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(
    config: Path,
    workdir: Path,
    *,
    second: tuple[Path, Path] | None = None,
    devices: tuple[int, int] = (2, 2),
) -> list[subprocess.Popen]:
    """Two processes; `second` is the config and the workdir of the second, if other ones."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    return [
        start(*place, devices[number], *both, f"--process_id={number}")
        for number, place in enumerate([(config, workdir), second or (config, workdir)])
    ]


def start_by_slurm(config: Path, workdir: Path) -> list[subprocess.Popen]:
    """Two processes with the variables that srun sets for its tasks."""
    with socket.socket() as free:
        while True:  # JAX takes the port from the number of the job
            job = random.randrange(4096)
            with contextlib.suppress(OSError):
                free.bind(("localhost", 65535 - 4095 + job))
                break
    step = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": 1}
    step |= {"SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2}
    tasks = [step | {"SLURM_PROCID": number, "SLURM_LOCALID": number} for number in range(2)]
    return [
        start(config, workdir, 2, variables={k: str(v) for k, v in task.items()}) for task in tasks
    ]


def ended(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each; none may hang."""
    try:
        found = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, found, strict=True)]


def at_checkpoint(
    workdir: Path, started: list[subprocess.Popen], after: int, training: str = "exits_1_2_3"
) -> None:
    """Waits for a checkpoint of step `after` or a later one."""
    deadline = time.monotonic() + SECONDS
    while not any(
        int(path.name.split(".")[0]) >= after
        for path in (workdir / "checkpoints" / training).glob("*.digest.json")
        if path.name[0].isdigit()
    ):
        assert all(process.poll() is None for process in started), ended(started)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same(ours: Path, theirs: Path) -> None:
    for split in ("calibration", "validation"):
        logits = [
            ExitOutputs.load(folder / "exit_outputs" / f"{split}.npz").logits
            for folder in (ours, theirs)
        ]
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (ours, theirs)]
    losses = [np.array([json.loads(line)["loss"] for line in each]) for each in lines]
    assert len(losses[0]) > 20
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tiny_run, made_once) -> Path:
    """The run of one process with one device."""

    def make(folder):
        status, _, errors = ended([start(recipe(folder, tiny_run), folder / "run", 1)])[0]
        assert status == 0, errors
        return folder / "run"

    return made_once("alone", make)


@pytest.mark.slow
def test_two_processes_agree_with_one_also_after_being_killed(alone, options, tmp_path):
    """One replica: each process has half of the rows of a batch."""
    config, workdir = recipe(tmp_path, options), tmp_path / "run"
    killed = start_two(config, workdir)
    at_checkpoint(workdir, killed, after=3)
    for process in killed:
        process.kill()
    ended(killed)
    assert not (workdir / "results.json").exists()
    first, second = ended(start_by_slurm(config, workdir))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "resuming at step" in first[1]
    assert "on 4 cpu device(s)" in first[1]
    # The first speaks for both. Threads of Gloo write their own line in pieces, one into the other.
    said = re.sub("|".join(map(re.escape, GLOO)), "", second[1])
    assert not re.search("[a-zA-Z]", said), second[1]
    assert (workdir / "model" / "model.safetensors").is_file()
    assert_same(workdir, alone)


@pytest.mark.slow
def test_segments_on_two_processes_are_those_of_one_device(alone, options, tmp_path):
    """Two groups of two devices, one in each process: hidden states cross between them."""
    config = recipe(tmp_path, options, segment_parallel=True)
    both = ended(start_two(config, tmp_path / "run"))
    assert [status for status, _, _ in both] == [0, 0], both
    assert_same(tmp_path / "run", alone)


@pytest.mark.nightly
def test_who_loses_the_other_stops_and_any_number_of_devices_goes_on(options, tmp_path):
    """Two replicas, one in each process; the second of two trainings is stopped, then killed."""
    changes = {"seeds": (0, 1), "method": "multi_model", "exits": (1, 3)}
    config, workdir = recipe(tmp_path, options, **changes), tmp_path / "run"
    both = start_two(config, workdir)
    at_checkpoint(workdir, both, 3, "depth_03")
    both[1].terminate()
    stopped = ended(both)
    messages = {errors.strip().splitlines()[-1] for _, _, errors in stopped}
    assert [status for status, _, _ in stopped] == [1, 1]
    assert len(messages) == 1  # after the same step
    assert "stopped by SIGTERM after step" in messages.pop()
    both = start_two(config, workdir)
    at_checkpoint(workdir, both, 15, "depth_03")
    both[1].kill()
    (status, _, errors), _ = ended(both)
    # By what was under way: a step that fails, or JAX's watch over the connection, which aborts.
    assert status in (1, -signal.SIGABRT)
    assert "another process is gone" in errors or "another task died" in errors
    assert "Traceback" not in errors
    whole, rest = ended([start(config, tmp_path / "alone", 1), start(config, workdir, 2)])
    assert (whole[0], rest[0]) == (0, 0), (whole, rest)
    assert "resuming at step" in rest[1]
    assert_same(workdir, tmp_path / "alone")


@pytest.mark.nightly
def test_processes_that_do_not_go_together_are_refused_in_one_line(options, tmp_path):
    config, workdir = recipe(tmp_path, options), tmp_path / "run"
    other = tmp_path / "other"
    other.mkdir()
    found = ended(start_two(config, workdir, second=(recipe(other, options, epochs=3), workdir)))
    for status, _, errors in found:
        assert status == 2
        assert "has a different config or reads different data" in errors.splitlines()[-1]
    assert not workdir.exists()
    for status, _, errors in ended(start_two(config, workdir, devices=(2, 1))):
        assert status == 2
        assert errors.splitlines()[-1].startswith("error: process 0 has 2 devices, but process 1")
    found = ended(start_two(config, workdir, second=(config, other / "run")))
    for status, _, errors in found:
        assert status == 2
        assert "choose a directory that all hosts share" in errors.splitlines()[-1]


def test_processes_that_read_other_files_are_told_which(options, tmp_path, monkeypatch):
    """Copies of an encoder under one name: the config and the data are the same."""
    name = tmp_path / "encoder"
    found, identity = [], {"exits": [1, 2, 3], "data_sha256": "0"}
    for seed in (0, 0, 1):
        copy = write_checkpoint(tmp_path / f"host{len(found)}", seed=seed)
        name.unlink(missing_ok=True)
        name.symlink_to(copy)
        job = prepare(from_mapping(options | {"checkpoint": str(name)}))
        found.append(input_digests(job, identity))
    assert found[0] == found[1]
    other = input_digests(job, identity | {"data_sha256": "1"})
    assert sum(a != b for a, b in zip(found[2].values(), other.values(), strict=True)) == 1
    monkeypatch.setattr(jax, "process_index", lambda: 1)

    def check(first: dict[str, str], own: dict[str, str]) -> None:
        both = [" ".join(each.values()).encode() for each in (first, own)]
        monkeypatch.setattr(input_digest, "all_gather", lambda _: both)
        input_digest.check_inputs(own)

    check(*found[:2])
    with pytest.raises(UserError, match=f"this process reads different weights from .*{name.name}"):
        check(found[0], found[2])
    with pytest.raises(UserError, match="has a different config or reads different data"):
        check(found[2], other)


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int
    id: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_processes_with_different_numbers_of_devices_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device(0, 0), Device(1, 1)])
    check_devices()
    monkeypatch.setattr(jax, "devices", lambda: [Device(0, 0), Device(1, 1), Device(1, 2)])
    with pytest.raises(UserError, match="process 1 has 2 devices, but process 0 has 1: start all"):
        check_devices()


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"seeds": (0, 1)}, ""),
        ({"seeds": (0, 1), "learning_rates": (1e-4, 1e-3)}, ""),
        ({"seeds": (0,)}, "1 replicas and batch_size 7"),
        # The search trains both rates, the training after it one.
        ({"learning_rates": (1e-4, 1e-3)}, ""),
        ({"learning_rates": (1e-4, 1e-3), "rate_search": "short"}, "1 replicas and batch_size 7"),
        (
            {"seeds": (0, 1), "learning_rates": (1e-4, 1e-3, 1e-2), "rate_search": "short"},
            "3 replicas and batch_size 7",
        ),
        ({"learning_rates": (1e-4, 1e-3), "epochs": 0, "head_init": "probe"}, "1 replicas and"),
    ],
)
def test_a_process_that_would_be_idle_is_found_before_anything_is_trained(
    changes, refused, monkeypatch
):
    config = Config(**{"batch_size": 7, "learning_rates": (1e-4,)} | changes)
    monkeypatch.setattr(jax, "devices", lambda: [Device(0, 0), Device(1, 1)])
    if not refused:
        return check_layout(config)
    with pytest.raises(UserError, match=refused):
        check_layout(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes=2"], "must be set together"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "from 0 to --num"),
        (["--coordinator_address=a", "--num_processes=2", "--process_id=0"], "HOST:PORT"),
        (["--num_processes=two"], "num_processes"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, message, options, tmp_path, capsys):
    line = [f"--config={recipe(tmp_path, options)}", f"--workdir={tmp_path / 'run'}"]
    assert main(["main", *line, *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(
    ("status", "printed", "requeued"),
    [
        (0, "", False),
        (1, "0: stopped by SIGTERM after step 3 of 9", True),
        (1, "0: a mistake", False),
        (143, "", True),  # SIGTERM outside the training loop of a single task
        (137, "", False),
    ],
)
def test_a_slurm_job_that_was_asked_to_stop_is_requeued(status, printed, requeued, tmp_path):
    script = Path(__file__).parent.parent / "experiments" / "launch" / "slurm.sh"
    log = tmp_path / "sweet_jax-7.log"
    log.write_text("0: stopped by SIGTERM\n")  # by an earlier start of the job
    commands = {"srun": f'echo "{printed}" >> "{log}"; exit {status}', "scontrol": 'echo "$@"'}
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "sweet_jax", "SLURM_SUBMIT_DIR": str(tmp_path)}
    variables = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(script), "--config=a.py"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout == ("requeue 7\n" if requeued else "")


def test_other_processes_wait_for_the_recommendation_of_the_first(options, tmp_path, monkeypatch):
    """At their exit they would wait for some minutes only."""
    done = []

    @contextlib.contextmanager
    def raise_on_all():
        done.append("enter")
        yield
        done.append("leave")

    monkeypatch.setattr("sweet_jax.pipeline.run", lambda *_: done.append("run"))
    monkeypatch.setattr("sweet_jax.main._recommend", lambda *_: done.append("recommend"))
    monkeypatch.setattr(distributed, "raise_on_all", raise_on_all)
    assert main(["main", options["data_files"], f"--output={tmp_path / 'run'}"]) == 0
    assert done == ["run", "enter", "recommend", "leave"]


@pytest.mark.nightly
def test_two_processes_probe_search_stop_and_refit_as_one(options, tmp_path):
    """The regressions of features that differ in their last bits agree to a thousandth."""
    changes = {"head_init": "probe", "head_refit": True, "epochs": "auto", "pooling": "mean"}
    changes |= {"rate_search": "short", "learning_rates": (1e-3, 3e-3), "tuning_fraction": 0.2}
    changes |= {"layer_scaling": 0.5}
    path = tmp_path / "recipe.py"
    path.write_text(f"def get_config():\n    return {options | changes!r}\n")
    both = ended(start_two(path, tmp_path / "run"))
    assert [status for status, _, _ in both] == [0, 0], both
    status, _, errors = ended([start(path, tmp_path / "alone", 1)])[0]
    assert status == 0, errors
    folders = (tmp_path / "run", tmp_path / "alone")
    for split in ("calibration", "tuning", "validation"):
        logits = [
            ExitOutputs.load(folder / "exit_outputs" / f"{split}.npz").logits for folder in folders
        ]
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-3)
    chosen = [json.loads((f / "rate_search.json").read_text())["learning_rate"] for f in folders]
    assert chosen[0] == chosen[1]
