"""The argument parser, --help texts and exit statuses shared by the commands."""

import argparse
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from sweet_jax.errors import UserError, check_choice
from sweet_jax.exits.policies import POLICIES
from sweet_jax.exits.targets import DEFAULT_LEVEL, TARGET_RANGES, check_targets
from sweet_jax.help_text import wrap_help
from sweet_jax.registry import Registry
from sweet_jax.standard_output import escape_characters, flush_output, print_text
from sweet_jax.storage_errors import (
    access_failure,
    causes,
    discard_errors_at_exit,
    storage_failure,
)

# The targets by which an operating point can be chosen, with the --help text of each.
_TARGETS = {
    "cost": "maximum mean cost, as a fraction of the full model's layers",
    "accuracy": "minimum metric over all calibration rows, in the run's own metric; with PCEE, the "
    "minimum accuracy that similar calibration rows had at the exit where an example leaves",
    "error": "maximum error over all calibration rows, if the run's metric is an error: the mean "
    "absolute error (regression) or the Hamming loss (multi-label)",
    "threshold": "leave at the first exit whose confidence is at least this value",
    "risk": "maximum fraction of examples that the last exit classifies correctly and an earlier "
    "exit does not, which bounds the loss of accuracy; certified on calibration rows, or refused",
    "agreement": "minimum fraction of examples predicted as the last exit would; certified "
    "likewise",
}
_LATENCY = {
    "milliseconds": "maximum mean time of a single text of the median length in the model alone "
    "(without tokenization, the exit policy and HTTP), according to the times that predict "
    "--measure or sweet-jax train FILE recorded on this machine",
}
_LEVEL = f"confidence level of a certificate (default {DEFAULT_LEVEL:g})"


class ArgumentParser(argparse.ArgumentParser):
    """Parses the arguments of a module's command; raises UserError for invalid ones."""

    def __init__(self, module: str, text: str):
        package, _, name = module.rpartition(".")
        super().__init__(
            prog=f"sweet-jax {name}" if package == "sweet_jax" else f"python -m {module}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def print_help(self, file: Any = None) -> None:
        """Prints the help; a reader that stops early, such as `| head`, is not an error."""
        print_text(wrap_help(self.format_help()))

    # The overloads of the base class differ in the type of the namespace.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parses arguments; reports an unknown or empty option before a missing one."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        known.remove("--help")  # which is no option that another name may have meant
        previous = ""
        for argument in sys.argv[1:] if args is None else args:
            name, equals, value = argument.partition("=")
            if name.startswith("--") and argument not in ("--", "--help"):
                check_choice("option", name, known)
                if equals and not value:
                    raise _empty(name)
            if not argument:
                raise _empty(previous if previous.startswith("--") else "an argument")
            previous = argument
        return super().parse_args(args, namespace)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists all options)")

    def add_model_arguments(self, engines: Registry[Any] | None = None) -> None:
        """Adds --model and the targets; with `engines`, also --engine, --threads, --precision.

        engines: table whose entries have `precisions`.
        """
        self.add_argument(
            "--model",
            required=True,
            help="model/ folder of a run, or a hub id, from a source that you trust",
        )
        if engines is not None:
            names = list(engines)
            text = f"engine that runs the model: {' or '.join(names)}, the name of one that an "
            text += "installed package adds, or module:OBJECT (default: the fastest one according "
            text += f"to predict --measure; without measurements {names[0]}, if it is installed)"
            self.add_argument("--engine", choices=_Names(engines), metavar="ENGINE", help=text)
            text = "number of threads of an engine with this option, such as onnxruntime (default: "
            self.add_argument("--threads", type=int, help=f"{text}all physical cores)")
            text = "precision of the layers, if the engine has it: float32 (default); bfloat16; "
            text += "int8, after sweet-jax quantize ("
            each = (f"{name}: {' or '.join(engines[name].precisions)}" for name in names)
            text += f"{'; '.join(each)}). --dtype is its former name"
            self.add_argument("--precision", "--dtype", help=text)
        self.add_target_arguments()

    def add_target_arguments(self, *, clock: bool = True) -> None:
        """Adds --policy, --level, and the targets, of which at most one may be set.

        clock: whether to add --milliseconds, which needs the measured times of a model and not
          only its outputs.
        """
        text = "name of an exit policy, or module:OBJECT for your own (default: the run's)"
        self.add_argument("--policy", help=text)
        target = self.add_mutually_exclusive_group()
        for name, text in (_TARGETS | (_LATENCY if clock else {})).items():
            target.add_argument(f"--{name}", type=float, help=text)
        self.add_argument("--level", type=float, help=_LEVEL)


def _empty(name: str) -> UserError:
    """Returns the error of an empty value, as that of a shell variable that is not set."""
    return UserError(f"{name} is empty: set a value, or remove it")


class _Names(Container[str]):
    """Contains the names of a table, including those of other packages and modules.

    Iterates only over those that need no import, which messages list.
    """

    def __init__(self, table: Registry[Any]):
        self._table = table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __contains__(self, name: object) -> bool:
        """Raises UserError for a reference that cannot be imported."""
        if ":" in str(name):
            return bool(self._table[str(name)])
        return name in self._table


def target_descriptions() -> dict[str, str]:
    """Returns the --help text of each target and of the level, by name in TARGET_RANGES."""
    return {**_TARGETS, **_LATENCY, "level": _LEVEL}


def parse_targets(options: argparse.Namespace) -> dict[str, float]:
    """Returns the target and the level that were set, by name.

    Raises UserError, see `check_targets`.
    """
    values = {name: getattr(options, name, None) for name in TARGET_RANGES}
    check_targets(values, "--")
    return {name: value for name, value in values.items() if value is not None}


def policy_help() -> str:
    """Returns the --help text that lists the policies, one per line."""
    head = (
        "policies (an example leaves at the first exit whose confidence reaches the threshold):\n"
    )
    return head + "\n".join(f"  {name:<26}{rule.about}" for name, rule in POLICIES.items())


def run_command(run: Callable[[], int | None], resumes: str = "") -> int:
    """Runs a command; returns its exit status.

    The status is the command's own, or 0 if it returns none. It is 2, after one line on stderr, for
    invalid input or a file that may not be accessed; 1, after such a line, for a failure to write
    to the disk or an interruption; and 1 if the reader of stdout has closed it.

    resumes: text for the messages of failures and interruptions about running the command again.
    """
    escape_characters()
    then = f"; {resumes}" if resumes else ""
    try:
        status = run() or 0
        print(end="", flush=True)
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of stdout has closed it
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if any(isinstance(each, KeyboardInterrupt) for each in causes(error)):
            print(f"interrupted{then}", file=sys.stderr)
            return 1
        denied, failure = access_failure(error), storage_failure(error)
        if denied is None and failure is None:
            raise
        print(f"error: {failure or denied}{then if failure else ''}", file=sys.stderr)
        discard_errors_at_exit()
        return 1 if failure else 2
    finally:
        flush_output()
