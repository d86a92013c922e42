"""Makes table 2 of the SWEET paper: the learning rate chosen for each task and method.

  python -m experiments.rates --model=minilm-l6 --data_dir=DIR

The chosen rate has the largest mean area over seeds under the exact speed-accuracy curve, over the
method's range of costs, on calibration rows. (The paper's area is that of 11 thresholds on
validation rows; --preset=paper takes validation rows too.)

Cost: that of experiments.individual, whose missing cells it runs, else seconds. Expected: for the
paper's models about the choices in its table, 1e-5 to 5e-5, which depend on seeds; for minilm-l6,
1e-4 or 3e-4.
"""

import argparse
import functools
import sys

import numpy as np

from experiments import paper
from experiments.comparison import Records
from experiments.comparison_tables import format_rate
from experiments.options import chosen_tasks, config_values, method_cells
from experiments.rendering import Section
from experiments.runner import Script, main
from sweet_jax.exits.outputs import layer_cost

_ORDER = ("early_exit", "multi_model", "sweet")  # as in the paper


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the chosen rates, the area of every rate, and the paper's choices for its models."""
    reported = dict(zip(paper.TASKS, paper.RATES.get(options.model, ()), strict=False))
    rows = []
    for task in chosen_tasks(options):
        for place, method in enumerate(_ORDER):
            record = records.get(f"{task}-{method}")
            if record is None:
                continue
            by_rate: dict[float, list[float]] = {}
            for run in record.runs:
                area = run.calibration_area
                by_rate.setdefault(run.learning_rate, []).append(
                    np.nan if area is None else 100 * area
                )
            areas = ", ".join(f"{rate:g}: {np.mean(a):.1f}" for rate, a in by_rate.items())
            choice = [f"{reported[task].split()[place]}e-5"] if reported else []
            rows.append([task, paper.NAMES[method], format_rate(record), areas, *choice])
    return [
        Section(
            "rates",
            f"Chosen learning rates, {options.model} (table 2)",
            "Area: mean score in per cent under the exact curve, over the method's range of costs, "
            f"mean over seeds, on calibration rows. {_ranges(options)}"
            f"{f' {paper.LEFT_OUT}' * bool(reported)}",
            (
                "task",
                "method",
                "chosen",
                "area of each rate",
                *(["paper's choice"] if reported else []),
            ),
            rows,
        )
    ]


def _ranges(options: argparse.Namespace) -> str:
    """Returns a sentence with the methods' ranges of costs."""
    exits = config_values(options)["exits"]
    ends = [layer_cost(exits, method)[[0, -1]] for method in ("sweet", "multi_model")]
    shared, summed = (f"{low:.3g} to {high:.3g}" for low, high in ends)
    return f"Costs of SWEET and Early-Exit: {shared} of the full model's; of Multi-Model: {summed}."


SCRIPT = Script("rates", __doc__, method_cells, sections)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
