r"""Trains, evaluates, calibrates, simulates and reports, on a file of labeled texts or a config.

  sweet-jax train data.csv --text=text --budget=5ms --output=runs/own
  sweet-jax train --config=configs/quickstart.py --workdir=runs/quickstart
  sweet-jax train --config=configs/glue.py:mrpc --workdir=runs/mrpc \
      --config.method=sweet --config.exits=1,4,6,12 \
      --config.learning_rates=3e-5,5e-5

python -m sweet_jax.main is the same command.

With a file, the recipe is that of configs/own.py, whose values are listed below before the keys.
With a file and --config=FILE, that config's values replace all of them. --config.KEY=VALUE
overrides either.
  --text=NAME     the column of the text, or a,b for the two columns of a pair; default: the only
                  column besides the label, else the columns of a common pair (sentence1,sentence2;
                  premise,hypothesis; ...), else the only column with a common name (text, sentence,
                  review, ...), else an error
  --label=NAME    the column of the label; default "label"
  --test=FILE     rows to report on; default: a fifth of the file is split off
  --budget=LIMIT  the maximum mean time per text in the model on this machine, such as 5ms (at the
                  median length; tokenization and HTTP are not included, and single texts may take
                  longer), or the maximum mean fraction of the layers, such as 0.5, for the
                  operating point that is recommended at the end; default: the cheapest operating
                  point that is as accurate as all layers
  --output=DIR    the directory of the run (also --workdir); default runs/NAME, from the file's name

A config file is a Python file whose get_config() returns the values that differ from the defaults
below; the text after a colon is passed to it as an argument. --config.KEY=VALUE overrides a key; if
it is repeated, the last one counts. Separate several values of a key by commas: 1,4,6,12.
The same command in the same workdir resumes an interrupted run.
Compiled programs are kept in ~/.cache/sweet_jax/xla (JAX_COMPILATION_CACHE_DIR sets another
directory, JAX_ENABLE_COMPILATION_CACHE=0 disables this).
On several hosts, run the same command on each, with a workdir that all of them share. On Cloud TPU
and in a Slurm step of several tasks the processes find each other; elsewhere, pass each of them
  --coordinator_address=HOST:PORT  a free port on the host of the first process
  --num_processes=P --process_id=I  I from 0 to P - 1
Exit status: 0 done, 2 the input is wrong (one line says what and how to fix it), 1 anything else.
"""

import dataclasses
import difflib
import itertools
import logging
import os
import re
import runpy
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Set before the libraries are imported, so that a user error is reported in one line, not ten.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from absl import flags
from ml_collections import ConfigDict, config_flags

from sweet_jax.arguments import run_command
from sweet_jax.config import (
    Config,
    check_type,
    convert_values,
    describe_keys,
    from_mapping,
    warn_of_recipe,
)
from sweet_jax.errors import UserError, check_choice, one_line
from sweet_jax.exits.outputs import layer_cost
from sweet_jax.help_text import help_width, wrap_help
from sweet_jax.paths import expand_user, join_sources
from sweet_jax.recipe import OWN_DATA
from sweet_jax.standard_output import LogHandler, print_text
from sweet_jax.storage_errors import RESUMES

_FILE_OPTIONS = ("text", "label", "test", "budget", "output")  # of a run on a file
_OPTIONS = (
    *("config", "workdir", *_FILE_OPTIONS),
    *("coordinator_address", "num_processes", "process_id", "help"),
)


class Command(NamedTuple):
    """Holds a parsed command line."""

    config: Config
    workdir: Path
    processes: tuple[str | None, int | None, int | None]  # see `distributed.initialize`
    # Target of the operating point to recommend; None (a run of a config) recommends none.
    target: Mapping[str, float] | None = None


def parse(argv: Sequence[str]) -> Command:
    """Parses a command line; exits on --help. Raises UserError if it is invalid."""
    first = flags.FlagValues()
    first.set_gnu_getopt(True)  # flags may follow the name of a file
    flags.DEFINE_string("config", None, "config file, with its argument after a colon", first)
    flags.DEFINE_string("workdir", None, "directory of the run", first)
    for name in _FILE_OPTIONS:
        flags.DEFINE_string(name, None, "for a run on a file", first)
    flags.DEFINE_string("coordinator_address", None, "host:port of the first process", first)
    flags.DEFINE_integer("num_processes", None, "number of processes", flag_values=first)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", flag_values=first)
    flags.DEFINE_boolean("help", False, "show this help", first, short_name="h")
    try:
        rest = first(list(argv), known_only=True)
    except flags.Error as error:
        raise UserError(one_line(error)) from error
    empty = [name for name, value in first.flag_values_dict().items() if value == ""]
    if empty:  # for example because of a shell variable that is not set
        raise UserError(f"--{empty[0]} is empty: set a value, or remove it")
    if first.help:
        print_text("\n".join([wrap_help(__doc__ or ""), *_recipe_lines(), *_key_lines()]))
        raise SystemExit(0)
    joining = (first.coordinator_address, first.num_processes, first.process_id)
    if len(argv) > 1 and not argv[1].startswith("-"):
        return _parse_file(first, rest)._replace(processes=joining)
    for name in _FILE_OPTIONS:
        if first[name].value is not None:
            raise UserError(
                f"--{name} applies only to a run on a file: sweet-jax train FILE --{name}=…"
            )
    recipe = _recipe(first.config) if first.config else None
    if recipe is None or not first.workdir:
        unknown = [text for text in rest[1:] if not text.startswith("--config.")]
        problem = f"unknown argument {unknown[0]!r}: " if unknown else ""
        if unknown and (near := _nearest_option(unknown[0])):
            raise UserError(f"{problem}{near}")
        raise UserError(
            f"{problem}pass FILE, a file of labeled rows, or --config=FILE and --workdir=DIR "
            "(--help lists all options)"
        )
    workdir = expand_user(first.workdir)  # shells do not expand ~ after --workdir=
    return Command(_overridden(recipe, rest), workdir, joining)


def _parse_file(given: flags.FlagValues, arguments: Sequence[str]) -> Command:
    """Parses the command of a run on a file.

    given: the flags that are already parsed.
    arguments: the rest of the command line; the second of them is the file.
    """
    name = arguments[1]
    if given.workdir and given.output:
        raise UserError("--output and --workdir set the same directory: remove one of them")
    stem = Path(name.partition("+")[0]).name.partition(".")[0]
    workdir = expand_user(given.output or given.workdir or f"runs/{stem}")
    recipe = _recipe(given.config) if given.config else _with_defaults(OWN_DATA)
    recipe.data_files = join_sources([name, given.test] if given.test else [name])
    for key, value in (("text_columns", given.text), ("label_column", given.label)):
        if value is not None:  # otherwise a config file may set it
            recipe[key] = value
    config = _overridden(recipe, [arguments[0], *arguments[2:]])
    warn_of_recipe(config, OWN_DATA)
    most = float(layer_cost(config.exits, config.method)[-1])
    return Command(config, workdir, (None, None, None), parse_budget(given.budget, most))


def parse_budget(text: str | None, most: float = 1.0) -> dict[str, float]:
    """Returns the target that a budget sets; {} for no budget.

    text: a time such as 5ms, or a fraction of the layers such as 0.5.
    most: maximum cost of a text, as a fraction of the layers; above 1 for Multi-Model.

    Raises UserError for text that is neither, and for a fraction above `most`.
    """
    if text is None:
        return {}
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(ms)?\s*", text)
    if not match or float(match[1]) <= 0:
        raise UserError(
            "--budget must be a time, such as 5ms, or a fraction of the layers, such as 0.5; got "
            f"{text!r}"
        )
    if not match[2] and float(match[1]) > most:
        raise UserError(
            f"--budget={match[1]} is a fraction of the layers, which is at most {most:.3g}: for "
            f"milliseconds write --budget={match[1]}ms"
        )
    return {"milliseconds" if match[2] else "cost": float(match[1])}


def _recipe_lines() -> Iterator[str]:
    """Yields the --help lines about the values that replace the defaults in a run on a file."""
    defaults = dataclasses.asdict(Config())
    values = {
        key: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for key, value in OWN_DATA.items()
        if value != defaults[key]
    }
    yield "Values of a run on a file that differ from the defaults of the keys below:"
    values["train_size"] += " (all rows)"
    text = ", ".join(f"{key}={value}" for key, value in values.items())
    yield textwrap.fill(text, help_width(), initial_indent=" " * 2, subsequent_indent=" " * 2)


def _key_lines() -> Iterator[str]:
    """Yields the --help lines about the config keys."""
    for group, keys in itertools.groupby(describe_keys(), lambda key: key.group):
        yield f"{group}:"
        for key in keys:
            yield f"  {key.name} = {key.default}"
            for text in (key.meaning, f"Allowed: {key.allowed}"):
                yield textwrap.fill(
                    text, help_width(), initial_indent=" " * 6, subsequent_indent=" " * 6
                )


def _recipe(name: str) -> ConfigDict:
    """Returns all keys, with the values set by a config file and otherwise the defaults."""
    # A path may contain colons too, as on Windows.
    ends = [len(name), *(i for i, letter in enumerate(name) if letter == ":")]
    end = next((i for i in ends if Path(name[:i]).is_file()), None)
    if end is None:
        raise UserError(f"config file {name.partition(':')[0]!r} does not exist")
    path, argument = name[:end], name[end + 1 :]
    try:
        get_config = runpy.run_path(path)["get_config"]
        chosen = dict(get_config(argument) if argument else get_config())
    except UserError:
        raise
    except Exception as error:  # the file can raise anything, and is reported in one line
        raise UserError(
            f"config file {path!r}: {type(error).__name__}: {one_line(error)}"
        ) from error
    return _with_defaults(chosen)


def _with_defaults(chosen: Mapping[str, Any]) -> ConfigDict:
    """Returns all keys, in types that flags can override, with the chosen values."""
    values = dataclasses.asdict(Config()) | convert_values(chosen)
    # Numbers or a name: text, so that a flag may replace one kind by the other.
    weights = values["loss_weights"]
    weights = weights if isinstance(weights, str) else ",".join(map(str, weights))
    return ConfigDict(values | {"epochs": str(values["epochs"]), "loss_weights": weights})


def _overridden(recipe: ConfigDict, arguments: Sequence[str]) -> Config:
    """Returns the config of a recipe, overridden by the --config.KEY=VALUE arguments."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    last: dict[str, str] = {}  # repeated flags of a tuple would be concatenated
    for argument in arguments[1:]:
        key = argument.lstrip("-").partition("=")[0]
        if not argument.startswith("-") or not key.startswith("config."):
            advice = _nearest_option(argument) or "write --config.KEY=VALUE"
            raise UserError(f"unknown argument {argument!r}: {advice}")
        check_choice("config key", key.removeprefix("config."), fields)
        last[key] = argument
    values = flags.FlagValues()
    line = [arguments[0], *last.values()]
    config_flags.DEFINE_config_dict("config", recipe, flag_values=values, sys_argv=line)
    try:
        values(line)
    except (flags.Error, ValueError, TypeError) as error:
        for key, argument in last.items():
            if str(error).startswith(f"flag --{key}="):
                check_type(fields[key.removeprefix("config.")], argument.partition("=")[2])
        raise UserError(one_line(error)) from error
    return from_mapping(values.config.to_dict())


def _nearest_option(argument: str) -> str | None:
    """Returns a question that names the option most like an argument; None if none is like it."""
    keys = [field.name for field in dataclasses.fields(Config)]
    known = {name: f"--config.{name}" for name in keys}  # also without its "config."
    known |= {name: f"--{name}" for name in (*_OPTIONS, *(f"config.{key}" for key in keys))}
    near = difflib.get_close_matches(argument.lstrip("-").partition("=")[0], known, n=1)
    return f"did you mean {known[near[0]]!r}?" if near else None


def main(argv: Sequence[str] = ()) -> int:
    """Runs the command; returns its exit status."""
    # Logs go to stdout; stderr has the progress bar, or the one line of an error.
    logging.basicConfig(
        format="%(message)s", level=logging.WARNING, handlers=[LogHandler()], force=True
    )
    logging.getLogger("sweet_jax").setLevel(logging.INFO)
    return run_command(lambda: _train(parse(argv or sys.argv)), RESUMES)


def _train(command: Command) -> int:
    # Imported here because they import JAX, which --help and invalid arguments do not need.
    from sweet_jax import distributed
    from sweet_jax.compilation_cache import enable_compilation_cache
    from sweet_jax.devices import check_devices
    from sweet_jax.pipeline import run

    enable_compilation_cache(least_seconds=1.0)
    distributed.initialize(*command.processes)
    check_devices()
    if not distributed.is_primary():
        logging.getLogger("sweet_jax").setLevel(logging.ERROR)
    try:
        with distributed.abort_together():
            run(command.config, command.workdir)
            if command.target is not None:
                with distributed.raise_on_all():  # the others wait here, not at their exit
                    _recommend(command.workdir, command.target)
    except distributed.PreemptedError as stop:
        print(f"{stop}; the same command resumes from there", file=sys.stderr)
        return 1
    return 0


def _recommend(workdir: Path, target: Mapping[str, float]) -> None:
    """Prints the recommended operating point of a finished run, in the primary process."""
    from sweet_jax.distributed import is_primary
    from sweet_jax.recommendation import recommend
    from sweet_jax.run_report import render_report

    if is_primary():
        print_text(recommend(workdir, target))
        render_report(workdir, target)  # now with times


if __name__ == "__main__":
    sys.exit(main())
