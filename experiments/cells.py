"""Runs cells and keeps their outputs. A cell is all runs of one task and method, compiled together.

A cell is trained in WORKDIR/NAME. When it is finished, its full outputs are in WORKDIR/outputs/NAME
(logits as .npz, results.json, and cell.json with the config and the digest of the data), and its
training directory with gigabytes of checkpoints is removed. If the runs of a cell are trained one
after the other, WORKDIR/outputs/NAME/runs has the same files for each finished run.
"""

import dataclasses
import json
import math
import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.config import Config
from sweet_jax.distributed import PreemptedError
from sweet_jax.errors import UserError
from sweet_jax.exits.outputs import ExitOutputs, layer_cost
from sweet_jax.files import write_json
from sweet_jax.pipeline import run
from sweet_jax.training.schedule import training_steps

# Training rows and mean tokens of a batch's longest text, to estimate which cell takes longest.
_SIZES = {
    "sst2": (67_349, 40),
    "mrpc": (3_668, 80),
    "rte": (2_490, 128),
    "cola": (8_551, 32),
    "mnli": (392_702, 80),
    "qnli": (104_743, 96),
    "qqp": (363_846, 64),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """Describes the runs of one task and method: every seed and learning rate of the config.

    Attributes:
      name: TASK-METHOD or TASK-METHOD-CHANGES, with the values that differ from the study's.
      config: config of the runs.
      rate_search: "all_seeds" trains every learning rate with every seed, in one program.
        "first_seed" trains every rate with the first seed, and only the one with the largest area
        on the calibration rows with the others, one run after the other, so that memory holds one
        model at a time.

    """

    name: str
    config: Config
    rate_search: str = "all_seeds"

    @property
    def work(self) -> float:
        """Returns an estimate of the training cost, in layers times tokens."""
        rows, tokens = _SIZES.get(self.config.task, (self.config.train_size, 64))
        depths = layer_cost(self.config.exits, self.config.method)[-1] * self.config.exits[-1]
        steps = training_steps(
            self.config.epochs, min(rows, self.config.train_size), self.config.batch_size
        )
        examples = steps * self.config.batch_size
        runs = len(self.config.replicas())
        if self.rate_search == "first_seed":
            runs = len(self.config.learning_rates) + len(self.config.seeds) - 1
        return float(examples * tokens * depths * runs)


def outputs_folder(workdir: Path, name: str) -> Path:
    """Returns the folder of a finished cell's full outputs."""
    return workdir / "outputs" / name


def is_finished(workdir: Path, name: str) -> bool:
    """Returns whether the cell's outputs are complete."""
    return (outputs_folder(workdir, name) / "results.json").exists()


def run_cell(cell: Cell, workdir: Path) -> dict[str, Any]:
    """Runs a cell and keeps its outputs; returns its entry in the manifest.

    The entry is {"state": "done", "seconds"} or, since a failure must not stop the other cells,
    {"state": "failed", "error"}, with the "traceback" unless the error is a UserError. Raises
    PreemptedError after SIGTERM.
    """
    folder, kept = workdir / cell.name, outputs_folder(workdir, cell.name)
    began = time.monotonic()
    try:
        if cell.rate_search == "first_seed":
            _run_one_by_one(cell.config, folder, kept)
        else:
            _run_and_keep(cell.config, folder, kept)
    except PreemptedError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        entry = {"state": "failed", "error": f"{type(error).__name__}: {message}"}
        if not isinstance(error, UserError):
            entry["traceback"] = traceback.format_exc()
        return entry
    return {"state": "done", "seconds": round(time.monotonic() - began)}


def _run_and_keep(config: Config, folder: Path, kept: Path) -> dict[str, Any]:
    """Runs a config in `folder` and copies its outputs to `kept`; returns its results."""
    results = run(config, folder, report=False)
    kept.mkdir(parents=True, exist_ok=True)
    for path in (folder / "exit_outputs").glob("*.npz"):
        shutil.copy(path, kept)
    digest = json.loads((folder / "config.json").read_text())["data_sha256"]
    _write_cell(kept, config, digest)
    write_json(kept / "results.json", results)  # last, since it marks the outputs as complete
    shutil.rmtree(folder, ignore_errors=True)
    return results


def _write_cell(kept: Path, config: Config, digest: str) -> None:
    write_json(kept / "cell.json", {"config": identity(config), "data_sha256": digest})


def _run_one_by_one(config: Config, folder: Path, kept: Path) -> None:
    """Trains every rate with the first seed and the best one with the others; joins the outputs."""
    runs: list[Path] = []  # folders of the runs' outputs

    def run_single(seed: int, rate: float) -> float:
        """Trains one run unless it is finished; returns its area on the calibration rows."""
        name = f"{rate:g}-{seed}"
        runs.append(kept / "runs" / name)
        if (runs[-1] / "results.json").exists():
            results = json.loads((runs[-1] / "results.json").read_text())
        else:
            single = dataclasses.replace(config, seeds=(seed,), learning_rates=(rate,))
            results = _run_and_keep(single, folder / name, runs[-1])
        area = results["replicas"][0]["calibration_area"]
        return -math.inf if area is None else float(area)

    first, *others = config.seeds
    areas = {rate: run_single(first, rate) for rate in config.learning_rates}
    best = max(areas, key=areas.__getitem__)
    for seed in others:
        run_single(seed, best)
    for path in runs[0].glob("*.npz"):
        join_replicas([ExitOutputs.load(each / path.name) for each in runs]).save(kept / path.name)
    results = [json.loads((each / "results.json").read_text()) for each in runs]
    joined = results[0] | {"replicas": [each["replicas"][0] for each in results]}
    _write_cell(kept, config, json.loads((runs[0] / "cell.json").read_text())["data_sha256"])
    write_json(kept / "results.json", joined | {"mean": {"learning_rate": best}})
    shutil.rmtree(folder, ignore_errors=True)


def join_replicas(outputs: Sequence[ExitOutputs]) -> ExitOutputs:
    """Concatenates the outputs of several runs along the replicas; they have as many rows each."""
    scores = [each.exit_scores for each in outputs if each.exit_scores is not None]
    replicas = tuple(r for each in outputs for r in each.identity.replicas)
    return dataclasses.replace(
        outputs[0],
        logits=np.concatenate([each.logits for each in outputs]),
        labels=np.concatenate([each.labels for each in outputs]),
        exit_scores=np.concatenate(scores) if scores else None,
        identity=dataclasses.replace(outputs[0].identity, replicas=replicas),
    )


def identity(config: Config) -> dict[str, Any]:
    """Returns the config as JSON values, without the keys that depend on the machine."""
    values = json.loads(json.dumps(dataclasses.asdict(config.resolved()), default=str))
    excluded = ("data_dir", "checkpoint_every")
    # JSON has no infinity, which clip_norm may be.
    return {k: str(v) if v == math.inf else v for k, v in values.items() if k not in excluded}


def time_left(spent: float, worked: float, total: float) -> str:
    """Returns the end of a progress line: the estimated time left, or "" before the first cell.

    spent: seconds that the work `worked`, of `total`, has taken.
    """
    return f", {spent * (total / worked - 1) / 60:.0f} min left" if worked else ""
