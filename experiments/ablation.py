"""Ablates the pooler and gradient clipping: shared by the exits as released, or one for each exit.

  python -m experiments.ablation --model=minilm-l6 --data_dir=DIR

This is not in the paper. The authors' release has one pooler for all exits and clips one norm of
all gradients; both couple exits that SWEET means to separate. The script trains {Early-Exit, SWEET}
x pooler {shared, per_exit} x clipping {global, owner} with the same rows and learning rates, and
compares them paired by seed.

Cost: four times experiments.individual without Multi-Model. Expected, if the paper is right: the
gap between the methods at the first exits does not depend on what is shared. Found with MiniLM (3
seeds): on SST-2 with 2,000 rows this is so with the heads as trained (at exit 2, logistic
regressions refitted on the same trunks remove the gap). With 6,000 rows, what the release shares
causes a part of the gap at exit 1. On CoLA, it makes SWEET collapse; on MRPC, there is little
evidence of any effect (experiments/results/README.md).
"""

import argparse
import functools
import itertools
import sys

from experiments import paper
from experiments.cells import Cell
from experiments.comparison import Records, exits_and_area
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

METHODS = ("early_exit", "sweet")
VARIANTS = tuple(itertools.product(("per_exit", "shared"), ("owner", "global")))


def _changes(pooler: str, clipping: str) -> dict[str, str]:
    """Returns the values that differ from the defaults, whose cell is that of experiments.grid."""
    values = {"pooler": pooler, "clipping": clipping}
    defaults = {"pooler": "per_exit", "clipping": "owner"}
    return {key: value for key, value in values.items() if value != defaults[key]}


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
    """Returns the scores of all variants, and the effects of the changes, paired by seed."""
    columns = exit_columns(options)
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
            "Per cent, mean and 95% interval over seeds; validation rows. The release has shared "
            f"and global; the default here is per_exit and owner. {AREA} {DIVERGED}"
            f"{missing_note(names, records)}",
            ("task", "method", "pooler", "clipping", "rate", *columns),
            rows,
        ),
        Section(
            "ablation-effects",
            f"Effects of the changes, {options.model}",
            PAIRED,
            ("difference", "task", "rate", *columns),
            _effects(options, records),
        ),
    ]


def _effects(options: argparse.Namespace, records: Records) -> list[list[str]]:
    """Returns a row for each change and task, and one for the mean over tasks."""
    ours, release = VARIANTS[0], VARIANTS[-1]
    gaps: dict[str, tuple[tuple[str, str, str], ...]] = {
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
