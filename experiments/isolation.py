"""The isolation dial: between Early-Exit (0) and SWEET (1), constant or moving while training.

  python -m experiments.isolation --model=minilm-l6 --data_dir=DIR

Not in the paper. h = (1 - a) h + a stop_gradient(h) at segment boundaries, for constants a = 0,
0.5, 0.9, 0.99, 1, for a rising linearly from 0 or 0.5 to 1 over training, and for a step from 0 to
1 at half time. Areas paired by seed, against the better Early-Exit: per-exit poolers with clipping
per owner, or the release's shared pooler with global clipping. Cost: six cells a task besides
experiments.individual's and experiments.ablation's. Expected: not known yet.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.grid import Cell, cell, chosen_tasks, main, settings
from experiments.rendering import (
    Records,
    Section,
    areas,
    exit_scores,
    interval,
    missing_note,
    paired,
    renderer,
)

# Title, method, config values. The ends are the main grid's own cells.
DIALS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("0 (Early-Exit)", "early_exit", {}),
    ("0, as released", "early_exit", {"pooler": "shared", "clipping": "global"}),
    ("0.5", "sweet", {"isolation": (0.5,)}),
    ("0.9", "sweet", {"isolation": (0.9,)}),
    ("0.99", "sweet", {"isolation": (0.99,)}),
    ("1 (SWEET)", "sweet", {}),
    ("0 to 1", "sweet", {"isolation": (0.0, 1.0)}),
    ("0.5 to 1", "sweet", {"isolation": (0.5, 1.0)}),
    (
        "0, then 1 from half time",
        "sweet",
        {"isolation": (0.0, 1.0), "isolation_schedule": "step"},
    ),
)


def cells(options: argparse.Namespace) -> list[Cell]:
    """Every task with every setting of the dial."""
    return [
        cell(options, task, method, **changes)
        for task in chosen_tasks(options)
        for _, method, changes in DIALS
    ]


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Scores by setting and task, and the areas against the better Early-Exit."""
    exits = settings(options)["exits"]
    rows: list[list[str]] = []
    gaps: dict[str, list[np.ndarray]] = {}
    for task in chosen_tasks(options):
        found = {
            title: records[name]
            for title, method, changes in DIALS
            if (name := cell(options, task, method, **changes).name) in records
        }
        base = _better(found)
        for title, record in found.items():
            scores = [interval(s) for s in exit_scores(record).T]
            gap = "" if base is None else interval(paired(record, base, areas), sign=True)
            rows.append([task, title, *scores, interval(areas(record)), gap])
            if base is not None:
                gaps.setdefault(title, []).append(paired(record, base, areas))
    for title, every in gaps.items():
        if len(every) > 1 and len({len(g) for g in every}) == 1:
            mean = interval(np.mean(every, axis=0), sign=True)
            blank = [""] * (len(exits) + 1)
            rows.append([f"mean of {len(every)} tasks", title, *blank, mean])
    names = [c.name for c in cells(options)]
    return [
        Section(
            "isolation",
            f"The isolation dial, {options.model}",
            "Per cent, mean and 95% interval over seeds; validation rows. Last column: area "
            "against the better of the two Early-Exits of the task, paired by seed, in bold where "
            f"the interval leaves out zero.{missing_note(names, records)}",
            ("task", "isolation", *(f"exit {e}" for e in exits), "area", "against Early-Exit"),
            rows,
        )
    ]


def _better(found: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The Early-Exit with the larger mean area on the rows reported: the harder one to beat."""
    both = [found[title] for title, method, _ in DIALS if method == "early_exit" and title in found]
    return max(both, key=lambda record: float(areas(record).mean()), default=None)


def run(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return main(__doc__, cells, renderer("isolation", sections), argv)


if __name__ == "__main__":
    sys.exit(run())
