"""Table 2 of the SWEET paper: the learning rate chosen for each task and method.

  python -m experiments.rates --model=minilm-l6 --data_dir=DIR

The rate with the largest area under the speed-accuracy curve, mean over seeds, over the curve's own
range of cost; on held-out rows (--preset=paper: on the validation rows, as the paper did). Runs the
cells that are missing: the same as experiments.individual's.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from experiments import paper
from experiments.grid import chosen_tasks, main, method_cells
from experiments.rendering import Records, Section, renderer

_ORDER = ("early_exit", "multi_model", "sweet")  # the paper's


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Chosen rates, the area of every rate, and the paper's choice."""
    theirs = dict(zip(paper.TASKS, paper.RATES.get(options.model, ()), strict=False))
    rows = []
    for task in chosen_tasks(options):
        for place, method in enumerate(_ORDER):
            record = records.get(f"{task}-{method}")
            if record is None:
                continue
            by_rate: dict[float, list[float]] = {}
            for r in record["replicas"]:
                found = r["calibration_area"]
                by_rate.setdefault(r["learning_rate"], []).append(
                    np.nan if found is None else 100 * found
                )
            every = ", ".join(f"{rate:g}: {np.mean(a):.1f}" for rate, a in by_rate.items())
            known = f"{theirs[task].split()[place]}e-5" if task in theirs else ""
            rows.append([task, paper.NAMES[method], f"{record['learning_rate']:g}", every, known])
    return [
        Section(
            "rates",
            f"Chosen learning rates, {options.model} (table 2)",
            "Area: mean score over the cost range in per cent, mean over seeds, on the rows "
            "fitted on.",
            ("task", "method", "chosen", "area of each rate", "paper's choice"),
            rows,
        )
    ]


def run(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return main(__doc__, method_cells, renderer("rates", sections), argv)


if __name__ == "__main__":
    sys.exit(run())
