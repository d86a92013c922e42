"""Compares degrees of isolation between Early-Exit (0) and SWEET (1), constant or changing.

  python -m experiments.isolation --model=minilm-l6 --data_dir=DIR

This is not in the paper. At segment boundaries, h = (1 - a) h + a stop_gradient(h), with constants
a = 0, 0.5, 0.9, 0.99, 1, with a that rises linearly from 0 or 0.5 to 1 during training, and with a
step from 0 to 1 at half time. Exits and areas are compared, paired by seed, with SWEET and with the
better Early-Exit: with per-exit poolers and clipping per owner, or with the release's shared pooler
and global clipping.

Cost: six cells for each task besides those of experiments.individual and experiments.ablation.
Expected, from a trial with one seed and 6,000 rows: a rise from 0 to 1 is best. Found with MiniLM
(3 seeds): on SST-2 with 6,000 rows, on CoLA and on MRPC, its area cannot be distinguished from
Early-Exit's, and its deep exits are ahead of SWEET's (on CoLA, only exit 4). On SST-2 with 2,000
rows, where Early-Exit's first exits collapse, so do those of every setting that starts at 0.5 or
less, while at 3e-4 the constants 0.9 and 0.99 are ahead of it. The area of 0.9 is nowhere
significantly behind (experiments/results/README.md).
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Mapping
from typing import Any

from experiments.cells import Cell
from experiments.comparison import Record, Records, areas, exits_and_area
from experiments.comparison_tables import (
    AREA,
    DIVERGED,
    PAIRED,
    differences,
    format_columns,
    format_rate,
)
from experiments.options import chosen_methods, chosen_tasks, exit_columns, make_cell
from experiments.rendering import Section, missing_note
from experiments.runner import Script, main

SWEET = "1 (SWEET)"

# Title, method and config values. Early-Exit and SWEET are the cells of experiments.grid.
SETTINGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("0 (Early-Exit)", "early_exit", {}),
    ("0, as released", "early_exit", {"pooler": "shared", "clipping": "global"}),
    ("0.5", "sweet", {"isolation": (0.5,)}),
    ("0.9", "sweet", {"isolation": (0.9,)}),
    ("0.99", "sweet", {"isolation": (0.99,)}),
    (SWEET, "sweet", {}),
    ("0 to 1", "sweet", {"isolation": (0.0, 1.0)}),
    ("0.5 to 1", "sweet", {"isolation": (0.5, 1.0)}),
    (
        "0, then 1 from half time",
        "sweet",
        {"isolation": (0.0, 1.0), "isolation_schedule": "step"},
    ),
)


def cells(options: argparse.Namespace) -> list[Cell]:
    """Returns a cell for every task and setting of isolation."""
    return [
        make_cell(options, task, method, **changes)
        for task in chosen_tasks(options)
        for _, method, changes in SETTINGS
        if method in chosen_methods(options)
    ]


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the scores by task and setting, and the gains of each setting over the two ends."""
    columns = exit_columns(options)
    names = [c.name for c in cells(options)]
    by_task = {task: _finished(options, records, task) for task in chosen_tasks(options)}
    rows = [
        [task, title, format_rate(record), *format_columns(record)]
        for task, finished in by_task.items()
        for title, record in finished.items()
    ]
    ends = {
        "the better Early-Exit": {task: _better(finished) for task, finished in by_task.items()},
        "SWEET": {task: finished.get(SWEET) for task, finished in by_task.items()},
    }
    gaps: list[list[str]] = []
    for end, (title, method, _) in itertools.product(ends, SETTINGS):
        pairs = {task: (finished.get(title), ends[end][task]) for task, finished in by_task.items()}
        # The rows of the better Early-Exit already have SWEET - Early-Exit.
        repeated = end == "SWEET" and method == "early_exit"
        if not repeated and any(first is not second for first, second in pairs.values()):
            gaps += differences(f"{title} - {end}", pairs, exits_and_area)
    return [
        Section(
            "isolation",
            f"Isolation between Early-Exit and SWEET, {options.model}",
            f"Per cent, mean and 95% interval over seeds; validation rows. {AREA} {DIVERGED}"
            f"{missing_note(names, records)}",
            ("task", "isolation", "rate", *columns),
            rows,
        ),
        Section(
            "isolation-gains",
            f"Isolation compared with Early-Exit and SWEET, {options.model}",
            f"{PAIRED} The better Early-Exit: of the finished ones of a task, the one with the "
            "larger area.",
            ("difference", "task", "rate", *columns),
            gaps,
        ),
    ]


def _finished(options: argparse.Namespace, records: Records, task: str) -> dict[str, Record]:
    """Returns the records of the finished cells of a task, by the title of their setting."""
    return {
        title: records[name]
        for title, method, changes in SETTINGS
        if (name := make_cell(options, task, method, **changes).name) in records
    }


def _better(finished: Mapping[str, Record]) -> Record | None:
    """Returns the Early-Exit with the larger mean area on validation rows."""
    candidates = [
        finished[title]
        for title, method, _ in SETTINGS
        if method == "early_exit" and title in finished
    ]
    return max(candidates, key=lambda record: float(areas(record).mean()), default=None)


SCRIPT = Script("isolation", __doc__, cells, sections)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
