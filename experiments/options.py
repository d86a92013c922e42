"""Options that the scripts share, and the cells that they select."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import cluster
from experiments.cells import Cell
from experiments.encoders import MODELS
from sweet_jax.arguments import ArgumentParser
from sweet_jax.config import from_mapping, split_names
from sweet_jax.data.tasks import GLUE
from sweet_jax.errors import UserError, check_choice
from sweet_jax.methods import METHODS

SEEDS = (0, 1, 2)
_SHARED = ("train_size", "max_length", "preset", "checkpoint", "exits")


def make_parser(doc: str | None = None, script: str = "grid") -> ArgumentParser:
    """Returns a parser of the options that the scripts of the paper's grid share.

    doc: text of --help. script: name of the script's module.
    """
    parser = ArgumentParser(f"experiments.{script}", doc or "")
    add = parser.add_argument
    add("--model", default="minilm-l6", choices=MODELS, help="default: %(default)s")
    add("--tasks", default="sst2,mrpc,cola,rte", help="GLUE tasks; default: %(default)s")
    add("--methods", default=",".join(METHODS), help="default: %(default)s")
    add(
        "--learning_rates",
        help="default: the model's; the rate with the largest area is reported",
    )
    add("--seeds", help="default: 0,1,2")
    add(
        "--rate_search",
        default="all_seeds",
        choices=("all_seeds", "first_seed"),
        help="all_seeds (the default): train every learning rate with every seed, in one program. "
        "first_seed: train every rate with the first seed and only the best one with the others, "
        "one run after the other; for encoders that fit in memory only once during training",
    )
    add(
        "--train_size",
        type=int,
        help="maximum training rows; default: the model's, 6000 for the models of the paper",
    )
    add("--max_length", type=int, help="maximum tokens of a text; default: the model's")
    add("--preset", choices=("", "paper", "reference"), help="preset of the config; default: none")
    add(
        "--data_dir",
        help="folder with <task>/{train,validation}.parquet; default: download from the hub",
    )
    add("--checkpoint", help="default: the model's")
    add("--exits", help="layers of the exits, separated by commas; default: the model's")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="set another config key")
    add("--output", type=Path, help="folder of the records; default: experiments/results/MODEL")
    add(
        "--workdir",
        type=Path,
        help="folder of unfinished runs and full outputs; default: runs/experiments/NAME, with the "
        "name of --output",
    )
    add("--retry", action="store_true", help="run failed cells again")
    add("--render_only", action="store_true", help="run nothing; show the finished cells")
    add(
        "--list",
        action="store_true",
        help="run nothing; print which cells are done, failed and missing",
    )
    cluster.add_options(parser.add_argument_group("engine"))
    return parser


def make_record_parser(script: str, doc: str | None) -> ArgumentParser:
    """Returns a parser of the options shared by the scripts that study GLUE and other texts.

    script: name of the script's module, and of its default folders.
    """
    parser = ArgumentParser(f"experiments.{script}", doc or "")
    add = parser.add_argument
    add("--data_dir", type=Path, help="folder of GLUE, <task>/{train,validation}.parquet")
    add("--text_dir", type=Path, help="folder of ag_news and banking77, with the same layout")
    add(
        "--workdir",
        type=Path,
        default=Path("runs") / script,
        help="folder of unfinished runs; default: %(default)s",
    )
    add(
        "--output",
        type=Path,
        default=Path("experiments/results") / script,
        help="folder of the records and tables; default: %(default)s",
    )
    add("--render_only", action="store_true", help="run nothing; show the recorded results")
    return parser


def check_data_folders(options: argparse.Namespace, alternatives: str = "--render_only") -> None:
    """Raises UserError unless --data_dir and --text_dir are existing folders.

    alternatives: options that need no data, for the message.
    """
    if options.data_dir is None or options.text_dir is None:
        raise UserError(f"set --data_dir and --text_dir, or {alternatives}")
    for name in ("data_dir", "text_dir"):
        folder = getattr(options, name)
        if not folder.is_dir():
            raise UserError(f"--{name} {str(folder)!r} is not a directory: set it to the folder")


def config_values(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the config values of --model, with those that other options override.

    Raises UserError for exits, rates or seeds that are not numbers, and if --set has a key that
    differs between cells.
    """
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
            raise UserError(f"--set {text} would apply to every cell: use --{key}s={value}")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values


def exit_columns(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the table columns of the model's exits and of the area."""
    return (*(f"exit {e}" for e in config_values(options)["exits"]), "area")


def make_cell(options: argparse.Namespace, task: str, method: str, **changed: Any) -> Cell:
    """Returns the cell of a task and method, with the options' config except for `changed` values.

    The changed values are part of its name, so that scripts share the cells they have in common.
    """
    changes = [f"{k}-{'-'.join(map(_text, _several(v)))}" for k, v in changed.items()]
    values = {**config_values(options), "task": task, "method": method, **changed}
    name = "-".join([task, method, *changes])
    return Cell(name, from_mapping(values), options.rate_search)


def method_cells(options: argparse.Namespace) -> list[Cell]:
    """Returns the cells of the paper's grid: every task with every method."""
    return [
        make_cell(options, task, method)
        for task in chosen_tasks(options)
        for method in chosen_methods(options)
    ]


def chosen_tasks(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the tasks of --tasks. Raises UserError for an unknown or repeated one."""
    return _chosen("task", options.tasks, GLUE)


def chosen_methods(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the methods of --methods. Raises UserError for an unknown or repeated one."""
    return _chosen("method", options.methods, METHODS)


def _chosen(kind: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    names = split_names(text)
    for name in names:
        check_choice(kind, name, known)
    if len(set(names)) < len(names):
        raise UserError(f"--{kind}s must be distinct; got {text!r}")
    return names


def shared_arguments(options: argparse.Namespace) -> list[str]:
    """Returns the options that all cells of a study share, as command-line arguments."""
    return _arguments(options, ("learning_rates", "seeds", "rate_search", *_SHARED))


def command_line(options: argparse.Namespace, script: str) -> str:
    """Returns the command that reproduces a table, without the options that depend on the machine.

    script: name of the script's module.
    """
    common = vars(make_parser().parse_args([]))
    own = sorted(set(vars(options)) - set(common))
    keys = ("tasks", "methods", "learning_rates", "seeds", "rate_search", *_SHARED, *own)
    arguments = _arguments(options, keys)
    if options.output != default_output(options):
        here = Path.cwd()
        path = options.output.resolve()
        path = path.relative_to(here) if path.is_relative_to(here) else path
        arguments.append(f"--output={path}")
    return f"python -m experiments.{script} {' '.join(arguments)}"


def _arguments(options: argparse.Namespace, keys: Iterable[str]) -> list[str]:
    """Returns --model, those of the options `keys` that are not the default, and --set."""
    defaults = vars(make_parser().parse_args([]))
    values = {key: getattr(options, key) for key in keys}
    arguments = [f"--model={options.model}"]
    arguments += [
        f"--{key}={value}"
        for key, value in values.items()
        if key not in defaults or value != defaults[key]
    ]
    return arguments + [f"--set={text}" for text in options.set]


def default_output(options: argparse.Namespace) -> Path:
    """Returns the default of --output for the options' model."""
    return Path("experiments/results") / options.model


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(key: str, kind: type, text: str) -> float:
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"--{key} must be numbers separated by commas; got {text!r}") from error
