"""A cell: the runs of one task and method, which are compiled together.

A cell trains in WORKDIR/NAME. When it is finished its full outputs stand in WORKDIR/outputs/NAME
(logits as .npz, results.json, cell.json with the config and the digest of the data), and its
training directory, gigabytes of checkpoints, is removed.
"""

import dataclasses
import json
import math
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

from sweet_jax.config import Config, UserError
from sweet_jax.distributed import PreemptedError
from sweet_jax.exits.outputs import layer_cost
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

    """

    name: str
    config: Config

    @property
    def work(self) -> float:
        """Estimates the layers times tokens that training goes through."""
        rows, tokens = _SIZES.get(self.config.task, (self.config.train_size, 64))
        depths = layer_cost(self.config.exits, self.config.method)[-1] * self.config.exits[-1]
        steps = training_steps(
            self.config.epochs, min(rows, self.config.train_size), self.config.batch_size
        )
        examples = steps * self.config.batch_size
        return float(examples * tokens * depths * len(self.config.replicas()))


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
        results = run(one.config, folder, report=False)
        kept.mkdir(parents=True, exist_ok=True)
        for path in (folder / "exit_outputs").glob("*.npz"):
            shutil.copy(path, kept)
        digest = json.loads((folder / "config.json").read_text())["data_sha256"]
        write_json(kept / "cell.json", {"config": identity(one.config), "data_sha256": digest})
        write_json(kept / "results.json", results)  # last: the outputs are whole with it
        shutil.rmtree(folder, ignore_errors=True)
    except PreemptedError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        failed = {"state": "failed", "error": f"{type(error).__name__}: {text}"}
        if not isinstance(error, UserError):
            failed["traceback"] = traceback.format_exc()
        return failed
    return {"state": "done", "seconds": round(time.monotonic() - began)}


def identity(config: Config) -> dict[str, Any]:
    """Returns the config as JSON has it, without what depends on the machine."""
    values = json.loads(json.dumps(dataclasses.asdict(config.resolved()), default=str))
    free = ("data_dir", "checkpoint_every")
    # JSON has no infinity, which clip_norm may be.
    return {k: str(v) if v == math.inf else v for k, v in values.items() if k not in free}


def time_left(spent: float, worked: float, total: float) -> str:
    """Returns the end of a line of progress, after so many seconds for `worked` of `total`."""
    return f", {spent * (total / worked - 1) / 60:.0f} min left" if worked else ""
