r"""The grid of runs behind the tables and figures: what a cell is, and running what is missing.

  python -m experiments.grid --model=minilm-l6 --tasks=sst2,cola --data_dir=DIR
  python -m experiments.grid --list

A cell is one model, task and method with all its learning rates and seeds, which are replicas of
one compiled program (Multi-Model: one for each depth). What a finished cell leaves stands in
OUTPUT/cells/NAME.json (every seed and rate) and OUTPUT/outputs/NAME/*.npz (the logits);
OUTPUT/manifest.json says of every cell whether it is done, failed or missing. A second start runs
what is missing, a cell stopped in the middle goes on from its checkpoint (in --workdir), and one
that failed does not stop the others (--retry runs it again). Tables and figures are of all tasks
that OUTPUT has cells of, whichever were asked for last.

The cells run one after the other in this process; with --engine=ray (pip install -e ".[cluster]")
side by side on the nodes of a Ray cluster, or on this machine's cores where none is given:

  python -m experiments.grid --model=bert-base --engine=ray --address=auto

All nodes must see this folder, --output, --workdir, --data_dir and the checkpoint under the same
paths. The manifest is written by this process alone.
"""

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cluster
from experiments.cells import Cell, attempt, identity, load, record_path, time_left
from experiments.options import chosen_tasks, default_output, method_cells, parser
from sweet_jax.config import UserError
from sweet_jax.data.tasks import GLUE
from sweet_jax.distributed import PreemptedError
from sweet_jax.files import lock_directory, write_json


def refuse_twins(cells: Iterable[Cell]) -> None:
    """Raises UserError where two cells of different names are the same run.

    So it is where the options set for all what a script means to compare: a table of them would
    call the same numbers by two names.
    """
    seen: dict[str, str] = {}
    for one in cells:
        twin = seen.setdefault(json.dumps(identity(one.config), sort_keys=True), one.name)
        if twin != one.name:
            raise UserError(
                f"with these options {one.name} is the same run as {twin}: leave out the --set or "
                "--preset that sets for all what is compared here"
            )


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
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout, force=True)
    made = parser(doc)
    for flag, how in (extra or {}).items():
        made.add_argument(flag, **how)
    try:
        options = made.parse_args(argv)
        options.output = options.output or default_output(options)
        # Of an output its own: cells of other options have the same names.
        options.workdir = options.workdir or Path("runs/experiments") / options.output.name
        cells = cells_of(options)
        refuse_twins(cells)
        if options.list:
            _print_states(options.output, cells)
            return 0
        whole = _with_finished_tasks(options, cells_of)
        load(options.output, cells_of(whole))  # other settings are refused before hours of work
        sound = options.render_only or run_cells(cells, options)
        render(whole, load(options.output, cells_of(whole)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PreemptedError as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        return 1
    return 0 if sound else 1


def run_cells(cells: Sequence[Cell], options: argparse.Namespace) -> bool:
    """Runs the cells that are missing, the longest first; True if none failed.

    Raises:
      UserError: another process writes to the same output, or there is no such cluster.
      StoppedError: SIGTERM came.

    """
    output: Path = options.output
    with lock_directory(output, "--output"):
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
        for one in cells:
            if states[one.name]["state"] == "failed":
                why = states[one.name]["error"]
                print(f"{one.name} failed before: {why} (--retry runs it again)", file=sys.stderr)
        left = [c for c in cells if states[c.name]["state"] == "missing"]
        left.sort(key=lambda c: -c.work)
        engine = cluster.run if options.engine == "ray" and left else _here
        with contextlib.closing(engine(left, options)) as ended:
            for one, state in ended:
                if state["state"] == "failed":
                    print(f"{one.name} failed: {state['error']}", file=sys.stderr)
                    print(state.pop("traceback", ""), file=sys.stderr, end="")
                states[one.name] = state
                write_json(output / "manifest.json", states)
    return all(states[c.name]["state"] == "done" for c in cells)


def _here(
    cells: Sequence[Cell], options: argparse.Namespace
) -> Generator[tuple[Cell, dict[str, Any]], None, None]:
    """Runs the cells one after the other in this process; yields each with its state."""
    began, total, worked = time.monotonic(), sum(c.work for c in cells), 0.0
    for number, one in enumerate(cells, start=1):
        rest = time_left(time.monotonic() - began, worked, total)
        print(f"[{number}/{len(cells)}] {one.name}{rest}", flush=True)
        yield one, attempt(one, options.output, options.workdir)
        worked += one.work


def _with_finished_tasks(
    options: argparse.Namespace, cells_of: Callable[[argparse.Namespace], list[Cell]]
) -> argparse.Namespace:
    """The options with every task that the output has a cell of, after those that were chosen.

    What is rendered replaces what stood there: a task run on its own must not take the others out.
    """
    tasks = list(chosen_tasks(options))
    for task in GLUE:
        alone = argparse.Namespace(**{**vars(options), "tasks": task})
        known = (record_path(options.output, c.name) for c in cells_of(alone))
        if task not in tasks and any(path.exists() for path in known):
            tasks.append(task)
    return argparse.Namespace(**{**vars(options), "tasks": ",".join(tasks)})


def _states(output: Path) -> dict[str, dict[str, Any]]:
    path = output / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _print_states(output: Path, cells: Iterable[Cell]) -> None:
    states, done = _states(output), load(output, cells)
    for one in cells:
        known = states.get(one.name, {})
        state = known.get("state", "missing")
        state = "done" if one.name in done else "missing" if state == "done" else state
        print(f"{state:>8}  {one.name}  {known.get('error', '')}".rstrip())


if __name__ == "__main__":
    sys.exit(main(__doc__, method_cells, lambda options, cells: None))
