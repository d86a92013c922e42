"""Rewrites the report of a finished run, for a target, with the times measured since then.

  sweet-jax report runs/quickstart                  report.html, with the recommended threshold
  sweet-jax report runs/quickstart --cost=0.5       the best metric within half of the layers
  sweet-jax report runs/quickstart --milliseconds=5 by the times measured by predict --measure
  sweet-jax report runs/quickstart --png            also report.png, a picture of the first screen

The model is not run. The report quotes texts only if the data files are unchanged. The picture is
taken by Chromium if it is installed, and otherwise drawn by matplotlib. Exit status: 0 done, 2 the
input is wrong, 1 anything else.

"""

import argparse
import logging
import sys
from collections.abc import Sequence

from sweet_jax.arguments import ArgumentParser, parse_targets, run_command, target_descriptions
from sweet_jax.paths import expand_user
from sweet_jax.run_report import render_report

_TARGETS = ("cost", "accuracy", "error", "milliseconds")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    logging.basicConfig(format="warning: %(message)s")  # no effect if a caller configured logging
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.report", __doc__ or "")
    parser.add_argument("run", metavar="DIR", help="directory of a finished run")
    target = parser.add_mutually_exclusive_group()
    for name in _TARGETS:
        target.add_argument(f"--{name}", type=float, help=target_descriptions()[name])
    parser.add_argument("--png", action="store_true", help="also report.png, of the first screen")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> None:
    run = expand_user(options.run)
    render_report(run, parse_targets(options), picture=options.png)
    print(f"report: {run / 'report.html'}")
    if options.png:
        print(f"first screen: {run / 'report.png'}")


if __name__ == "__main__":
    sys.exit(main())
