"""The methods with fewer and more training rows.

  python -m experiments.sizes --model=minilm-l6 --tasks=sst2 --sizes=500,1500 --data_dir=DIR

The SWEET paper's figure 8: speed-accuracy curves for each training size, a panel a size (the
paper's are on MNLI, up to 400,000 rows). In another figure a point is an area, the mean score under
the exact curve between the first exit's cost and the full model's (the same range for all methods),
with its 95% interval over seeds; differences are given by grid area too (`grid_areas`: the same
under the paper's 11 thresholds). The full training subset is the cell of experiments.individual.
Cost: of a size its share of what experiments.individual costs. Expected: SWEET gains on Early-Exit
where rows are few. Seen with MiniLM on SST-2 (one rate, 3 seeds): it is ahead by 5.8 ± 2.7 points
with 3,000 rows and behind by 2.6 ± 2.4 with 6,000; with 500 and 1,500 it is not told apart (+6.9 ±
11.1, +5.0 ± 5.9).
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
    format_interval,
    grid_areas,
    paired_differences,
)
from experiments.curves import COLOURS, curve_at_costs, curve_rows, draw_curves
from experiments.options import chosen_methods, chosen_tasks, config_values, make_cell, method_cells
from experiments.rendering import Section, add_legend, subplots
from experiments.runner import Script, main
from sweet_jax.config import Config, split_names
from sweet_jax.errors import UserError
from sweet_jax.exits.metrics import mean_interval

SIZES = "500,1500,3000"
_AREAS = {"area": areas_to_full, "grid area": grid_areas}


def _full(options: argparse.Namespace) -> int:
    return int(config_values(options).get("train_size", Config.train_size))


def _sizes(options: argparse.Namespace) -> list[int]:
    """Returns the sizes below the full subset, ascending."""
    full = _full(options)
    try:
        return sorted({size for text in split_names(options.sizes) if (size := int(text)) < full})
    except ValueError as error:
        raise UserError(f"--sizes must be whole numbers; got {options.sizes!r}") from error


def recorded(records: Records) -> str:
    """Returns the sizes that a study has cells of, as the option has them."""
    found = {name.rpartition("-train_size-")[2] for name in records if "-train_size-" in name}
    return ",".join(sorted(found, key=int)) or SIZES


def cells(options: argparse.Namespace) -> list[Cell]:
    """Returns a cell for every task, method and size, the full subset among them."""
    methods = chosen_methods(options)
    return method_cells(options) + [
        make_cell(options, task, method, train_size=size)
        for task in chosen_tasks(options)
        for method in methods
        for size in _sizes(options)
    ]


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns areas and curves by training rows, and the differences between methods."""
    return [_areas(options, records), _curves(options, records), _differences(options, records)]


def _areas(options: argparse.Namespace, records: Records) -> Section:
    tasks = chosen_tasks(options)
    figure, axes = subplots(len(tasks))
    full = _full(options)
    rows = []
    for task, one in zip(tasks, axes, strict=True):
        for method, title in paper.NAMES.items():
            points = _points(options, records, task, method)
            found = {s: areas_to_full(r) for s, r in points.items() if r is not None}
            if not found.keys() - {full}:  # the main grid's cell alone is no curve
                continue
            # A task may have fewer rows than asked for; a size not done yet breaks the line.
            counts = [s if r is None else _rows(r) for s, r in points.items()]
            statistics = [mean_interval(found.get(s, np.full(1, np.nan))) for s in points]
            bars = [0.0 if half is None else float(half) for _, half in statistics]
            means = [float(mean) for mean, _ in statistics]
            one.errorbar(counts, means, bars, fmt="o-", ms=3, color=COLOURS[method], label=title)
            one.set_xscale("log")
            one.set_xticks(counts, [f"{n:,}" for n in counts])
            texts = {s: format_interval(a) for s, a in found.items()}
            rows.append([task, title, *(texts.get(s, "") for s in (*_sizes(options), full))])
        one.minorticks_off()
        one.set_title(task)
        one.set_xlabel("training rows")
        one.set_ylabel("area (%)")
    add_legend(axes)
    return Section(
        "sizes",
        f"Training sizes, {options.model}",
        "Area in per cent, mean and 95% interval over seeds: the mean score under the exact curve, "
        "of all thresholds, between the first exit's cost and the full model's. A tenth of the "
        "rows calibrates. Of a task that has fewer the largest size is all there is.",
        ("task", "method", *(f"{s} rows" for s in (*_sizes(options), full))),
        rows,
        figure if rows else None,
    )


def _curves(options: argparse.Namespace, records: Records) -> Section:
    """Returns the speed-accuracy curves of the methods, a panel for each task and size."""
    shown = []
    for task in chosen_tasks(options):
        by_rows: dict[int, dict[str, Record]] = {}  # sizes above a task's own rows are the same
        for method in paper.NAMES:
            for record in filter(None, _points(options, records, task, method).values()):
                by_rows.setdefault(_rows(record), {})[method] = record
        if len(by_rows) < 2:
            continue  # the main grid's cells alone are curves already
        for rows, found in sorted(by_rows.items()):
            metric = next(iter(found.values())).metric
            curves = {method: curve_at_costs(record) for method, record in found.items()}
            shown.append((f"{task}, {rows:,} rows", curves, metric))
    figure, axes = subplots(len(shown))
    costs = sorted({c for _, curves, _ in shown for x, _ in curves.values() for c in x.tolist()})
    for axis, (title, curves, metric) in zip(axes, shown, strict=True):
        draw_curves(axis, curves, title, metric)
    add_legend(axes)
    return Section(
        "sizes-curves",
        f"Speed-accuracy curves by training size, {options.model} (figure 8)",
        "Score in per cent at set costs, mean and 95% interval over seeds, read between 11 "
        "thresholds as the paper's figure is; that is on MNLI, up to 400,000 rows.",
        ("task, size", "method", *(f"cost {c:.3g}" for c in costs)),
        [row for title, curves, _ in shown for row in curve_rows(title, curves, costs)],
        figure if shown else None,
    )


def _differences(options: argparse.Namespace, records: Records) -> Section:
    """Areas and grid areas, paired by seed: each cell at the rate that it chose."""
    sizes = (*_sizes(options), _full(options))
    rows: list[list[str]] = []
    for (one, other), task in itertools.product(paper.PAIRS, chosen_tasks(options)):
        ours, theirs = (_points(options, records, task, method) for method in (one, other))
        for name, of in _AREAS.items():
            gaps = []
            for size in sizes:
                pair = [r for r in (ours[size], theirs[size]) if r is not None]
                known = len(pair) == 2 and common_seeds(pair)
                gaps.append(
                    format_interval(paired_differences(pair, of), sign=True) if known else ""
                )
            if any(gaps[:-1]):  # the main grid's cells alone are no curve
                rows.append([f"{paper.NAMES[one]} - {paper.NAMES[other]}", task, name, *gaps])
    return Section(
        "sizes-differences",
        f"Differences between methods by training size, {options.model}",
        "Points, paired by seed, mean and 95% interval over seeds (Student), in bold where it "
        "leaves out zero. Area: as above. Grid area: over the same costs under the paper's curve, "
        "with straight lines between 11 thresholds.",
        ("difference", "task", "of", *(f"{s} rows" for s in sizes)),
        rows,
    )


def _points(
    options: argparse.Namespace, records: Records, task: str, method: str
) -> dict[int, Record | None]:
    """Returns the cells of a task and method by training size, None where one is not done."""
    points = {s: records.get(f"{task}-{method}-train_size-{s}") for s in _sizes(options)}
    return points | {_full(options): records.get(f"{task}-{method}")}


def _rows(record: Record) -> int:
    n = record.n
    return n["train"] + (n["calibration"] if record.fitted_on == "held_out" else 0)


ARGUMENTS = {
    "--sizes": {
        "default": SIZES,
        "help": "training rows, of which those below the full subset's are run; "
        "default: %(default)s",
    }
}
SCRIPT = Script("sizes", __doc__, cells, sections, arguments=ARGUMENTS)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
