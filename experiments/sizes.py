"""Compares the methods with fewer and more training rows; makes figure 8 of the SWEET paper.

  python -m experiments.sizes --model=minilm-l6 --tasks=sst2 --sizes=500,1500 --data_dir=DIR

Figure 8 has speed-accuracy curves, one panel for each number of training rows. (The paper's are on
MNLI, with up to 400,000 rows.) Another figure has areas with their 95% intervals over seeds: the
mean score under the exact curve between the first exit's cost and the full model's, the same range
for all methods. Differences are also given as grid areas, the same under the curve of the paper's
11 thresholds. The largest size is the cell of experiments.individual.

Cost: for each size, its share of the cost of experiments.individual. Expected: SWEET gains on
Early-Exit with few rows. Found with MiniLM on SST-2 (one rate, 3 seeds): SWEET is ahead by 5.8 ±
2.7 points with 3,000 rows and behind by 2.6 ± 2.4 with 6,000. With 500 and 1,500 rows, the
differences are not significant (+6.9 ± 11.1 and +5.0 ± 5.9).
"""

import argparse
import functools
import itertools
import sys

import numpy as np

from experiments import paper
from experiments.cells import Cell
from experiments.comparison import (
    Record,
    Records,
    areas_to_full,
    common_seeds,
    grid_areas,
    paired_differences,
)
from experiments.comparison_tables import format_interval
from experiments.curves import COLOURS, Panel, curve_section
from experiments.options import chosen_methods, chosen_tasks, config_values, make_cell, method_cells
from experiments.rendering import Section, add_legend, subplots
from experiments.runner import Script, main
from sweet_jax.config import Config, split_names
from sweet_jax.errors import UserError
from sweet_jax.exits.metrics import mean_interval

SIZES = "500,1500,3000"
_AREAS = {"area": areas_to_full, "grid area": grid_areas}


def _full_size(options: argparse.Namespace) -> int:
    """Returns the largest number of training rows, that of experiments.individual."""
    return int(config_values(options).get("train_size", Config.train_size))


def _sizes(options: argparse.Namespace) -> list[int]:
    """Returns the sizes of --sizes below the largest one, ascending."""
    full = _full_size(options)
    try:
        return sorted({size for text in split_names(options.sizes) if (size := int(text)) < full})
    except ValueError as error:
        raise UserError(
            f"--sizes must be whole numbers separated by commas; got {options.sizes!r}"
        ) from error


def recorded(records: Records) -> str:
    """Returns the sizes that a study has cells of, in the format of --sizes."""
    sizes = {name.rpartition("-train_size-")[2] for name in records if "-train_size-" in name}
    return ",".join(sorted(sizes, key=int)) or SIZES


def cells(options: argparse.Namespace) -> list[Cell]:
    """Returns a cell for every task, method and size, including the largest."""
    methods = chosen_methods(options)
    return method_cells(options) + [
        make_cell(options, task, method, train_size=size)
        for task in chosen_tasks(options)
        for method in methods
        for size in _sizes(options)
    ]


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns areas, curves and differences between methods by number of training rows."""
    return [_areas(options, records), _curves(options, records), _differences(options, records)]


def _areas(options: argparse.Namespace, records: Records) -> Section:
    tasks = chosen_tasks(options)
    figure, axes = subplots(len(tasks))
    full = _full_size(options)
    rows = []
    for task, axis in zip(tasks, axes, strict=True):
        for method, title in paper.NAMES.items():
            points = _points(options, records, task, method)
            areas = {s: areas_to_full(r) for s, r in points.items() if r is not None}
            if not areas.keys() - {full}:  # the largest size alone is no curve
                continue
            # A task may have fewer rows than a size; a size that is not done breaks the line.
            counts = [s if r is None else _rows(r) for s, r in points.items()]
            statistics = [mean_interval(areas.get(s, np.full(1, np.nan))) for s in points]
            bars = [0.0 if half is None else float(half) for _, half in statistics]
            means = [float(mean) for mean, _ in statistics]
            axis.errorbar(counts, means, bars, fmt="o-", ms=3, color=COLOURS[method], label=title)
            axis.set_xscale("log")
            axis.set_xticks(counts, [f"{n:,}" for n in counts])
            texts = {s: format_interval(area) for s, area in areas.items()}
            rows.append([task, title, *(texts.get(s, "") for s in (*_sizes(options), full))])
        axis.minorticks_off()
        axis.set_title(task)
        axis.set_xlabel("training rows")
        axis.set_ylabel("area (%)")
    add_legend(axes)
    return Section(
        "sizes",
        f"Training sizes, {options.model}",
        "Area in per cent, mean and 95% interval over seeds: the mean score under the exact curve, "
        "of all thresholds, between the first exit's cost and the full model's. A tenth of the "
        "rows is for calibration. If a task has fewer rows, its largest size has all of them.",
        ("task", "method", *(f"{s} rows" for s in (*_sizes(options), full))),
        rows,
        figure if rows else None,
    )


def _curves(options: argparse.Namespace, records: Records) -> Section:
    """Returns the speed-accuracy curves of the methods, one panel for each task and size."""
    panels = []
    for task in chosen_tasks(options):
        by_rows: dict[int, dict[str, Record]] = {}  # sizes above a task's own rows are the same
        for method in paper.NAMES:
            for record in filter(None, _points(options, records, task, method).values()):
                by_rows.setdefault(_rows(record), {})[method] = record
        if len(by_rows) < 2:
            continue  # the curves of the largest size alone are in experiments.curves
        for rows, by_method in sorted(by_rows.items()):
            panels.append(Panel.of_records(f"{task}, {rows:,} rows", by_method))
    return curve_section(
        "sizes-curves",
        f"Speed-accuracy curves by training size, {options.model} (figure 8)",
        "Score in per cent at some costs, mean and 95% interval over seeds, interpolated between "
        "11 thresholds like the paper's figure, which is on MNLI with up to 400,000 rows.",
        "task, size",
        panels,
    )


def _differences(options: argparse.Namespace, records: Records) -> Section:
    """Returns the differences of areas and grid areas, paired by seed, at the chosen rates."""
    sizes = (*_sizes(options), _full_size(options))
    rows: list[list[str]] = []
    for (first, second), task in itertools.product(paper.PAIRS, chosen_tasks(options)):
        points = [_points(options, records, task, method) for method in (first, second)]
        for name, of in _AREAS.items():
            gaps = []
            for size in sizes:
                pair = [record for p in points if (record := p[size]) is not None]
                comparable = len(pair) == 2 and common_seeds(pair)
                gaps.append(
                    format_interval(paired_differences(pair, of), sign=True) if comparable else ""
                )
            if any(gaps[:-1]):  # more than the largest size
                rows.append([f"{paper.NAMES[first]} - {paper.NAMES[second]}", task, name, *gaps])
    return Section(
        "sizes-differences",
        f"Differences between methods by training size, {options.model}",
        "Points, paired by seed: mean and 95% interval over seeds (Student), bold if it excludes "
        "zero. Area: as above. Grid area: the same under the paper's curve, which is interpolated "
        "linearly between 11 thresholds.",
        ("difference", "task", "of", *(f"{s} rows" for s in sizes)),
        rows,
    )


def _points(
    options: argparse.Namespace, records: Records, task: str, method: str
) -> dict[int, Record | None]:
    """Returns the records of a task and method by training size, None if not done."""
    points = {s: records.get(f"{task}-{method}-train_size-{s}") for s in _sizes(options)}
    return points | {_full_size(options): records.get(f"{task}-{method}")}


def _rows(record: Record) -> int:
    """Returns the number of rows of a cell that are not validation rows."""
    n = record.n
    return n["train"] + (n["calibration"] if record.fitted_on == "held_out" else 0)


ARGUMENTS = {
    "--sizes": {
        "default": SIZES,
        "help": "numbers of training rows; only those below --train_size are run; "
        "default: %(default)s",
    }
}
SCRIPT = Script("sizes", __doc__, cells, sections, arguments=ARGUMENTS)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
