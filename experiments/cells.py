"""One cell of the grid: runs that are compiled together, what they leave, and how they are done."""

import dataclasses
import json
import math
import shutil
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.config import Config, UserError
from sweet_jax.distributed import PreemptedError
from sweet_jax.exits.analysis import curve_area
from sweet_jax.exits.outputs import layer_cost
from sweet_jax.files import write_json
from sweet_jax.pipeline import run

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
# Keys of results.json that the record of a cell keeps; curves follow from the saved outputs.
_KEPT = ("task", "method", "checkpoint", "exits", "preset", "metric", "n", "fitted_on")
_KEPT_OF_REPLICA = (
    "seed",
    "learning_rate",
    "individual",
    "temperatures",
    "grid",
    "at_cost",
    "calibration_area",
    "diverged",
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs that are compiled together. The name is that of its files."""

    name: str
    config: Config

    @property
    def work(self) -> float:
        """A guess of the layers times tokens that training goes through."""
        rows, tokens = _SIZES.get(self.config.task, (self.config.train_size, 64))
        depths = layer_cost(self.config.exits, self.config.method)[-1] * self.config.exits[-1]
        rows = min(rows, self.config.train_size) * self.config.epochs
        return float(rows * tokens * depths * len(self.config.replicas()))


def load(output: Path, cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    """The records of the cells that are done, by name, each with the folder of its outputs.

    Raises UserError for a record that was made with another configuration, or with other rows than
    those of another cell of its task.
    """
    found: dict[str, dict[str, Any]] = {}
    data: dict[str, tuple[str, Path]] = {}  # by task
    # What a key was before there was one; pooling had no other value then.
    usual = identity(Config()) | {"pooling": "first"}
    for one in cells:
        path = record_path(output, one.name)
        if not path.exists():
            continue
        record = json.loads(path.read_text()) | {"outputs": output / "outputs" / one.name}
        found[one.name] = record
        ours = identity(one.config)
        theirs = usual | record["config"]
        differing = [k for k in ours if theirs[k] != ours[k]]
        if differing:
            raise UserError(
                f"{str(path)!r} was made with {differing[0]} {theirs[differing[0]]!r}, "
                f"not {ours[differing[0]]!r}: give the same options, or another --output"
            )
        if digest := record.get("data_sha256"):  # an old record has none
            known, first = data.setdefault(one.config.task, (digest, path))
            if known != digest:
                raise UserError(
                    f"{str(path)!r} was made with other rows of {one.config.task} than "
                    f"{str(first)!r}: remove the one whose --data_dir was another"
                )
    return found


def attempt(one: Cell, output: Path, workdir: Path) -> dict[str, Any]:
    """Runs a cell and writes its record; what the manifest says of it.

    A cell that fails must not stop the others: {"state": "failed", "error"}, and the "traceback"
    where the user's input is not to blame. Raises StoppedError if SIGTERM came.
    """
    workdir = workdir / one.name
    began = time.monotonic()
    try:
        results = run(one.config, workdir, report=False)
        kept = output / "outputs" / one.name
        kept.mkdir(parents=True, exist_ok=True)
        for path in (workdir / "exit_outputs").glob("*.npz"):
            shutil.copy(path, kept)
        data = json.loads((workdir / "config.json").read_text())["data_sha256"]
        record = record_of(results) | {"config": identity(one.config), "data_sha256": data}
        write_json(record_path(output, one.name), record)
        shutil.rmtree(workdir, ignore_errors=True)  # gigabytes of checkpoints; the cell is done
    except PreemptedError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        failed = {"state": "failed", "error": f"{type(error).__name__}: {text}"}
        if not isinstance(error, UserError):
            failed["traceback"] = traceback.format_exc()
        return failed
    return {"state": "done", "seconds": round(time.monotonic() - began)}


def record_path(output: Path, name: str) -> Path:
    """Where the record of a finished cell stands."""
    return output / "cells" / f"{name}.json"


def time_left(spent: float, worked: float, total: float) -> str:
    """What a line of progress says of the rest, after so many seconds for `worked` of `total`."""
    return f", {spent * (total / worked - 1) / 60:.0f} min left" if worked else ""


def record_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a cell keeps of results.json, with the area under each replica's exact curve.

    On validation rows, over the curve's own range of cost, at no more than 2,000 of its thresholds.
    """
    replicas = [
        # The grid's, as the paper's tables have it: the exact curve follows from the outputs.
        {k: replica[k] for k in _KEPT_OF_REPLICA}
        | {"at_cost": replica["grid_at_cost"]}
        | {"area": curve_area(*(np.asarray(replica["curve"][k]) for k in ("cost", "score")))}
        for replica in results["replicas"]
    ]
    return {k: results[k] for k in _KEPT} | {
        "learning_rate": results["mean"]["learning_rate"],  # chosen by area
        "replicas": replicas,
        "timing": results["timing"],
        "versions": results["versions"],
    }


def identity(config: Config) -> dict[str, Any]:
    """The config as JSON has it, without what depends on the machine."""
    values = json.loads(json.dumps(dataclasses.asdict(config.resolved()), default=str))
    free = ("data_dir", "checkpoint_every")
    # JSON has no infinity, which clip_norm may be.
    return {k: str(v) if v == math.inf else v for k, v in values.items() if k not in free}
