"""What makes the gap: gradients in the trunk, a shared pooler, or global clipping.

  python -m experiments.ablation --model=minilm-l6 --data_dir=DIR

Not in the paper. The authors' release shares one pooler among the exits and clips one norm over all
parameters; both couple exits that SWEET means to separate. {Early-Exit, SWEET} x pooler {shared,
per exit} x clipping {global, per owner}, same rows and rates, differences paired by seed. Cost:
four times experiments.individual without Multi-Model. Expected, if the paper is right: the gap at
the first exits stays whatever is shared. Seen with MiniLM (3 seeds): on SST-2 with 2,000 rows it
does, with the heads as trained (at exit 2 a logistic regression refitted on the same trunks takes
it away); with 6,000 a part of the gap at exit 1 is what the release shares; on CoLA that collapses
SWEET, on MRPC little of it is shown to matter (experiments/results/README.md).
"""

import argparse
import functools
import itertools
import sys

from experiments import paper
from experiments.cells import Cell
from experiments.comparison import (
    AREA,
    DIVERGED,
    PAIRED,
    Records,
    differences,
    exits_and_area,
    format_columns,
    format_rate,
)
from experiments.options import chosen_methods, chosen_tasks, exit_columns, make_cell
from experiments.rendering import Section, missing_note
from experiments.runner import Script, main

METHODS = ("early_exit", "sweet")
VARIANTS = tuple(itertools.product(("per_exit", "shared"), ("owner", "global")))


def _changes(pooler: str, clipping: str) -> dict[str, str]:
    """Returns what differs from the default, so that the default is the main grid's own cell."""
    changes = {"pooler": pooler, "clipping": clipping}
    usual = {"pooler": "per_exit", "clipping": "owner"}
    return {k: v for k, v in changes.items() if v != usual[k]}


def cells(options: argparse.Namespace) -> list[Cell]:
    """Returns a cell for every task, method, pooler and clipping."""
    return [
        make_cell(options, task, method, **_changes(*variant))
        for task in chosen_tasks(options)
        for method in METHODS
        if method in chosen_methods(options)
        for variant in VARIANTS
    ]


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Scores of all variants, and what each change does, paired by seed."""
    head = exit_columns(options)
    names = [c.name for c in cells(options)]
    rows: list[list[str]] = []
    for task, method, variant in itertools.product(chosen_tasks(options), METHODS, VARIANTS):
        record = records.get(make_cell(options, task, method, **_changes(*variant)).name)
        if record is not None:
            rows.append(
                [task, paper.NAMES[method], *variant, format_rate(record), *format_columns(record)]
            )
    return [
        Section(
            "ablation",
            f"Pooler and clipping, {options.model}",
            "Per cent, mean and 95% interval over seeds; validation rows. The release is shared, "
            f"global; the default here per_exit, owner. {AREA} {DIVERGED}"
            f"{missing_note(names, records)}",
            ("task", "method", "pooler", "clipping", "rate", *head),
            rows,
        ),
        Section(
            "ablation-effects",
            f"What each change does, {options.model}",
            PAIRED,
            ("difference", "task", "rate", *head),
            _effects(options, records),
        ),
    ]


def _effects(options: argparse.Namespace, records: Records) -> list[list[str]]:
    """Rows of the second table: one for each change and task, and the mean of the tasks."""
    ours, release = VARIANTS[0], VARIANTS[-1]
    gaps = {
        "as released": (("sweet", *release), ("early_exit", *release)),
        "per exit and owner": (("sweet", *ours), ("early_exit", *ours)),
    }
    changes = {f"SWEET - Early-Exit, {title}": gap for title, gap in gaps.items()}
    changes["what the release adds to SWEET - Early-Exit"] = sum(gaps.values(), ())
    for method in METHODS:
        title, base = paper.NAMES[method], (method, *ours)
        changes |= {
            f"{title}: a shared pooler": ((method, "shared", "owner"), base),
            f"{title}: global clipping": ((method, "per_exit", "global"), base),
            f"{title}: both": ((method, *release), base),
        }
    rows: list[list[str]] = []
    for title, compared in changes.items():
        pairs = {
            task: [
                records.get(make_cell(options, task, method, **_changes(*variant)).name)
                for method, *variant in compared
            ]
            for task in chosen_tasks(options)
        }
        rows += differences(title, pairs, exits_and_area)
    return rows


SCRIPT = Script("ablation", __doc__, cells, sections)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
