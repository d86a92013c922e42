"""Parsing of targets, and exit statuses, of the commands beside `main`."""

import argparse
import sys
from collections.abc import Callable

from sweet_jax.config import UserError
from sweet_jax.exits.policies import POLICIES
from sweet_jax.exits.targets import TARGET_RANGES, check_targets

# The targets, and what --help says of each.
_TARGETS = {
    "cost": "largest mean cost, as a share of the full model's layers",
    "accuracy": "smallest metric over all calibration rows, in the run's own metric; under PCEE "
    "the accuracy that calibration rows like an example must have had where it leaves",
    "threshold": "leave at the first exit confidence of at least this",
    "risk": "largest share of examples that the last exit gets right and an earlier one wrong, "
    "and so the largest loss of accuracy; certified on calibration rows, or refused",
    "agreement": "smallest share of examples answered as the last exit would; also certified",
}
_LATENCY_TARGETS = {
    "milliseconds": "largest mean time of a text that arrives alone, in the stages only: "
    "tokenising and reading the confidences come on top; after predict --measure",
}


class ArgumentParser(argparse.ArgumentParser):
    """Raises its errors as UserError, in one line."""

    def __init__(self, module: str, text: str):
        super().__init__(
            prog=f"python -m {module}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def add_target_arguments(self, *, clock: bool = True) -> None:
        """Adds --policy, the targets of which one may be set, and --level.

        clock: whether a time may be a target; it is known of a model, not of its outputs.
        """
        self.add_argument("--policy", help="name of an exit policy; default the run's own")
        group = self.add_mutually_exclusive_group()
        for name, text in (_TARGETS | (_LATENCY_TARGETS if clock else {})).items():
            group.add_argument(f"--{name}", type=float, help=text)
        self.add_argument(
            "--level",
            type=float,
            default=0.95,
            help="confidence level of a certificate (default 0.95)",
        )


def parse_targets(options: argparse.Namespace) -> dict[str, float]:
    """Returns the target that was set, and the level, by name. Raises UserError out of range."""
    values = {name: getattr(options, name, None) for name in TARGET_RANGES}
    check_targets(values, "--")
    return {name: value for name, value in values.items() if value is not None}


def policy_help() -> str:
    """Returns a line of --help for each policy."""
    head = (
        "policies (an example leaves at the first exit whose confidence reaches the threshold):\n"
    )
    return head + "\n".join(f"  {name:<26}{rule.about}" for name, rule in POLICIES.items())


def run_command(run: Callable[[], None]) -> int:
    """Calls `run` and returns its exit status: 0, or 2 after one line on stderr."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
