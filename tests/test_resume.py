"""Tests that runs which are killed and terminated resume with bitwise equal results."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.numpy


def write_config(folder: Path, options: dict) -> Path:
    path = folder / "recipe.py"
    path.write_text(f"def get_config():\n    return {options!r}\n")
    return path


def start(config: Path, workdir: Path, devices: int, every: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "sweet_jax.main", f"--config={config}"]
    command += [f"--workdir={workdir}", f"--config.checkpoint_every={every}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_to_end(config: Path, workdir: Path, devices: int, every: int = 100) -> str:
    process = start(config, workdir, devices, every)
    stdout, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return stdout


def checkpoint_steps(workdir: Path) -> list[int]:
    """Returns the steps of the checkpoints that are there, in any order."""
    folder = workdir / "checkpoints" / "exits_1_2_3"
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def signal_after_checkpoint(
    process: subprocess.Popen, workdir: Path, after: int, signal_number: int
) -> tuple[int, str]:
    """Sends a signal once the checkpoint of step `after` or a later one is there."""
    deadline = time.monotonic() + 300
    while max(checkpoint_steps(workdir), default=-1) < after:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def results_without_timing(workdir: Path) -> dict:
    results = json.loads((workdir / "results.json").read_text())
    return {key: value for key, value in results.items() if key != "timing"}


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        pytest.param(
            1,
            {
                "pooling": "mean",
                "head_init": "probe",
                "head_refit": True,
                "head_learning_rate": 2.0,
                "layer_decay": 0.8,
                "layer_scaling": 0.4,
                "epochs": "auto",
                "warmup_fraction": 0.1,
                "group_by_length": True,
                "learning_rates": (1e-3, 3e-3),
                "rate_search": "short",
                "distillation": 1.0,
                "tuning_fraction": 0.2,
                "baselines": "quick",
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            {
                "seeds": (0, 1),
                "method": "early_exit",
                "optimizer": "lion",
                "learning_rate_schedule": "cosine",
                "isolation": (0.0, 0.5),
                "boundary_isolation": (1.0, 0.5),
                "learning_to_exit": "joint",
                "last_exit_first": 0.25,
                "distillation": 0.5,
                "distillation_temperature": 2.0,
                "conflict_every": 4,
            },
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_killed_and_terminated_run_equals_an_uninterrupted_one_bitwise(
    options, with_dropout, tmp_path, devices, changes
):
    if "distillation" in changes:
        # The unlabeled rows are those of the file that are not drawn.
        changes = changes | {"unlabeled_files": options["data_files"]}
    config = write_config(tmp_path, options | with_dropout | changes)
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "broken"
    run_to_end(config, uninterrupted, devices)
    rng = random.Random(devices)
    first_step = rng.randrange(1, 9)
    killed = start(config, interrupted, devices, every=2)
    status, _ = signal_after_checkpoint(killed, interrupted, first_step, signal.SIGKILL)
    assert status == -signal.SIGKILL
    last_step = max(checkpoint_steps(interrupted))  # the kill may have come after `first_step`
    stopped = start(config, interrupted, devices, every=2)
    status, errors = signal_after_checkpoint(
        stopped, interrupted, last_step + rng.randrange(1, 7), signal.SIGTERM
    )
    assert status == 1
    assert "stopped by SIGTERM after step" in errors
    assert not (interrupted / "results.json").exists()
    assert "resuming at step" in run_to_end(config, interrupted, devices)
    assert results_without_timing(uninterrupted) == results_without_timing(interrupted)
    metrics = [(run / "metrics.jsonl").read_bytes() for run in (uninterrupted, interrupted)]
    assert metrics[0] == metrics[1]
    tensors = [
        safetensors.numpy.load_file(run / "model" / "model.safetensors")
        for run in (uninterrupted, interrupted)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[0].items():
        assert value.tobytes() == tensors[1][name].tobytes(), name
