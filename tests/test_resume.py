"""Killed and stopped runs of the real command, gone on with: bitwise what was never interrupted."""

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


def recipe(folder: Path, options: dict) -> Path:
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


def finish(config: Path, workdir: Path, devices: int, every: int = 100) -> str:
    process = start(config, workdir, devices, every)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed


def interrupt(process: subprocess.Popen, workdir: Path, after: int, how: int) -> tuple[int, str]:
    """Sends a signal once the checkpoint of step `after` or a later one is there."""
    deadline = time.monotonic() + 300
    folder = workdir / "checkpoints" / "exits_1_2_3"
    while not any(int(p.name) >= after for p in folder.glob("*") if p.name.isdigit()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def numbers(workdir: Path) -> dict:
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
                "distillation_weight": 1.0,
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
                "distillation_weight": 0.5,
                "distillation_temperature": 2.0,
                "conflict_every": 4,
            },
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_killed_then_terminated_then_finished(options, with_dropout, tmp_path, devices, changes):
    if "distillation_weight" in changes:  # of the rows that are not drawn
        changes = changes | {"unlabeled_files": options["data_files"]}
    config = recipe(tmp_path, options | with_dropout | changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(config, whole, devices)
    rng = random.Random(devices)
    first = rng.randrange(1, 9)
    killed = start(config, broken, devices, every=2)
    status, _ = interrupt(killed, broken, first, signal.SIGKILL)
    assert status == -signal.SIGKILL
    stopped = start(config, broken, devices, every=2)
    status, errors = interrupt(stopped, broken, first + rng.randrange(3, 9), signal.SIGTERM)
    assert status == 1
    assert "stopped by SIGTERM after step" in errors
    assert not (broken / "results.json").exists()
    assert "resuming at step" in finish(config, broken, devices)
    assert numbers(whole) == numbers(broken)
    assert (whole / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    tensors = [
        safetensors.numpy.load_file(run / "model" / "model.safetensors") for run in (whole, broken)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[0].items():
        assert value.tobytes() == tensors[1][name].tobytes(), name
