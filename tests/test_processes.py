"""Tests of runs on several processes: equal results, resumption, errors, and Slurm."""

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
from sweet_jax.saved_config import config_values
from sweet_jax.training.parallel import check_layout

# Pieces of the line that Gloo prints on each rank.
GLOO = (
    *("[Gloo] Rank ", " is connected to ", " peer ranks. "),
    "Expected number of connected peer ranks is : ",
)
SECONDS = 240  # after which a process counts as hanging


def write_config(folder: Path, options: dict, **changes) -> Path:
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
    """Starts two processes; second: config and workdir of the second, if they differ."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    return [
        start(*paths, devices[number], *flags, f"--process_id={number}")
        for number, paths in enumerate([(config, workdir), second or (config, workdir)])
    ]


def start_two_under_slurm(config: Path, workdir: Path) -> list[subprocess.Popen]:
    """Starts two processes with the variables that srun sets for its tasks."""
    with socket.socket() as free:
        while True:  # JAX derives the port from the job number
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


def wait_for(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Returns (status, stdout, stderr) of each process; fails if one hangs."""
    try:
        printed = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *streams) for p, streams in zip(processes, printed, strict=True)]


def wait_for_checkpoint(
    workdir: Path, processes: list[subprocess.Popen], after: int, training: str = "exits_1_2_3"
) -> None:
    """Waits for a checkpoint of step `after` or a later one."""
    deadline = time.monotonic() + SECONDS
    while not any(
        int(path.name.split(".")[0]) >= after
        for path in (workdir / "checkpoints" / training).glob("*.digest.json")
        if path.name[0].isdigit()
    ):
        assert all(process.poll() is None for process in processes), wait_for(processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same_training(actual: Path, expected: Path) -> None:
    for split in ("calibration", "validation"):
        logits = [
            ExitOutputs.load(folder / "exit_outputs" / f"{split}.npz").logits
            for folder in (actual, expected)
        ]
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (actual, expected)]
    losses = [np.array([json.loads(line)["loss"] for line in steps]) for steps in lines]
    assert len(losses[0]) > 20
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def single_process_run(tiny_run, made_once) -> Path:
    """The run of one process with one device."""

    def make(folder):
        status, _, errors = wait_for([start(write_config(folder, tiny_run), folder / "run", 1)])[0]
        assert status == 0, errors
        return folder / "run"

    return made_once("alone", make)


@pytest.mark.slow
def test_two_processes_equal_one_process_also_after_kill_and_resumption(
    single_process_run, options, tmp_path
):
    """One replica: each process has half of the rows of a batch."""
    config, workdir = write_config(tmp_path, options), tmp_path / "run"
    killed = start_two(config, workdir)
    wait_for_checkpoint(workdir, killed, after=3)
    for process in killed:
        process.kill()
    wait_for(killed)
    assert not (workdir / "results.json").exists()
    first, second = wait_for(start_two_under_slurm(config, workdir))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "resuming at step" in first[1]
    assert "on 4 cpu device(s)" in first[1]
    # Only the first process prints, except for Gloo, whose threads write their lines interleaved.
    own_lines = re.sub("|".join(map(re.escape, GLOO)), "", second[1])
    assert not re.search("[a-zA-Z]", own_lines), second[1]
    assert (workdir / "model" / "model.safetensors").is_file()
    assert_same_training(workdir, single_process_run)


@pytest.mark.nightly
def test_segment_parallel_run_on_two_processes_equals_one_device(
    single_process_run, options, tmp_path
):
    """Each process has one of two groups of devices; hidden states are sent between them."""
    config = write_config(tmp_path, options, segment_parallel=True)
    results = wait_for(start_two(config, tmp_path / "run"))
    assert [status for status, _, _ in results] == [0, 0], results
    assert_same_training(tmp_path / "run", single_process_run)


@pytest.mark.nightly
def test_surviving_process_stops_and_run_resumes_on_other_device_count(options, tmp_path):
    """Runs a replica in each process; one process is terminated, and killed in the next start."""
    changes = {"seeds": (0, 1), "method": "multi_model", "exits": (1, 3)}
    config, workdir = write_config(tmp_path, options, **changes), tmp_path / "run"
    processes = start_two(config, workdir)
    wait_for_checkpoint(workdir, processes, 3, "depth_03")
    processes[1].terminate()
    stopped = wait_for(processes)
    messages = {errors.strip().splitlines()[-1] for _, _, errors in stopped}
    assert [status for status, _, _ in stopped] == [1, 1]
    assert len(messages) == 1  # after the same step
    assert "stopped by SIGTERM after step" in messages.pop()
    processes = start_two(config, workdir)
    wait_for_checkpoint(workdir, processes, 15, "depth_03")
    processes[1].kill()
    (status, _, errors), _ = wait_for(processes)
    # Depends on what is noticed first: a failed step, or a lost connection, for which JAX aborts.
    assert status in (1, -signal.SIGABRT)
    assert "another process is gone" in errors or "another task died" in errors
    assert "Traceback" not in errors
    uninterrupted, resumed = wait_for(
        [start(config, tmp_path / "alone", 1), start(config, workdir, 2)]
    )
    assert (uninterrupted[0], resumed[0]) == (0, 0), (uninterrupted, resumed)
    assert "resuming at step" in resumed[1]
    assert_same_training(workdir, tmp_path / "alone")


@pytest.mark.nightly
def test_processes_with_different_config_devices_or_workdir_are_refused(options, tmp_path):
    config, workdir = write_config(tmp_path, options), tmp_path / "run"
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    results = wait_for(
        start_two(config, workdir, second=(write_config(other_folder, options, epochs=3), workdir))
    )
    for status, _, errors in results:
        assert status == 2
        (line,) = errors.splitlines()[-1:]
        assert "this process has epochs=3, but the primary process has epochs=2: run" in line
    assert not workdir.exists()
    for status, _, errors in wait_for(start_two(config, workdir, devices=(2, 1))):
        assert status == 2
        assert errors.splitlines()[-1].startswith("error: process 0 has 2 devices, but process 1")
    results = wait_for(start_two(config, workdir, second=(config, other_folder / "run")))
    for status, _, errors in results:
        assert status == 2
        assert "choose a directory that all hosts share" in errors.splitlines()[-1]


def test_process_that_reads_different_weights_is_told_which_files(options, tmp_path, monkeypatch):
    """Gives two copies of an encoder the same path, so that config and data are equal."""
    encoder = tmp_path / "encoder"
    digests, identity = [], {"exits": [1, 2, 3], "data_sha256": "0"}
    for seed in (0, 0, 1):
        copy = write_checkpoint(tmp_path / f"host{len(digests)}", seed=seed)
        encoder.unlink(missing_ok=True)
        encoder.symlink_to(copy)
        job = prepare(from_mapping(options | {"checkpoint": str(encoder)}))
        digests.append(input_digests(job, identity))
    assert digests[0] == digests[1]
    other_data = input_digests(job, identity | {"data_sha256": "1"})
    assert sum(a != b for a, b in zip(digests[2].values(), other_data.values(), strict=True)) == 1
    monkeypatch.setattr(jax, "process_index", lambda: 1)

    def check_second_process(first: dict[str, str], second: dict[str, str]) -> None:
        gathered = [" ".join(digest.values()).encode() for digest in (first, second)]
        monkeypatch.setattr(input_digest, "all_gather", lambda _: gathered)
        input_digest.check_inputs(second, identity)

    check_second_process(*digests[:2])
    with pytest.raises(
        UserError, match=f"this process reads different weights from .*{encoder.name}"
    ):
        check_second_process(digests[0], digests[2])
    with pytest.raises(UserError, match="this process reads different data than the primary"):
        check_second_process(digests[2], other_data)


def test_process_with_a_different_config_is_told_the_key_and_both_values(options, monkeypatch):
    """Also if another key, in which a third process differs, comes later."""
    identities = [
        config_values(from_mapping(options | changes), "0")
        for changes in ({}, {"epochs": 3}, {"max_steps": 7})
    ]
    job = prepare(from_mapping(options))
    digests = [input_digests(job, identity) for identity in identities]
    raised: dict[int, str] = {}
    for number in range(3):
        sent = [
            [" ".join(each.values()).encode() for each in digests],
            [repr(identity["epochs"]).encode() for identity in identities],
        ]
        assert max(map(len, sent[0])) <= distributed._MESSAGE_BYTES

        def all_gather(own, sent=sent, number=number):
            messages = sent.pop(0)
            assert messages[number] == own
            return messages

        monkeypatch.setattr(input_digest, "all_gather", all_gather)
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        try:
            input_digest.check_inputs(digests[number], identities[number])
        except UserError as error:
            raised[number] = str(error)
        assert not sent  # all processes take part in the same exchanges
    assert list(raised) == [1]
    assert raised[1].startswith(
        "this process has epochs=3, but the primary process has epochs=2: run "
    )


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int
    id: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_unequal_device_counts_of_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device(0, 0), Device(1, 1)])
    check_devices()
    monkeypatch.setattr(jax, "devices", lambda: [Device(0, 0), Device(1, 1), Device(1, 2)])
    with pytest.raises(UserError, match="process 1 has 2 devices, but process 0 has 1: start all"):
        check_devices()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (0, 1)}, ""),
        ({"seeds": (0, 1), "learning_rates": (1e-4, 1e-3)}, ""),
        ({"seeds": (0,)}, "1 replicas and batch_size 7"),
        # The search trains both rates, the training after it only one.
        ({"learning_rates": (1e-4, 1e-3)}, ""),
        ({"learning_rates": (1e-4, 1e-3), "rate_search": "short"}, "1 replicas and batch_size 7"),
        (
            {"seeds": (0, 1), "learning_rates": (1e-4, 1e-3, 1e-2), "rate_search": "short"},
            "3 replicas and batch_size 7",
        ),
        ({"learning_rates": (1e-4, 1e-3), "epochs": 0, "head_init": "probe"}, "1 replicas and"),
    ],
)
def test_layout_that_leaves_a_process_idle_is_refused(changes, message, monkeypatch):
    config = Config(**{"batch_size": 7, "learning_rates": (1e-4,)} | changes)
    monkeypatch.setattr(jax, "devices", lambda: [Device(0, 0), Device(1, 1)])
    if not message:
        return check_layout(config)
    with pytest.raises(UserError, match=message):
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
def test_inconsistent_process_flags_are_refused_in_one_line(
    arguments, message, options, tmp_path, capsys
):
    required = [f"--config={write_config(tmp_path, options)}", f"--workdir={tmp_path / 'run'}"]
    assert main(["main", *required, *arguments]) == 2
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
def test_slurm_job_is_requeued_only_after_sigterm(status, printed, requeued, tmp_path):
    script = Path(__file__).parent.parent / "experiments" / "launch" / "slurm.sh"
    log = tmp_path / "sweet_jax-7.log"
    log.write_text("0: stopped by SIGTERM\n")  # of an earlier start of the job
    commands = {"srun": f'echo "{printed}" >> "{log}"; exit {status}', "scontrol": 'echo "$@"'}
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "sweet_jax", "SLURM_SUBMIT_DIR": str(tmp_path)}
    variables = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(script), "--config=a.py"]
    completed = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert completed.returncode == status, completed.stderr
    assert completed.stdout == ("requeue 7\n" if requeued else "")


def test_recommendation_is_computed_while_other_processes_wait(options, tmp_path, monkeypatch):
    """At their exit they would time out after some minutes."""
    events = []

    @contextlib.contextmanager
    def raise_on_all():
        events.append("enter")
        yield
        events.append("leave")

    monkeypatch.setattr("sweet_jax.pipeline.run", lambda *_: events.append("run"))
    monkeypatch.setattr("sweet_jax.main._recommend", lambda *_: events.append("recommend"))
    monkeypatch.setattr(distributed, "raise_on_all", raise_on_all)
    assert main(["main", options["data_files"], f"--output={tmp_path / 'run'}"]) == 0
    assert events == ["run", "enter", "recommend", "leave"]


@pytest.mark.nightly
def test_probe_rate_search_and_refit_on_two_processes_equal_one_process(options, tmp_path):
    """Probes of features that differ in their last bits make outputs agree to 1e-3 only."""
    changes = {"head_init": "probe", "head_refit": True, "epochs": "auto", "pooling": "mean"}
    changes |= {"rate_search": "short", "learning_rates": (1e-3, 3e-3), "tuning_fraction": 0.2}
    changes |= {"layer_scaling": 0.5}
    path = tmp_path / "recipe.py"
    path.write_text(f"def get_config():\n    return {options | changes!r}\n")
    results = wait_for(start_two(path, tmp_path / "run"))
    assert [status for status, _, _ in results] == [0, 0], results
    status, _, errors = wait_for([start(path, tmp_path / "alone", 1)])[0]
    assert status == 0, errors
    folders = (tmp_path / "run", tmp_path / "alone")
    for split in ("calibration", "tuning", "validation"):
        logits = [
            ExitOutputs.load(folder / "exit_outputs" / f"{split}.npz").logits for folder in folders
        ]
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-3)
    chosen = [json.loads((f / "rate_search.json").read_text())["learning_rate"] for f in folders]
    assert chosen[0] == chosen[1]
