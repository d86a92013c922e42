"""Figures 6 and 10 of the SWEET paper: speed-accuracy curves of the methods, task by task.

  python -m experiments.curves --model=minilm-l6 --data_dir=DIR

The figure is drawn as the paper's are: scores at its costs by linear interpolation between 11
thresholds, mean and 95% interval over seeds. What each method is ahead at the same cost is read
from the exact curve instead, at the costs that all methods can spend: between two of 11 thresholds
the cost may leap (where the first exits answer one class only, from 0.17 to 0.7), and a straight
line across says nothing of what lies between. Figures 4, 5 and 7 of the paper are means over its
tasks, and are not made. Cost: that of experiments.individual, whose cells it runs where they are
missing, else seconds. Expected, from the paper: SWEET above both others at low costs, about level
with Early-Exit at high ones.
"""

import argparse
import functools
import sys

import numpy as np

from experiments import paper
from experiments.comparison import PAIRED, Record, Records, chosen, differences, interval, scores_at
from experiments.options import chosen_tasks, method_cells, settings
from experiments.records import exact_costs
from experiments.rendering import Section, legend, panels
from experiments.runner import Script, main
from sweet_jax.exits.metrics import mean_interval

COLOURS = {"multi_model": "#e8833a", "early_exit": "#440154", "sweet": "#21918c"}


def at_costs(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Returns costs [K] that all seeds reach, and the scores there in per cent, [S, K].

    Read from the paper's 11 thresholds: for its figure.
    """
    runs = chosen(record)
    keys = [k for k in runs[0].grid if all(k in r.grid for r in runs)]
    scores = [[100 * r.grid[k] for k in keys] for r in runs]
    return np.asarray([float(k) for k in keys]), np.asarray(scores)


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the figure with one panel a task, and the numbers behind it."""
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
            metric = record.metric
        one.set_title(task)
        one.set_xlabel("cost (share of the full model's layers)")
        one.set_ylabel(f"{metric} (%)")
    legend(axes)
    return [
        Section(
            "curves",
            f"Speed-accuracy curves, {options.model} (figures 6, 10)",
            "Score in per cent at set costs, mean and 95% interval over seeds; Multi-Model pays "
            "the sum of the depths it tries. Confidence policy, temperatures fitted per exit. As "
            "the paper's figures these are read between 11 thresholds; the differences below are "
            "read from the exact curves. Figures 4, 5 and 7 of the paper are means over its tasks, "
            "and are not made here.",
            ("task", "method", *(f"cost {c:.3g}" for c in costs)),
            rows,
            figure if rows else None,
        ),
        _differences(options, records),
    ]


def _differences(options: argparse.Namespace, records: Records) -> Section:
    """Methods at the same cost, which for Multi-Model is another depth than for the others."""
    tasks, exits = chosen_tasks(options), settings(options)["exits"]
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
