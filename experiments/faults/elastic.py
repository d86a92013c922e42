"""A run that resumes on fewer processes, or on as many devices of fewer processes."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.faults.compare import contents, count_bits, differing_bits
from experiments.faults.inputs import write_inputs
from experiments.faults.launch import Setup, finish, started

# Of one seed the rows of a batch are spread, of four seeds the replicas. No epochs="auto", probe
# or refit: which state is kept, or the penalty chosen, must not hang on a last bit.
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
_SEEDS = {"rows of a batch": (0,), "replicas": (0, 1, 2, 3)}
# (processes, devices of each): of the same four devices; then of fewer.
_SAME, _FEWER = ((4, 1), (2, 2), (1, 4)), ((4, 1), (2, 1), (1, 1))


def run_elastic(folder: Path) -> list[dict[str, Any]]:
    """Runs 4 → 2 → 1 processes with the same and with fewer devices; returns the records."""
    records = []
    for spread, seeds in _SEEDS.items():
        place = folder / "elastic" / f"seeds-{len(seeds)}"
        shutil.rmtree(place, ignore_errors=True)
        (place / "inputs").mkdir(parents=True)
        config = write_inputs(place / "inputs", **_RECIPE, seeds=seeds)
        for layouts in (_SAME, _FEWER):
            alone = place / f"alone-{layouts[-1][1]}"
            last = Setup(config, place / "cache", *layouts[-1])
            finish(last, alone)
            run = place / f"elastic-{layouts[-1][1]}"
            steps = _resume_each(config, place / "cache", run, layouts)
            bits, names = differing_bits(alone, run)
            records.append(
                {
                    "spread": spread,
                    "layouts": [f"{p} x {d}" for p, d in layouts],
                    "stopped_at": steps,
                    "bits": bits,
                    "differing": count_bits(names),
                    "names": names[:10],
                    "largest": largest_difference(alone, run),
                }
            )
            print(records[-1], flush=True)
    return records


def _resume_each(config: Path, cache: Path, run: Path, layouts: tuple) -> list[int]:
    """Runs a third of the steps with each layout; returns at which step each was killed."""
    folder, steps = run / "checkpoints" / "exits_1_2_3", []
    for number, layout in enumerate(layouts[:-1], start=1):
        wanted = number * _STEPS // len(layouts)
        with started(Setup(config, cache, *layout), run) as attempt:
            while not any(_step(p) >= wanted for p in folder.glob("*.digest.json")):
                if len(attempt.running()) < len(attempt.processes):
                    raise RuntimeError(f"ended before step {wanted}: {attempt.said(0)}")
                time.sleep(0.005)
        steps.append(max(_step(p) for p in folder.glob("*.digest.json")))
    finish(Setup(config, cache, *layouts[-1]), run)
    return steps


def _step(path: Path) -> int:
    return int(path.name.split(".")[0])


def largest_difference(one: Path, other: Path) -> dict[str, float]:
    """Returns the largest absolute difference of logits, and of parameters, of two runs."""
    found = {}
    for kind, at in (("logits", "/logits"), ("parameters", "['params']")):
        ours, theirs = (
            {k: np.frombuffer(v, np.float32) for k, v in contents(run).items() if at in k}
            for run in (one, other)
        )
        found[kind] = max(float(np.abs(ours[k] - theirs[k]).max()) for k in ours)
    return found
