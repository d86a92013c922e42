"""A cell: the runs of one task and method, which are compiled together.

A cell trains in WORKDIR/NAME. When it is finished its full outputs stand in WORKDIR/outputs/NAME
(logits as .npz, results.json, cell.json with the config and the digest of the data), and its
training directory, gigabytes of checkpoints, is removed. Of a cell whose runs are trained one after
the other, WORKDIR/outputs/NAME/runs has the same of each run that is finished.
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

# Training rows and mean tokens of a batch's longest text, to guess which cell takes longest.
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
    """Runs of one task and method: every seed and learning rate of the config.

    Attributes:
      name: TASK-METHOD, and after another hyphen what differs from the study's settings.
      config: of the runs.
      rate_search: "all_seeds": every learning rate with every seed, in one program. "first_seed":
        every rate with the first seed, and with the others the best of them by the area on the rows
        fitted on; one run after the other, so that memory holds one model.

    """

    name: str
    config: Config
    rate_search: str = "all_seeds"

    @property
    def work(self) -> float:
        """Estimates the layers times tokens that training goes through."""
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
    """Returns where the full outputs of a finished cell stand."""
    return workdir / "outputs" / name


def is_finished(workdir: Path, name: str) -> bool:
    """Returns whether the cell's outputs are there and whole."""
    return (outputs_folder(workdir, name) / "results.json").exists()


def run_cell(one: Cell, workdir: Path) -> dict[str, Any]:
    """Runs a cell and keeps its outputs; returns what the manifest says of it.

    A cell that fails must not stop the others: {"state": "failed", "error"}, and the "traceback"
    where the user's input is not to blame. Raises PreemptedError if SIGTERM came.
    """
    folder, kept = workdir / one.name, outputs_folder(workdir, one.name)
    began = time.monotonic()
    try:
        if one.rate_search == "first_seed":
            _run_one_by_one(one.config, folder, kept)
        else:
            _run_and_keep(one.config, folder, kept)
    except PreemptedError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        failed = {"state": "failed", "error": f"{type(error).__name__}: {text}"}
        if not isinstance(error, UserError):
            failed["traceback"] = traceback.format_exc()
        return failed
    return {"state": "done", "seconds": round(time.monotonic() - began)}


def _run_and_keep(config: Config, folder: Path, kept: Path) -> dict[str, Any]:
    """Runs a config in `folder`, keeps its outputs in `kept`; returns its results."""
    results = run(config, folder, report=False)
    kept.mkdir(parents=True, exist_ok=True)
    for path in (folder / "exit_outputs").glob("*.npz"):
        shutil.copy(path, kept)
    digest = json.loads((folder / "config.json").read_text())["data_sha256"]
    _write_cell(kept, config, digest)
    write_json(kept / "results.json", results)  # last: the outputs are whole with it
    shutil.rmtree(folder, ignore_errors=True)
    return results


def _write_cell(kept: Path, config: Config, digest: str) -> None:
    write_json(kept / "cell.json", {"config": identity(config), "data_sha256": digest})


def _run_one_by_one(config: Config, folder: Path, kept: Path) -> None:
    """Trains every rate with the first seed, the best with the others; joins what they leave."""
    runs: list[Path] = []  # where the outputs of each stand

    def run_solo(seed: int, rate: float) -> float:
        """Trains one run unless it is finished; returns the area on the rows fitted on."""
        name = f"{rate:g}-{seed}"
        runs.append(kept / "runs" / name)
        if (runs[-1] / "results.json").exists():
            results = json.loads((runs[-1] / "results.json").read_text())
        else:
            solo = dataclasses.replace(config, seeds=(seed,), learning_rates=(rate,))
            results = _run_and_keep(solo, folder / name, runs[-1])
        area = results["replicas"][0]["calibration_area"]
        return -math.inf if area is None else float(area)

    first, *others = config.seeds
    areas = {rate: run_solo(first, rate) for rate in config.learning_rates}
    best = max(areas, key=areas.__getitem__)
    for seed in others:
        run_solo(seed, best)
    for path in runs[0].glob("*.npz"):
        join_replicas([ExitOutputs.load(each / path.name) for each in runs]).save(kept / path.name)
    results = [json.loads((each / "results.json").read_text()) for each in runs]
    whole = results[0] | {"replicas": [each["replicas"][0] for each in results]}
    _write_cell(kept, config, json.loads((runs[0] / "cell.json").read_text())["data_sha256"])
    write_json(kept / "results.json", whole | {"mean": {"learning_rate": best}})
    shutil.rmtree(folder, ignore_errors=True)


def join_replicas(outputs: Sequence[ExitOutputs]) -> ExitOutputs:
    """Joins the replicas of several runs' outputs on as many rows, in the order given."""
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
    """Returns the config as JSON has it, without what depends on the machine."""
    values = json.loads(json.dumps(dataclasses.asdict(config.resolved()), default=str))
    free = ("data_dir", "checkpoint_every")
    # JSON has no infinity, which clip_norm may be.
    return {k: str(v) if v == math.inf else v for k, v in values.items() if k not in free}


def time_left(spent: float, worked: float, total: float) -> str:
    """Returns the end of a line of progress, after so many seconds for `worked` of `total`."""
    return f", {spent * (total / worked - 1) / 60:.0f} min left" if worked else ""
