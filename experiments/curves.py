"""Figures 4 to 7 and 10 of the SWEET paper: speed-accuracy curves of the methods.

  python -m experiments.curves --model=minilm-l6 --data_dir=DIR

Scores at the paper's costs by linear interpolation between 11 thresholds, mean and 95% interval
over seeds; then what each method is ahead at the same cost. Cost: that of experiments.individual,
whose cells it runs where they are missing, else seconds. Expected, from the paper: SWEET above both
others at low costs, about level with Early-Exit at high ones.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import paper
from experiments.comparison import PAIRED, Record, Records, chosen, differences, interval
from experiments.grid import main
from experiments.options import chosen_tasks, method_cells
from experiments.rendering import Section, legend, panels, renderer
from sweet_jax.exits.scores import mean_interval

COLOURS = {"multi_model": "#e8833a", "early_exit": "#440154", "sweet": "#21918c"}


def at_costs(record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Costs [K] that all seeds reach, and the scores there in per cent, [S, K]."""
    replicas = chosen(record)
    keys = [
        k for k in replicas[0]["at_cost"] if all(r["at_cost"].get(k) is not None for r in replicas)
    ]
    scores = [[100 * r["at_cost"][k] for k in keys] for r in replicas]
    return np.asarray([float(k) for k in keys]), np.asarray(scores)


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """One panel a task, and the numbers behind it."""
    tasks = [t for t in chosen_tasks(options) if any(f"{t}-{m}" in records for m in paper.NAMES)]
    figure, axes = panels(len(tasks))
    rows, costs = [], sorted({c for r in records.values() for c in at_costs(r)[0].tolist()})
    for task, one in zip(tasks, axes, strict=True):
        metric = ""
        for method, title in paper.NAMES.items():
            record = records.get(f"{task}-{method}")
            if record is None:
                continue
            x, scores = at_costs(record)
            mean, half = mean_interval(scores)
            one.plot(x, mean, "o-", ms=3, color=COLOURS[method], label=title)
            if half is not None:
                one.fill_between(x, mean - half, mean + half, color=COLOURS[method], alpha=0.15)
            cells = dict(zip(x.tolist(), map(interval, scores.T), strict=True))
            rows.append([task, title, *(cells.get(c, "") for c in costs)])
            metric = record["metric"]
        one.set_title(task)
        one.set_xlabel("cost (share of the full model's layers)")
        one.set_ylabel(f"{metric} (%)")
    legend(axes)
    return [
        Section(
            "curves",
            f"Speed-accuracy curves, {options.model} (figures 4 to 7, 10)",
            "Score in per cent at set costs, mean and 95% interval over seeds; Multi-Model pays "
            "the sum of the depths it tries. Confidence policy, temperatures fitted per exit.",
            ("task", "method", *(f"cost {c:.3g}" for c in costs)),
            rows,
            figure if rows else None,
        ),
        _differences(options, records),
    ]


def _differences(options: argparse.Namespace, records: Records) -> Section:
    """Methods at the same cost, which for Multi-Model is another depth than for the others."""
    tasks = chosen_tasks(options)
    main_grid = [r for t in tasks for m in paper.NAMES if (r := records.get(f"{t}-{m}"))]
    reached = [set(at_costs(r)[0].tolist()) for r in main_grid]
    common = sorted(set.intersection(*reached)) if reached else []
    rows: list[list[str]] = []
    for one, other in paper.PAIRS:
        pairs = {task: [records.get(f"{task}-{m}") for m in (one, other)] for task in tasks}
        title = f"{paper.NAMES[one]} - {paper.NAMES[other]}"
        rows += differences(title, pairs, functools.partial(_at, common))
    return Section(
        "curves-differences",
        f"Differences between methods at the same cost, {options.model}",
        f"{PAIRED} At the costs that all of them reach.",
        ("difference", "task", "rate", *(f"cost {c:.3g}" for c in common)),
        rows,
    )


def _at(costs: Sequence[float], record: Record) -> np.ndarray:
    """Scores at the costs in per cent, [S, K]; NaN where a seed does not reach one."""
    found = [[r["at_cost"].get(f"{c:.4g}") for c in costs] for r in chosen(record)]
    return 100 * np.asarray(found, np.float64)


def run(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return main(__doc__, method_cells, renderer("curves", sections), argv)


if __name__ == "__main__":
    sys.exit(run())
