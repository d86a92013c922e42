"""Resumes a run on fewer processes, with as many devices in all or with fewer."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.faults.compare import count_bits, differing_bits, read_contents
from experiments.faults.inputs import write_inputs
from experiments.faults.launch import Setup, run_to_end, started

# Without epochs="auto", probe and refit, which could choose another state or penalty because of
# differences in the last bits.
_STEPS = 24
_RECIPE = {
    "head_init": "random",
    "head_refit": False,
    "head_learning_rate": 1.0,
    "epochs": 2,
    "max_steps": _STEPS,
    "learning_rates": (1e-3,),
    "rate_search": "full",
    "checkpoint_every": 2,
    "baselines": "none",
}
# What is distributed over the devices, with the seeds: the rows of one replica, or four replicas.
_SEEDS = {"rows of a batch": (0,), "replicas": (0, 1, 2, 3)}
# (processes, devices of each): four devices throughout; and four, two, one.
_SAME_DEVICES, _FEWER_DEVICES = ((4, 1), (2, 2), (1, 4)), ((4, 1), (2, 1), (1, 1))


def run_elastic(folder: Path) -> list[dict[str, Any]]:
    """Resumes runs on 4, 2 and 1 processes; returns their records.

    Each is compared with a run on the last of its layouts alone.
    """
    records = []
    for spread, seeds in _SEEDS.items():
        place = folder / "elastic" / f"seeds-{len(seeds)}"
        shutil.rmtree(place, ignore_errors=True)
        (place / "inputs").mkdir(parents=True)
        config = write_inputs(place / "inputs", **_RECIPE, seeds=seeds)
        for layouts in (_SAME_DEVICES, _FEWER_DEVICES):
            alone = place / f"alone-{layouts[-1][1]}"
            run_to_end(Setup(config, place / "cache", *layouts[-1]), alone)
            run = place / f"elastic-{layouts[-1][1]}"
            steps = _run_layouts(config, place / "cache", run, layouts)
            bits, differences = differing_bits(alone, run)
            records.append(
                {
                    "spread": spread,
                    "layouts": [f"{p} x {d}" for p, d in layouts],
                    "stopped_at": steps,
                    "bits": bits,
                    "differing": count_bits(differences),
                    "names": differences[:10],
                    "largest": largest_differences(alone, run),
                }
            )
            print(records[-1], flush=True)
    return records


def _run_layouts(
    config: Path, cache: Path, run: Path, layouts: Sequence[tuple[int, int]]
) -> list[int]:
    """Runs a third of the steps with each layout; returns the steps at which it was killed."""
    folder, steps = run / "checkpoints" / "exits_1_2_3", []
    for number, layout in enumerate(layouts[:-1], start=1):
        wanted = number * _STEPS // len(layouts)
        with started(Setup(config, cache, *layout), run) as attempt:
            while not any(_step(p) >= wanted for p in folder.glob("*.digest.json")):
                if not attempt.is_whole():
                    raise RuntimeError(f"ended before step {wanted}: {attempt.read_errors(0)}")
                time.sleep(0.005)
        steps.append(max(_step(p) for p in folder.glob("*.digest.json")))
    run_to_end(Setup(config, cache, *layouts[-1]), run)
    return steps


def _step(path: Path) -> int:
    return int(path.name.split(".")[0])


def largest_differences(one: Path, other: Path) -> dict[str, float]:
    """Returns the largest absolute difference of the logits, and of the parameters, of two runs."""
    largest = {}
    for kind, part in (("logits", "/logits"), ("parameters", "['params']")):
        ours, theirs = (
            {k: np.frombuffer(v, np.float32) for k, v in read_contents(run).items() if part in k}
            for run in (one, other)
        )
        largest[kind] = max(float(np.abs(ours[k] - theirs[k]).max()) for k in ours)
    return largest
