"""Answers what a dial costs, from a run's saved outputs alone: no model, no accelerator.

  python -m sweet_jax.simulate --run=runs/quickstart                  the table of exits
  python -m sweet_jax.simulate --run=runs/quickstart --cost=0.5       best score within a mean cost
  python -m sweet_jax.simulate --run=runs/quickstart --accuracy=0.95  cheapest with such a score
  python -m sweet_jax.simulate --run=runs/quickstart --threshold=0.9  what a threshold does
  python -m sweet_jax.simulate --run=runs/quickstart --risk=0.02      a loss that is certified
  python -m sweet_jax.simulate --run=runs/quickstart --policy=pcee --accuracy=0.9
  python -m sweet_jax.simulate --run=runs/a --run=runs/b --output=compare.html

Thresholds are chosen on the calibration rows; what they give there and on the validation rows is
printed; where no threshold will do, the best that is reachable. Several --run are overlaid in one
page. Exit status: 0 done, 2 the input is wrong, 1 anything else.

"""

import argparse
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path

from sweet_jax.arguments import ArgumentParser, parse_targets, policy_help, run_command
from sweet_jax.config import UserError
from sweet_jax.exits.analysis import (
    Analysis,
    OperatingPoint,
    analyse,
    certify_operating_point,
    cheapest_full_score,
    evaluate_threshold,
    select_operating_point,
)
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.simulation import simulate
from sweet_jax.files import expand_user
from sweet_jax.report.console import exit_lines
from sweet_jax.report.results import individual_exits


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.simulate", f"{__doc__}{policy_help()}")
    parser.add_argument(
        "--run", action="append", required=True, metavar="DIR", help="run directory; may repeat"
    )
    parser.add_target_arguments(clock=False)
    parser.add_argument("--output", help="page that overlays several runs (default compare.html)")
    options = parser.parse_args(argv)
    parse_targets(options)
    if options.output and len(options.run) < 2:
        raise UserError("--output is the page that overlays several runs: give --run twice or more")
    return options


def _run(options: argparse.Namespace) -> None:
    runs = [(name, load(expand_user(name), options.policy)) for name in options.run]
    for name, analysis in runs:
        if len(runs) > 1:
            print(f"{name}:")
        for line in _answers(analysis, options):
            print(line)
    if len(runs) > 1:
        from sweet_jax.report.page import write_comparison  # plotting takes a second to import

        path = Path(options.output or "compare.html")
        try:
            write_comparison(path, [(n, a.validation.identity, a) for n, a in runs])
        except OSError as error:
            raise UserError(f"--output {str(path)!r}: {error.strerror}") from error
        print(f"curves: {path}")


def load(run: Path, policy: str | None = None) -> Analysis:
    """The analysis of a run directory. Raises UserError when its outputs are absent or damaged."""
    folder = run / "exit_outputs"
    if not (folder / "validation.npz").exists():
        raise UserError(f"{str(run)!r} is not a finished run: there is no {folder}/validation.npz")
    calibration, validation = (
        ExitOutputs.load(folder / f"{split}.npz") for split in ("calibration", "validation")
    )
    tuning = folder / "tuning.npz"
    chosen_on = ExitOutputs.load(tuning) if tuning.exists() else None
    return analyse(calibration, validation, policy, chosen_on)


def _answers(analysis: Analysis, options: argparse.Namespace) -> list[str]:
    replicas = [r for r in analysis.chosen if math.isfinite(analysis.area[r])]
    if not replicas:
        raise UserError("every replica of this run diverged: there is nothing to choose from")
    metric = analysis.validation.identity.get("metric", "accuracy")
    lines: list[str] = []
    reached: list[tuple[float, float]] = []
    for r in replicas:
        who = f"seed {analysis.replicas[r][0]}: " if len(replicas) > 1 else ""
        if set(parse_targets(options)) == {"level"}:
            lines += [who + "each exit alone"] if who else []
            lines += exit_lines(individual_exits(analysis.validation, r), metric)
            who += f"full {metric} is kept at "
        line, choice = _answer(analysis, r, options, metric)
        lines.append(who + line)
        reached += [choice.validation] if choice else []
    if len(reached) > 1:
        cost, score = (sum(values) / len(reached) for values in zip(*reached, strict=True))
        lines.append(
            f"mean of {len(reached)} seeds on validation rows: "
            f"cost {cost:.4f}, {metric} {score:.4f}"
        )
    return lines


def _answer(
    analysis: Analysis, replica: int, options: argparse.Namespace, metric: str
) -> tuple[str, OperatingPoint | None]:
    """What the dial does, and the choice if there is one."""
    if options.risk is not None or options.agreement is not None:
        return _certified(analysis, replica, options, metric), None
    if options.threshold is not None:
        found: OperatingPoint | float = evaluate_threshold(analysis, replica, options.threshold)
    elif options.cost is not None or options.accuracy is not None:
        found = select_operating_point(analysis, replica, cost=options.cost, score=options.accuracy)
    else:
        found = cheapest_full_score(analysis, replica)
    if not isinstance(found, OperatingPoint):
        return _infeasible(found, options, metric), None
    line = _describe(analysis, found, metric)
    if options.accuracy is not None and metric == "accuracy":
        line += _control(analysis, replica, found, options.accuracy)
    return line, found


def _describe(analysis: Analysis, found: OperatingPoint, metric: str) -> str:
    sets = zip(
        ("calibration", "validation"),
        (found.calibration, found.validation),
        (analysis.calibration, analysis.validation),
        strict=True,
    )
    parts = [
        f"cost {cost:.4f}, {metric} {score:.4f} on {outputs.labels.shape[1]} {name} rows"
        for name, (cost, score), outputs in sets
    ]
    return f"threshold {found.threshold!r}: " + "; ".join(parts)


def _control(analysis: Analysis, replica: int, found: OperatingPoint, asked: float) -> str:
    """How far the validation rows are from an accuracy asked for."""
    gap = found.validation[1] - asked
    text = f"; {abs(gap):.4f} {'above' if gap >= 0 else 'below'} what was asked for"
    best = float(analysis.calibration_curve.score[replica].max())
    if best < asked:
        text += f" (out of reach: the calibration rows reach {best:.4f} at most)"
    return text


def _certified(analysis: Analysis, replica: int, options: argparse.Namespace, metric: str) -> str:
    """What a certificate promises, or the best that could be promised."""
    kind = "risk" if options.risk is not None else "agreement"
    limit = options.risk if kind == "risk" else 1 - options.agreement
    found = certify_operating_point(analysis, replica, kind, limit, options.level)
    tested = found.certificate
    what = "lost against the last exit" if kind == "risk" else "answered otherwise than by it"
    seen = f"{tested.harmed} of {tested.rows} calibration rows {what}"
    if found.validation is None:
        asked, best = (limit, tested.bound) if kind == "risk" else (1 - limit, 1 - tested.bound)
        return (
            f"infeasible: the best certified is {kind} {best:.4f} with confidence "
            f"{options.level:g} ({seen}); asked for {asked:g}"
        )
    cost, score = found.validation
    return (
        f"threshold {tested.threshold!r} of scores that half of the rows fitted: at most "
        f"{tested.bound:.4f} {what} with confidence {options.level:g} ({seen}); cost {cost:.4f}, "
        f"{metric} {score:.4f} on {analysis.validation.labels.shape[1]} validation rows"
    )


def _infeasible(best: float, options: argparse.Namespace, metric: str) -> str:
    name, asked = ("cost", options.cost) if options.cost is not None else (metric, options.accuracy)
    return (
        f"infeasible: the best reachable is {name} {best:.4f} on the calibration rows "
        f"(asked for {asked:g})"
    )


class _Module(types.ModuleType):
    """Importing this module puts it where `from sweet_jax import simulate` finds the function."""

    __call__ = staticmethod(simulate)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _Module
