"""Writes the report of a finished run anew, for a target, with the times measured since.

  sweet-jax report runs/quickstart                  report.html, with the recommended threshold
  sweet-jax report runs/quickstart --cost=0.5       the best metric within half of the layers
  sweet-jax report runs/quickstart --milliseconds=5 by the times that predict --measure found
  sweet-jax report runs/quickstart --png            report.png too: a picture of the first screen

Nothing is computed by the model. The report quotes texts only if the data files are unchanged. The
picture is taken by Chromium where there is one, and drawn by matplotlib elsewhere. Exit status: 0
done, 2 the input is wrong, 1 anything else.

"""

import argparse
import logging
import sys
from collections.abc import Sequence

from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.exits.targets import check_targets
from sweet_jax.files import expand_user
from sweet_jax.run_report import render_report

_TARGETS = {
    "cost": "largest mean cost, a share of the full model's layers",
    "accuracy": "smallest metric on calibration rows",
    "error": "largest error on calibration rows, where the run's metric is one",
    "milliseconds": "largest mean time of one text by itself, in the model alone, by the times "
    "that predict --measure or train FILE kept on this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    logging.basicConfig(format="warning: %(message)s")  # unless a caller has a format of its own
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.report", __doc__ or "")
    parser.add_argument("run", metavar="DIR", help="directory of a finished run")
    target = parser.add_mutually_exclusive_group()
    for name, text in _TARGETS.items():
        target.add_argument(f"--{name}", type=float, help=text)
    parser.add_argument("--png", action="store_true", help="also report.png, of the first screen")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> None:
    values = {name: getattr(options, name) for name in _TARGETS}
    check_targets(values, "--")
    run, target = expand_user(options.run), {k: v for k, v in values.items() if v is not None}
    render_report(run, target, picture=options.png)
    print(f"report: {run / 'report.html'}")
    if options.png:
        print(f"first screen: {run / 'report.png'}")


if __name__ == "__main__":
    sys.exit(main())
