"""Isolation: between Early-Exit (0) and SWEET (1), constant or moving while training.

  python -m experiments.isolation --model=minilm-l6 --data_dir=DIR

Not in the paper. h = (1 - a) h + a stop_gradient(h) at segment boundaries, for constants a = 0,
0.5, 0.9, 0.99, 1, for a rising linearly from 0 or 0.5 to 1 over training, and for a step from 0 to
1 at half time. Exits and areas paired by seed, against SWEET and the better Early-Exit: per-exit
poolers with clipping per owner, or the release's shared pooler with global clipping. Cost: six
cells a task besides experiments.individual's and experiments.ablation's. Expected, of a probe with
one seed and 6,000 rows: rising from 0 to 1 best. Seen with MiniLM (3 seeds): on SST-2 with 6,000
rows, on CoLA and on MRPC its area is not told apart from Early-Exit's, and its deep exits are ahead
of SWEET's (CoLA: exit 4 only); on SST-2 with 2,000 rows, where Early-Exit's first exits collapse,
so do those of whatever starts at 0.5 or less, while at 3e-4 0.9 and 0.99 are ahead of it. The area
of 0.9 is nowhere shown to be behind (experiments/results/README.md).
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Mapping
from typing import Any

from experiments.cells import Cell
from experiments.comparison import (
    AREA,
    DIVERGED,
    PAIRED,
    Record,
    Records,
    areas,
    differences,
    exits_and_area,
    format_columns,
    format_rate,
)
from experiments.options import chosen_methods, chosen_tasks, exit_columns, make_cell
from experiments.rendering import Section, missing_note
from experiments.runner import Script, main

SWEET = "1 (SWEET)"

# Title, method, config values. The ends are the main grid's own cells.
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
    """Scores by setting and task, and what each setting gains over the two ends."""
    head = exit_columns(options)
    names = [c.name for c in cells(options)]
    found = {task: _found(options, records, task) for task in chosen_tasks(options)}
    rows = [
        [task, title, format_rate(record), *format_columns(record)]
        for task, settled in found.items()
        for title, record in settled.items()
    ]
    ends = {
        "the better Early-Exit": {task: _better(settled) for task, settled in found.items()},
        "SWEET": {task: settled.get(SWEET) for task, settled in found.items()},
    }
    gaps: list[list[str]] = []
    for end, (title, method, _) in itertools.product(ends, SETTINGS):
        pairs = {task: (settled.get(title), ends[end][task]) for task, settled in found.items()}
        said = end == "SWEET" and method == "early_exit"  # SWEET - Early-Exit stands above
        if not said and any(one is not other for one, other in pairs.values()):
            gaps += differences(f"{title} - {end}", pairs, exits_and_area)
    return [
        Section(
            "isolation",
            f"Isolation between Early-Exit and SWEET, {options.model}",
            f"Per cent, mean and 95% interval over seeds; validation rows. {AREA} {DIVERGED}"
            f"{missing_note(names, records)}",
            ("task", "isolation", "rate", *head),
            rows,
        ),
        Section(
            "isolation-gains",
            f"Isolation against its ends, {options.model}",
            f"{PAIRED} The better Early-Exit: of a task's two, as far as done, that with the "
            "larger area.",
            ("difference", "task", "rate", *head),
            gaps,
        ),
    ]


def _found(options: argparse.Namespace, records: Records, task: str) -> dict[str, Record]:
    """Returns the finished cells of a task by the title of their setting."""
    return {
        title: records[name]
        for title, method, changes in SETTINGS
        if (name := make_cell(options, task, method, **changes).name) in records
    }


def _better(found: Mapping[str, Record]) -> Record | None:
    """Returns the Early-Exit with the larger mean area on the rows reported."""
    both = [
        found[title] for title, method, _ in SETTINGS if method == "early_exit" and title in found
    ]
    return max(both, key=lambda record: float(areas(record).mean()), default=None)


SCRIPT = Script("isolation", __doc__, cells, sections)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
