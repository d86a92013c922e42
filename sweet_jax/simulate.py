"""Chooses an operating point from a run's saved outputs, without its model or an accelerator.

  sweet-jax simulate --run=runs/quickstart                  the table of exits
  sweet-jax simulate --run=runs/quickstart --cost=0.5       best metric within a mean cost
  sweet-jax simulate --run=runs/quickstart --accuracy=0.95  lowest cost with this metric
  sweet-jax simulate --run=runs/quickstart --threshold=0.9  cost and metric of a threshold
  sweet-jax simulate --run=runs/quickstart --risk=0.1       certified bound on the loss
  sweet-jax simulate --run=runs/quickstart --policy=pcee --accuracy=0.9
  sweet-jax simulate --run=runs/a --run=runs/b --output=compare.html

Thresholds are chosen on the calibration rows. Prints the cost and the metric on the calibration and
validation rows. If no threshold meets the target, prints the one that comes closest, with status 0
(predict, serve and export refuse such a target). Several --run are overlaid in one page. Exit
status: 0 done, 2 the input is wrong, 1 anything else.

"""

import argparse
import math
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

from sweet_jax.arguments import ArgumentParser, parse_targets, policy_help, run_command
from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import Analysis, load_analysis
from sweet_jax.exits.operating_point import OperatingPoint
from sweet_jax.exits.resolver import Resolution
from sweet_jax.exits.simulation import simulate
from sweet_jax.exits.targets import DEFAULT_LEVEL
from sweet_jax.exits.thresholds import format_threshold
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.paths import expand_user
from sweet_jax.report.console import exit_lines
from sweet_jax.report.results import individual_exits


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.simulate", f"{__doc__ or ''}{policy_help()}")
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="DIR",
        help="run directory; may be repeated",
    )
    parser.add_target_arguments(clock=False)
    parser.add_argument("--output", help="page that overlays several runs (default compare.html)")
    options = parser.parse_args(argv)
    parse_targets(options)
    if options.output and len(options.run) < 2:
        raise UserError(
            "--output applies only to several runs, which its page overlays: pass --run at least "
            "twice, or remove --output"
        )
    return options


def _run(options: argparse.Namespace) -> None:
    runs = [(name, load_analysis(expand_user(name), options.policy)) for name in options.run]
    metrics = {name: analysis.validation.identity.metric for name, analysis in runs}
    if len(set(metrics.values())) > 1:
        each = ", ".join(f"{metric} of {name}" for name, metric in metrics.items())
        raise UserError(
            f"one page cannot show curves of different metrics ({each}): pass --run only once"
        )
    if len(runs) > 1:
        _write_page(Path(options.output or "compare.html"), runs)
    for name, analysis in runs:
        if len(runs) > 1:
            print(f"{name}:")
        for line in _answers(analysis, options):
            print(line)


def _write_page(path: Path, runs: Sequence[tuple[str, Analysis]]) -> None:
    """Writes the page that overlays several runs. Raises UserError if it cannot be written."""
    from sweet_jax.report.comparison import (  # imports scikit-learn
        check_replaceable,
        other_rows,
        write_comparison,
    )

    try:
        check_replaceable(path)
        write_comparison(path, runs)
    except OSError as error:
        raise UserError(
            f"--output {str(path)!r} cannot be written ({error.strerror}): choose another file"
        ) from error
    print(f"curves: {path}")
    (first, own), *others = runs
    for name, analysis in others:
        if different := other_rows(own, analysis):
            print(
                f"warning: {first} and {name} have different validation rows ({different}): their "
                "curves cannot be compared, and no difference is shown",
                file=sys.stderr,
            )


def _answers(analysis: Analysis, options: argparse.Namespace) -> list[str]:
    """Returns the lines to print for one run."""
    replicas = [r for r in analysis.chosen if math.isfinite(analysis.area[r])]
    if not replicas:
        raise UserError("every replica of this run diverged: there is nothing to choose from")
    targets, metric = parse_targets(options), analysis.validation.identity.metric
    shown = ShownMetric.of(metric)
    lines: list[str] = []
    reached: list[tuple[float, float]] = []
    for r in replicas:
        who = f"seed {analysis.replicas[r][0]}: " if len(replicas) > 1 else ""
        if not targets:
            lines += [who + "each exit alone"] if who else []
            lines += exit_lines(individual_exits(analysis.validation, r), metric)
            who += f"full {shown.name} is kept at "
        point = analysis.operating_point(r, targets)
        lines.append(who + _describe(analysis, r, point, targets))
        if point.certificate is None and point.validation is not None:
            reached.append(point.validation)
    if len(reached) > 1:
        cost, value = (sum(values) / len(reached) for values in zip(*reached, strict=True))
        lines.append(
            f"mean of {len(reached)} seeds on validation rows: "
            f"cost {cost:.4f}, {shown.describe(value)}"
        )
    return lines


def _describe(
    analysis: Analysis, replica: int, point: OperatingPoint, targets: Mapping[str, float]
) -> str:
    """Describes an operating point; if there is none, the one that comes closest to the target."""
    metric = analysis.validation.identity.metric
    if point.certificate is not None:
        return _describe_certificate(analysis, replica, point, targets)
    if point.threshold is None:
        name = "cost" if "cost" in targets else metric
        asked, reachable = targets.get("cost", targets.get("accuracy", math.nan)), point.reachable
        if "error" in targets:
            name, asked, reachable = "error", targets["error"], -reachable
        line = (
            f"{name} {asked:g} cannot be met: the best on the calibration rows is {name} "
            f"{reachable:.4f}"
        )
        if math.isnan(reachable):
            return "no threshold has a metric on the calibration rows"
        closest = _closest_point(analysis, replica, point, targets)
        return f"{line}, at {_describe_point(analysis, replica, closest)}"
    line = _describe_point(analysis, replica, point)
    if "error" in targets or ("accuracy" in targets and analysis.validation.metric.is_share):
        assert point.validation is not None
        line += _describe_gap(point, point.validation[1], targets)
    return line


def _closest_point(
    analysis: Analysis, replica: int, point: OperatingPoint, targets: Mapping[str, float]
) -> OperatingPoint:
    """Returns the operating point of the best value that can be reached, or certified.

    point: the result for a target that cannot be met, which has no threshold.
    """
    resolver = analysis.resolver(replica)
    (target,) = targets.keys() - {"level"}
    target = "accuracy" if target == "error" else target
    table = resolver.table(analysis.policy, target, targets.get("level", DEFAULT_LEVEL))
    at = table.choose(float(table.value[0]))
    calibrator = resolver.calibrator if point.certificate is None else resolver.half_calibrator
    assert at is not None
    assert calibrator is not None, "a certificate has one"
    best = Resolution(float(table.threshold[at]), calibrator, certificate=point.certificate)
    return analysis.evaluate(replica, best)


def _describe_point(analysis: Analysis, replica: int, point: OperatingPoint) -> str:
    """Describes a threshold without a certificate: its cost and metric on both sets of rows."""
    assert point.threshold is not None
    assert point.calibration is not None
    assert point.validation is not None
    metric = ShownMetric.of(analysis.validation.identity.metric)
    parts = [
        f"cost {cost:.4f}, {metric.describe(value)} on {outputs.labels.shape[1]} {name} rows"
        for name, (cost, value), outputs in (
            ("calibration", point.calibration, analysis.calibration),
            ("validation", point.validation, analysis.validation),
        )
    ]
    shown = format_threshold(point.threshold, analysis.breakpoints(replica))
    return f"threshold {shown}: " + "; ".join(parts)


def _describe_difference(difference: float) -> str:
    """Returns, for example, "0.0500 above"; "at" if all of the digits shown are zero."""
    digits = f"{abs(difference):.4f}"
    return "at" if float(digits) == 0 else f"{digits} {'above' if difference > 0 else 'below'}"


def _describe_gap(point: OperatingPoint, found: float, targets: Mapping[str, float]) -> str:
    """Describes how far the validation rows are from a requested accuracy or error.

    found: the metric on the validation rows; for an error, its negative.
    """
    if "error" in targets:
        found, reachable, asked, most = -found, -point.reachable, targets["error"], "least"
        missed = reachable > asked
    else:
        reachable, asked, most = point.reachable, targets["accuracy"], "most"
        missed = reachable < asked
    text = f"; {_describe_difference(found - asked)} the target"
    if missed:
        text += f" (out of reach: the calibration rows reach at {most} {reachable:.4f})"
    return text


def _describe_certificate(
    analysis: Analysis, replica: int, point: OperatingPoint, targets: Mapping[str, float]
) -> str:
    """Describes what a certificate guarantees, or the best value that can be certified."""
    tested, metric = point.certificate, ShownMetric.of(analysis.validation.identity.metric)
    assert tested is not None
    risk = tested.kind == "risk"
    what = "answered differently from the last exit"
    if risk:
        what = "right at the last exit, wrong earlier"
    seen = f"{tested.harmed} of {tested.rows} calibration rows {what}"
    sure = f"confidence {tested.level:g}"
    if analysis.compared > 1:
        sure += f", corrected for {analysis.compared} models compared on these rows"
    feasible = point.validation is not None
    chosen = point if feasible else _closest_point(analysis, replica, point, targets)
    assert chosen.threshold is not None
    assert chosen.validation is not None
    fitted = analysis.resolver(replica).half_calibrator
    shown = format_threshold(chosen.threshold, analysis.breakpoints(replica, fitted))
    threshold = f"threshold {shown}, for confidences fitted on half of the calibration rows"
    cost, value = chosen.validation
    reached = (
        f"cost {cost:.4f}, {metric.describe(value)} on {analysis.validation.labels.shape[1]} "
        "validation rows"
    )
    if not feasible:
        return (
            f"{tested.kind} {targets[tested.kind]:g} cannot be certified: the best is "
            f"{tested.kind} {point.reachable:.4f} with {sure} ({seen}); at {threshold}: {reached}"
        )
    return f"{threshold}: at most {tested.bound:.4f} {what}, with {sure} ({seen}); {reached}"


class _Module(types.ModuleType):
    """Makes this module callable, since importing it hides the function `sweet_jax.simulate`."""

    __call__ = staticmethod(simulate)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _Module
