"""Figures 4 to 6 and 10 of the SWEET paper: speed-accuracy curves of the methods, and their mean.

  python -m experiments.curves --model=minilm-l6 --data_dir=DIR

The figure is drawn as the paper's are: scores at its costs by linear interpolation between 11
thresholds, mean and 95% interval over seeds. What each method is ahead at the same cost is read
from the exact curve instead, at the costs that all methods can spend: between two of 11 thresholds
the cost may leap (where the first exits answer one class only, from 0.17 to 0.7), and a straight
line across says nothing of what lies between. The last panel is the mean over the tasks that have
all the methods shown, as the paper's figures 4 and 5 are of its seven. Cost: that of
experiments.individual, whose cells it runs where they are missing, else seconds. Expected, from the
paper: SWEET above both others at low costs, about level with Early-Exit at high ones.

Shape letters: S seed, K cost.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import paper
from experiments.comparison import (
    PAIRED,
    Record,
    Records,
    chosen_runs,
    common_seeds,
    differences,
    format_interval,
    scores_at,
)
from experiments.options import chosen_tasks, config_values, method_cells
from experiments.records import exact_costs
from experiments.rendering import Section, add_legend, subplots
from experiments.runner import Script, main
from sweet_jax.exits.metrics import mean_interval

COLOURS = {"multi_model": "#e8833a", "early_exit": "#440154", "sweet": "#21918c"}
Curve = tuple[np.ndarray, np.ndarray]  # costs [K] and scores in per cent [S, K]


def curve_at_costs(record: Record) -> Curve:
    """Returns costs [K] that all seeds reach, and the scores there in per cent, [S, K].

    Read from the paper's 11 thresholds: for its figure.
    """
    runs = chosen_runs(record)
    keys = [k for k in runs[0].grid if all(k in r.grid for r in runs)]
    scores = [[100 * r.grid[k] for k in keys] for r in runs]
    return np.asarray([float(k) for k in keys]), np.asarray(scores)


def mean_curve(records: Sequence[Record], seeds: Sequence[int]) -> Curve:
    """Returns what `at_costs` does of the mean over tasks of some seeds, seed by seed.

    At the costs [K] that all these seeds of all tasks reach.
    """
    every = []
    for record in records:
        runs = tuple(run for run in record.runs if run.seed in seeds)
        x, scores = curve_at_costs(dataclasses.replace(record, runs=runs))
        every.append(dict(zip(x.tolist(), scores.T, strict=True)))
    costs = [cost for cost in every[0] if all(cost in one for one in every)]
    mean = [np.mean([one[cost] for one in every], axis=0) for cost in costs]
    return np.asarray(costs), np.reshape(mean, (len(costs), len(seeds))).T  # [S, K]


def draw_curves(axis: Any, curves: Mapping[str, Curve], title: str, label: str) -> None:
    """Draws the curves of methods into one panel: mean and 95% interval over seeds."""
    for method, (x, scores) in curves.items():
        mean, half = mean_interval(scores)
        axis.plot(x, mean, "o-", ms=3, color=COLOURS[method], label=paper.NAMES[method])
        if half is not None:
            axis.fill_between(x, mean - half, mean + half, color=COLOURS[method], alpha=0.15)
    axis.set_title(title)
    axis.set_xlabel("cost (share of the full model's layers)")
    axis.set_ylabel(f"{label} (%)")


def curve_rows(title: str, curves: Mapping[str, Curve], costs: Sequence[float]) -> list[list[str]]:
    """Returns the numbers of a panel, a table row for each method."""
    rows = []
    for method, (x, scores) in curves.items():
        cells = dict(zip(x.tolist(), map(format_interval, scores.T), strict=True))
        rows.append([title, paper.NAMES[method], *(cells.get(c, "") for c in costs)])
    return rows


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the figure, a panel a task and one of their mean, and the numbers behind it."""
    found = {
        task: {m: r for m in paper.NAMES if (r := records.get(f"{task}-{m}")) is not None}
        for task in chosen_tasks(options)
    }
    by_task = {task: by_method for task, by_method in found.items() if by_method}
    shown = [
        (
            task,
            {m: curve_at_costs(r) for m, r in by_method.items()},
            next(iter(by_method.values())).metric,
        )
        for task, by_method in by_task.items()
    ]
    methods = {m for by_method in by_task.values() for m in by_method}
    whole = [by_method for by_method in by_task.values() if by_method.keys() == methods]
    seeds = common_seeds([r for by_method in whole for r in by_method.values()]) if whole else []
    if len(whole) > 1 and seeds:
        mean = {m: mean_curve([r[m] for r in whole], seeds) for m in paper.NAMES if m in methods}
        shown.append((f"mean of {len(whole)} tasks", mean, "score"))
    costs = sorted({c for _, curves, _ in shown for x, _ in curves.values() for c in x.tolist()})
    figure, axes = subplots(len(shown))
    for axis, (title, curves, metric) in zip(axes, shown, strict=True):
        draw_curves(axis, curves, title, metric)
    add_legend(axes)
    return [
        Section(
            "curves",
            f"Speed-accuracy curves, {options.model} (figures 4 to 6, 10)",
            "Score in per cent at set costs, mean and 95% interval over seeds; Multi-Model pays "
            "the sum of the depths it tries. Confidence policy, temperatures fitted per exit. As "
            "the paper's figures these are read between 11 thresholds; the differences below are "
            "read from the exact curves. The mean is over the tasks that have all methods shown, "
            "seed by seed; the paper's figures 4 and 5 are means of seven tasks.",
            ("task", "method", *(f"cost {c:.3g}" for c in costs)),
            [row for title, curves, _ in shown for row in curve_rows(title, curves, costs)],
            figure if shown else None,
        ),
        _differences(options, records),
    ]


def _differences(options: argparse.Namespace, records: Records) -> Section:
    """Methods at the same cost, which for Multi-Model is another depth than for the others."""
    tasks, exits = chosen_tasks(options), config_values(options)["exits"]
    costs = exact_costs(exits)
    rows: list[list[str]] = []
    for one, other in paper.PAIRS:
        pairs = {task: [records.get(f"{task}-{m}") for m in (one, other)] for task in tasks}
        title = f"{paper.NAMES[one]} - {paper.NAMES[other]}"
        rows += differences(title, pairs, functools.partial(scores_at, costs))
    return Section(
        "curves-differences",
        f"Differences between methods at the same cost, {options.model}",
        f"{PAIRED} Read from the exact curves, of all thresholds, at costs that every method can "
        "spend.",
        ("difference", "task", "rate", *(f"cost {c:.3g}" for c in costs)),
        rows,
    )


SCRIPT = Script("curves", __doc__, method_cells, sections)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
