"""Figure 8 of the SWEET paper: the methods with fewer and more training rows.

  python -m experiments.sizes --model=minilm-l6 --tasks=sst2 --sizes=500,1500 --data_dir=DIR

The full training subset is the cell of experiments.individual. A point is the mean score between
the first exit's cost and the full model's (the area under the paper's curve there, the same range
for all methods), with its 95% interval over seeds. Cost: of a size its share of what
experiments.individual costs. Expected: SWEET gains on Early-Exit where rows are few.
"""

import argparse
import sys
from collections.abc import Sequence

from experiments import grid, paper
from experiments.cells import Cell
from experiments.comparison import Record, Records, areas_to_full, interval
from experiments.curves import COLOURS
from experiments.options import cell, chosen_methods, chosen_tasks, method_cells, settings
from experiments.rendering import Section, legend, panels, renderer
from sweet_jax.config import Config, UserError, split_names
from sweet_jax.exits.scores import mean_interval

SIZES = "500,1500,3000"


def _full(options: argparse.Namespace) -> int:
    return int(settings(options).get("train_size", Config.train_size))


def _sizes(options: argparse.Namespace) -> list[int]:
    """Ascending, those below the full subset."""
    full = _full(options)
    try:
        return sorted({size for text in split_names(options.sizes) if (size := int(text)) < full})
    except ValueError as error:
        raise UserError(f"--sizes must be whole numbers; got {options.sizes!r}") from error


def cells(options: argparse.Namespace) -> list[Cell]:
    """Every task and method with every size, and with the full subset."""
    methods = chosen_methods(options)
    return method_cells(options) + [
        cell(options, task, method, train_size=size)
        for task in chosen_tasks(options)
        for method in methods
        for size in _sizes(options)
    ]


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Area against training rows, one panel a task."""
    tasks = chosen_tasks(options)
    figure, axes = panels(len(tasks))
    full = _full(options)
    rows = []
    for task, one in zip(tasks, axes, strict=True):
        for method, title in paper.NAMES.items():
            points = {s: records.get(f"{task}-{method}-train_size-{s}") for s in _sizes(options)}
            points[full] = records.get(f"{task}-{method}")
            found = {s: areas_to_full(r) for s, r in points.items() if r is not None}
            if not found.keys() - {full}:  # the main grid's cell alone is no curve
                continue
            statistics = [mean_interval(a) for a in found.values()]
            bars = [0.0 if half is None else float(half) for _, half in statistics]
            means = [float(mean) for mean, _ in statistics]
            counts = [_rows(points[s]) for s in found]  # a task may have fewer than asked for
            one.errorbar(counts, means, bars, fmt="o-", ms=3, color=COLOURS[method], label=title)
            texts = {s: interval(a) for s, a in found.items()}
            rows.append([task, title, *(texts.get(s, "") for s in (*_sizes(options), full))])
        one.set_title(task)
        one.set_xscale("log")
        one.set_xlabel("training rows")
        one.set_ylabel("area (%)")
    legend(axes)
    return [
        Section(
            "sizes",
            f"Training sizes, {options.model} (figure 8)",
            "Mean score in per cent between the first exit's cost and the full model's, mean and "
            "95% interval over seeds. A tenth of the rows calibrates. Of a task that has fewer "
            "the largest size is all there is.",
            ("task", "method", *(f"{s} rows" for s in (*_sizes(options), full))),
            rows,
            figure if rows else None,
        )
    ]


def _rows(record: Record) -> int:
    n = record["n"]
    return int(n["train"] + (n["calibration"] if record["fitted_on"] == "held_out" else 0))


def run(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    said = "training rows, of which those below the full subset's are run; default: %(default)s"
    extra = {"--sizes": {"default": SIZES, "help": said}}
    return grid.main(__doc__, cells, renderer("sizes", sections), argv, extra)


if __name__ == "__main__":
    sys.exit(run())
