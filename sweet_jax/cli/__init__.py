"""The `sweet-jax` command, whose subcommands can also be run with `python -m`.

Imports are in functions, so that `main` also reports an interruption during them in one line.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from sweet_jax import __version__

# Subcommand → (module with its main, its description).
COMMANDS = {
    "train": ("sweet_jax.main", "trains on a labeled file or a config, evaluates and reports"),
    "report": ("sweet_jax.report_command", "rewrites a run's report, for a target, or as a PNG"),
    "simulate": ("sweet_jax.simulate", "chooses operating points from a run's saved outputs"),
    "predict": ("sweet_jax.predict", "classifies the texts of a file, or times a model's stages"),
    "serve": ("sweet_jax.serve", "serves a model over HTTP"),
    "quantize": ("sweet_jax.quantize", "fits a model's thresholds for int8"),
    "export": ("sweet_jax.export", "writes a model as StableHLO programs or ONNX graphs"),
    "recalibrate": (
        "sweet_jax.recalibrate",
        "refits a model's thresholds on labeled rows or an audit log",
    ),
    "version": ("", "prints the version"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status, which is 2 if there is no such subcommand."""
    try:
        from sweet_jax.arguments import run_command  # imports NumPy, which takes half a second
    except (Exception, KeyboardInterrupt) as error:  # NumPy turns an interruption into ImportError
        from sweet_jax.storage_errors import causes

        if not any(isinstance(each, KeyboardInterrupt) for each in causes(error)):
            raise
        print("interrupted", file=sys.stderr)  # as `run_command` does from then on
        return 1
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    return run_command(lambda: _run(name, rest))


def _run(name: str, rest: Sequence[str]) -> int:
    from sweet_jax.errors import UserError, check_choice, missing_package
    from sweet_jax.standard_output import print_text

    if name in ("-h", "--help"):
        print_text(_help())
        return 0
    if name in ("version", "--version"):
        print_text(__version__)
        return 0
    try:
        check_choice("command", name, COMMANDS)
    except UserError as error:
        raise UserError(f"{error} (sweet-jax --help lists them)") from error
    try:
        module = import_module(COMMANDS[name][0])  # not before: most of these modules import JAX
    except ModuleNotFoundError as error:  # with the extra "runtime" alone
        package = missing_package(error)
        raise UserError(
            f"sweet-jax {name} needs the package {package}: pip install {package}"
        ) from error
    # absl takes the program's name as the first argument, argparse does not.
    status: int = module.main([f"sweet-jax {name}", *rest] if name == "train" else rest)
    return status


def _help() -> str:
    lines = [f"  {name:<13}{about}" for name, (_, about) in COMMANDS.items()]
    head = "usage: sweet-jax COMMAND [OPTION ...]\n\nFine-tunes encoders that can exit early."
    return "\n".join([head, "", *lines, "", "sweet-jax COMMAND --help explains its options."])
