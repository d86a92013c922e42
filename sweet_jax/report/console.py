"""Formats results.json for the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sweet_jax.objectives.objective import ShownMetric, name_without_sign
from sweet_jax.report.baselines import baseline_title


def format_number(value: float | None) -> str:
    """Returns a number with four decimals, or a dash for None and numbers that are not finite."""
    return "\N{EN DASH}" if value is None or not math.isfinite(value) else f"{value:.4f}"


def exit_table(results: Mapping[str, Any]) -> str:
    """Formats the table of exits that training prints.

    It lists the best replica's exits, the baselines, the threshold that keeps the full model's
    metric, and the mean over seeds.
    """
    replica = results["replicas"][results["best_replica"]]
    metric, mean = results["metric"], results["mean"]
    heading: list[str] = []
    rows = "tuning" if results["n"].get("tuning") else "calibration"
    if len(results["replicas"]) > 1:
        heading.append(
            f"best of {len(results['replicas'])} replicas by area on {rows} rows: seed "
            f"{replica['seed']}, learning rate {replica['learning_rate']:g}"
        )
    own = ShownMetric.of(metric)
    lines = exit_lines(replica["individual"], metric)
    lines += baseline_lines(results.get("baselines", {}), metric)
    keep = replica["full_score"]
    if keep is not None and replica.get("calibration_area", 0) is not None:  # else it diverged
        cost, value = keep["validation"]
        shown = keep.get("text", keep["threshold"])  # results of older versions have no text
        lines.append(
            f"threshold {shown}, the cheapest that kept full {own.name} on "
            f"{results['n']['calibration']} {fitted_rows(results)}: "
            f"{format_number(own.value(value))} at cost {cost:.3f} on "
            f"{results['n']['validation']} validation rows (last exit "
            f"{format_number(own.value(replica['individual'][-1]['score']))})"
        )
    if len(mean["seeds"]) > 1:
        pairs = zip(mean["individual"], results["ci95"]["individual"], strict=True)
        scores = ", ".join(
            f"{m['layer']}: {format_number(own.value(m['score']))} ± {format_number(c['score'])}"
            for m, c in pairs
        )
        lines.append(
            f"mean of {len(mean['seeds'])} seeds at learning rate {mean['learning_rate']:g}, with "
            f"95% intervals: {scores}"
        )
    return "\n".join(heading + lines)


def exit_lines(rows: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Formats the result of `individual_exits`, under a heading."""
    shown = ShownMetric.of(metric)
    note = [f"{shown.name}{shown.better}:"] if shown.better else []
    return note + _table("exit", [(str(row["layer"]), row) for row in rows], metric, ">")


def baseline_lines(rows: Mapping[str, Mapping[str, Any]], metric: str) -> list[str]:
    """Formats `baselines` of results.json, under a heading; no lines without baselines."""
    named = [(baseline_title(name), row) for name, row in rows.items()]
    return _table("baseline", named, metric, "<") if named else []


def _table(
    title: str, rows: Sequence[tuple[str, Mapping[str, Any]]], metric: str, align: str
) -> list[str]:
    width = max(5, len(title), *(len(name) for name, _ in rows))
    shown = ShownMetric.of(metric)
    wide = max(9, len(shown.name))
    ends_of = (shown.interval(row["interval"]) for _, row in rows)
    intervals = ["[{}, {}]".format(*map(format_number, pair)) for pair in ends_of]
    ends = max(16, *map(len, intervals))
    others = other_measures(rows[0][1], metric)
    lines = [
        f"{title:{align}{width}} {'cost':>6} {shown.name:>{wide}}  {'95% interval':<{ends}} "
        + f"{'n':>5}"
        + "".join(f"  {name}" for name in others)
    ]
    for (name, row), interval in zip(rows, intervals, strict=True):
        value = format_number(shown.value(row["score"]))
        lines.append(
            f"{name:{align}{width}} {row['cost']:>6.3f} {value:>{wide}}  "
            f"{interval:<{ends}} {row['n']:>5}"
            + "".join(f"  {format_number(row['measures'][o]):>{len(o)}}" for o in others)
        )
    return lines


def other_measures(row: Mapping[str, Any], metric: str) -> list[str]:
    """Returns the names of a row's `measures` except the metric's own; [] if there are none."""
    own = name_without_sign(metric)
    return [name for name in row.get("measures", {}) if name != own]


def fitted_rows(results: Mapping[str, Any]) -> str:
    """Returns the name of the rows that temperatures and thresholds were fitted on."""
    held_out = results["fitted_on"] == "held_out"
    return "calibration rows" if held_out else "validation rows (the preset's choice)"


def describe_divergence(row: Mapping[str, Any]) -> str:
    """Describes, in one line, an exit of a replica that collapsed or diverged."""
    since = "" if row["step"] is None else f", since step {row['step']}"
    who = (
        f"replica {row['replica']} (seed {row['seed']}, learning rate {row['learning_rate']:g}), "
        f"exit {row['exit']}"
    )
    problem, _, name = row["what"].partition(" to ")
    if problem == "collapsed":
        return f"collapsed: {who} predicts {name} for every row{since}"
    return f"diverged: {who}: {row['what']}{since}"
