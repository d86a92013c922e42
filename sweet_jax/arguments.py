"""The argument parser, --help texts and exit statuses that the commands share."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sweet_jax.config import UserError, check_choice
from sweet_jax.exits.policies import POLICIES
from sweet_jax.exits.targets import DEFAULT_LEVEL, TARGET_RANGES, check_targets
from sweet_jax.standard_output import escape_characters, flush_output, print_text
from sweet_jax.storage_errors import (
    access_failure,
    causes,
    discard_errors_at_exit,
    storage_failure,
)

# The targets that an operating point can be chosen by, and what --help says of each.
_TARGETS = {
    "cost": "largest mean cost, a share of the full model's layers",
    "accuracy": "smallest metric over all calibration rows, in the run's own metric; under PCEE "
    "the accuracy that calibration rows like an example had at the exit where it leaves",
    "error": "largest error over all calibration rows, where the run's metric is one: the mean "
    "absolute error of a regression, the Hamming loss of labels",
    "threshold": "leave at the first exit whose confidence is at least this",
    "risk": "largest share of examples that the last exit gets right and an earlier one wrong, "
    "which bounds the loss of accuracy; certified on calibration rows, or refused",
    "agreement": "smallest share of examples predicted as the last exit would; certified likewise",
}
_LATENCY = {
    "milliseconds": "largest mean time of one text by itself, of the median length, in the model "
    "alone (tokenizing, evaluating the policy and HTTP are not counted), by the times that "
    "predict --measure or sweet-jax train FILE kept on this machine",
}
_LEVEL = f"confidence of a certificate (default {DEFAULT_LEVEL:g})"


class ArgumentParser(argparse.ArgumentParser):
    """Parses the arguments of a module's command; a wrong one raises UserError."""

    def __init__(self, module: str, text: str):
        package, _, name = module.rpartition(".")
        super().__init__(
            prog=f"sweet-jax {name}" if package == "sweet_jax" else f"python -m {module}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def print_help(self, file: Any = None) -> None:
        """Prints the help, which may be longer than its reader wants, such as `| head`."""
        print_text(self.format_help())

    # The base class is typed by overloads, which differ in what the namespace is.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parses arguments; an unknown option is named before an option that is missing."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for argument in sys.argv[1:] if args is None else args:
            if argument.startswith("--") and argument != "--":
                check_choice("option", argument.partition("=")[0], known)
        return super().parse_args(args, namespace)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists all options)")

    def add_model_arguments(self, engines: Iterable[str] = ()) -> None:
        """Adds --model, the targets and, given the names of engines, the options of these."""
        self.add_argument("--model", required=True, help="folder model/ of a run, or a hub id")
        if names := list(engines):
            text = f"what runs the model: {' or '.join(names)} (default: the faster "
            text += (
                "one by the times of predict --measure, without them jax, where it is installed)"
            )
            self.add_argument("--engine", choices=names, help=text)
            text = "threads of the onnxruntime engine (default: all physical cores)"
            self.add_argument("--threads", type=int, help=text)
            text = "of the layers: float32 (default); bfloat16 with engine jax; int8 with "
            text += "onnxruntime, after sweet-jax quantize. --dtype is an older name of it"
            self.add_argument("--precision", "--dtype", help=text)
        self.add_target_arguments()

    def add_target_arguments(self, *, clock: bool = True) -> None:
        """Adds --policy, --level, and the targets, of which one may be set.

        Without `clock` there is no --milliseconds: times are known of a model, not of its outputs.
        """
        text = "name of an exit policy, or module:function, your own (default: the run's)"
        self.add_argument("--policy", help=text)
        target = self.add_mutually_exclusive_group()
        for name, text in (_TARGETS | (_LATENCY if clock else {})).items():
            target.add_argument(f"--{name}", type=float, help=text)
        self.add_argument("--level", type=float, help=_LEVEL)


def target_descriptions() -> dict[str, str]:
    """Returns what --help says of each target, by name in TARGET_RANGES."""
    return {**_TARGETS, **_LATENCY, "level": _LEVEL}


def parse_targets(options: argparse.Namespace) -> dict[str, float]:
    """Returns the target that was set and the level, by name.

    Raises UserError, see `check_targets`.
    """
    values = {name: getattr(options, name, None) for name in TARGET_RANGES}
    check_targets(values, "--")
    return {name: value for name, value in values.items() if value is not None}


def policy_help() -> str:
    """Returns a line of --help for each policy."""
    head = (
        "policies (an example leaves at the first exit whose confidence reaches the threshold):\n"
    )
    return head + "\n".join(f"  {name:<26}{rule.about}" for name, rule in POLICIES.items())


def run_command(run: Callable[[], int | None], resumes: str = "") -> int:
    """Runs a command; returns its exit status.

    That is its own, or 0; 2 after one line on stderr for input that will not do; 1 for a disk that
    takes no more writes or an interruption, after such a line, or where nobody reads its output any
    more.

    resumes: what is said of the same command, given again after a failure.
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
    except BrokenPipeError:  # the reader of stdout has seen enough
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
