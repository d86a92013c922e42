"""Makes figures 4 to 6 and 10 of the SWEET paper: speed-accuracy curves of the methods.

  python -m experiments.curves --model=minilm-l6 --data_dir=DIR

Like the paper's, the figure has scores at the paper's costs, interpolated linearly between 11
thresholds, with the mean and the 95% interval over seeds. The differences between methods are
instead read from the exact curves, at costs that all methods can reach: between two of the 11
thresholds, the cost may jump (from 0.17 to 0.7 if the first exits answer one class only), and a
straight line says nothing about the costs in between. The last panel is the mean over the tasks
that have all the methods shown, as the paper's figures 4 and 5 are means of its seven tasks.

Cost: that of experiments.individual, whose missing cells it runs, else seconds. Expected, from the
paper: SWEET is above both others at low costs, and about level with Early-Exit at high ones.

Shape letters: S seed, K cost.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from experiments import paper
from experiments.comparison import Record, Records, chosen_runs, common_seeds, scores_at
from experiments.comparison_tables import PAIRED, differences, format_interval
from experiments.options import chosen_tasks, config_values, method_cells
from experiments.records import exact_costs
from experiments.rendering import Section, add_legend, subplots
from experiments.runner import Script, main
from sweet_jax.exits.metrics import mean_interval

COLOURS = {"multi_model": "#e8833a", "early_exit": "#440154", "sweet": "#21918c"}
Curve = tuple[np.ndarray, np.ndarray]  # costs [K] and scores in per cent [S, K]


def curve_at_costs(record: Record) -> Curve:
    """Returns the paper's curve: costs [K] that all seeds reach, and scores in per cent [S, K].

    It is interpolated between 11 thresholds.
    """
    runs = chosen_runs(record)
    keys = [k for k in runs[0].grid if all(k in r.grid for r in runs)]
    scores = [[100 * r.grid[k] for k in keys] for r in runs]
    return np.asarray([float(k) for k in keys]), np.asarray(scores)


def mean_curve(records: Sequence[Record], seeds: Sequence[int]) -> Curve:
    """Returns the mean of the paper's curve over the records of several tasks, by seed.

    Its costs [K] are those that all these seeds reach on all tasks.
    """
    by_cost = []  # for each task, scores [S] by cost
    for record in records:
        runs = tuple(run for run in record.runs if run.seed in seeds)
        costs, scores = curve_at_costs(dataclasses.replace(record, runs=runs))
        by_cost.append(dict(zip(costs.tolist(), scores.T, strict=True)))
    shared = [cost for cost in by_cost[0] if all(cost in scores for scores in by_cost)]
    mean = [np.mean([scores[cost] for scores in by_cost], axis=0) for cost in shared]
    return np.asarray(shared), np.reshape(mean, (len(shared), len(seeds))).T  # [S, K]


class Panel(NamedTuple):
    """Holds a panel of a figure: its title, the curves by method, and the name of the score."""

    title: str
    curves: Mapping[str, Curve]
    score: str

    @classmethod
    def of_records(cls, title: str, records: Mapping[str, Record]) -> Self:
        """Returns a panel with the curves of records by method."""
        curves = {method: curve_at_costs(record) for method, record in records.items()}
        return cls(title, curves, next(iter(records.values())).metric)

    def draw(self, axis: Any) -> None:
        """Draws the curves: mean and 95% interval over seeds."""
        for method, (costs, scores) in self.curves.items():
            mean, half = mean_interval(scores)
            color = COLOURS[method]
            axis.plot(costs, mean, "o-", ms=3, color=color, label=paper.NAMES[method])
            if half is not None:
                axis.fill_between(costs, mean - half, mean + half, color=color, alpha=0.15)
        axis.set_title(self.title)
        axis.set_xlabel("cost (share of the full model's layers)")
        axis.set_ylabel(f"{self.score} (%)")

    def rows(self, columns: Sequence[float]) -> list[list[str]]:
        """Returns a table row of scores at the costs `columns` for each method."""
        rows = []
        for method, (costs, scores) in self.curves.items():
            texts = dict(zip(costs.tolist(), map(format_interval, scores.T), strict=True))
            rows.append([self.title, paper.NAMES[method], *(texts.get(c, "") for c in columns)])
        return rows


def curve_section(
    name: str, title: str, note: str, header: str, panels: Sequence[Panel]
) -> Section:
    """Returns a figure of panels, and a table of their scores.

    header: header of the column with the titles of the panels.
    """
    figure, axes = subplots(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        panel.draw(axis)
    add_legend(axes)
    costs = sorted({c for panel in panels for x, _ in panel.curves.values() for c in x.tolist()})
    return Section(
        name,
        title,
        note,
        (header, "method", *(f"cost {c:.3g}" for c in costs)),
        [row for panel in panels for row in panel.rows(costs)],
        figure if panels else None,
    )


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the figure with a panel for each task and one for their mean, and the differences."""
    by_task = {
        task: {m: r for m in paper.NAMES if (r := records.get(f"{task}-{m}")) is not None}
        for task in chosen_tasks(options)
    }
    by_task = {task: by_method for task, by_method in by_task.items() if by_method}
    panels = [Panel.of_records(task, by_method) for task, by_method in by_task.items()]
    methods = {m for by_method in by_task.values() for m in by_method}
    complete = [by_method for by_method in by_task.values() if by_method.keys() == methods]
    every = [record for by_method in complete for record in by_method.values()]
    seeds = common_seeds(every) if every else []
    if len(complete) > 1 and seeds:
        mean = {m: mean_curve([r[m] for r in complete], seeds) for m in paper.NAMES if m in methods}
        panels.append(Panel(f"mean of {len(complete)} tasks", mean, "score"))
    return [
        curve_section(
            "curves",
            f"Speed-accuracy curves, {options.model} (figures 4 to 6, 10)",
            "Score in per cent at some costs, mean and 95% interval over seeds; the cost of "
            "Multi-Model is the sum of the depths it tries. Confidence policy, temperatures fitted "
            "for each exit. Like the paper's figures, the curves are interpolated between 11 "
            "thresholds; the differences below are read from the exact curves. The mean is over "
            "the tasks that have all methods shown, by seed; the paper's figures 4 and 5 are means "
            "of seven tasks.",
            "task",
            panels,
        ),
        _differences(options, records),
    ]


def _differences(options: argparse.Namespace, records: Records) -> Section:
    """Returns the differences between methods at the same costs.

    At one cost, Multi-Model has reached another depth than the other methods.
    """
    tasks, exits = chosen_tasks(options), config_values(options)["exits"]
    costs = exact_costs(exits)
    rows: list[list[str]] = []
    for first, second in paper.PAIRS:
        pairs = {task: [records.get(f"{task}-{m}") for m in (first, second)] for task in tasks}
        title = f"{paper.NAMES[first]} - {paper.NAMES[second]}"
        rows += differences(title, pairs, functools.partial(scores_at, costs))
    return Section(
        "curves-differences",
        f"Differences between methods at the same cost, {options.model}",
        f"{PAIRED} Read from the exact curves, of all thresholds, at costs that every method can "
        "reach.",
        ("difference", "task", "rate", *(f"cost {c:.3g}" for c in costs)),
        rows,
    )


SCRIPT = Script("curves", __doc__, method_cells, sections)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
