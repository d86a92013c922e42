"""What the commands beside `main` have in common: how they are parsed, and how they end."""

import argparse
import sys
from collections.abc import Callable

from sweet_jax.config import UserError
from sweet_jax.exits.operating_point import TARGET_RANGES, check_targets
from sweet_jax.exits.policies import POLICIES

# A dial, and what it says in --help.
_DIALS = {
    "cost": "largest mean cost, share of the full layers",
    "accuracy": "least score over all calibration rows, in the run's own metric; under PCEE the "
    "accuracy that calibration rows like an example must have had where it leaves",
    "threshold": "leave at the first score of at least this",
    "risk": "largest share of examples that the last exit gets right and an earlier one wrong, "
    "and so the largest loss of accuracy; certified on calibration rows, or refused",
    "agreement": "least share of examples answered as the last exit would; certified likewise",
}
_CLOCK = {
    "milliseconds": "largest mean time of a text that comes by itself, in the stages alone: "
    "tokenising and looking at the scores come on top; after predict --measure",
}


class ArgumentParser(argparse.ArgumentParser):
    """Whose errors are the user's, in one line."""

    def __init__(self, module: str, text: str):
        super().__init__(
            prog=f"python -m {module}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise UserError(f"{message} (--help tells more)")

    def add_target_arguments(self, *, clock: bool = True) -> None:
        """Adds --policy, the dials of which one may be set, and --level.

        Without `clock`, none of time: that is known of a model, not of its outputs.
        """
        self.add_argument(
            "--policy", help="name of an exit policy; default the one the run was made with"
        )
        dial = self.add_mutually_exclusive_group()
        for name, text in (_DIALS | (_CLOCK if clock else {})).items():
            dial.add_argument(f"--{name}", type=float, help=text)
        self.add_argument(
            "--level", type=float, default=0.95, help="confidence of a certificate (default 0.95)"
        )


def parse_targets(options: argparse.Namespace) -> dict[str, float]:
    """The dial that was set, and the level, by name. Raises UserError for one out of range."""
    values = {name: getattr(options, name, None) for name in TARGET_RANGES}
    check_targets(values, "--")
    return {name: value for name, value in values.items() if value is not None}


def policy_help() -> str:
    """A line of --help for each policy."""
    head = "policies (an example leaves at the first exit whose score reaches the threshold):\n"
    return head + "\n".join(f"  {name:<26}{rule.about}" for name, rule in POLICIES.items())


def run_command(run: Callable[[], None]) -> int:
    """The exit status of a command that does `run`: 0, or 2 after one line on stderr."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
