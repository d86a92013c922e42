"""Table 2 of the SWEET paper: the learning rate chosen for each task and method.

  python -m experiments.rates --model=minilm-l6 --data_dir=DIR

The rate with the largest area under the exact speed-accuracy curve, mean over seeds, over the costs
that the method can spend (the paper's is under its 11 thresholds); on held-out rows
(--preset=paper: on the validation rows, as the paper did).
Cost: that of experiments.individual, whose cells it runs where they are missing, else seconds.
Expected: of the paper's models about the choices of its table, 1e-5 to 5e-5, which depend on seeds;
minilm-l6 takes 1e-4 or 3e-4.
"""

import argparse
import functools
import sys

import numpy as np

from experiments import paper
from experiments.comparison import Records
from experiments.options import chosen_tasks, config_values, method_cells
from experiments.rendering import Section
from experiments.runner import Script, main
from sweet_jax.exits.outputs import layer_cost

_ORDER = ("early_exit", "multi_model", "sweet")  # the paper's


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns chosen rates, the area of every rate, and the paper's choice for its models."""
    theirs = dict(zip(paper.TASKS, paper.RATES.get(options.model, ()), strict=False))
    rows = []
    for task in chosen_tasks(options):
        for place, method in enumerate(_ORDER):
            record = records.get(f"{task}-{method}")
            if record is None:
                continue
            by_rate: dict[float, list[float]] = {}
            for r in record.runs:
                found = r.calibration_area
                by_rate.setdefault(r.learning_rate, []).append(
                    np.nan if found is None else 100 * found
                )
            every = ", ".join(f"{rate:g}: {np.mean(a):.1f}" for rate, a in by_rate.items())
            known = [f"{theirs[task].split()[place]}e-5"] if theirs else []
            rows.append([task, paper.NAMES[method], f"{record.learning_rate:g}", every, *known])
    return [
        Section(
            "rates",
            f"Chosen learning rates, {options.model} (table 2)",
            "Area: mean score in per cent under the exact curve, over the costs that the method "
            f"can spend, mean over seeds, on the rows fitted on. {_ranges(options)}"
            f"{f' {paper.LEFT_OUT}' * bool(theirs)}",
            (
                "task",
                "method",
                "chosen",
                "area of each rate",
                *(["paper's choice"] if theirs else []),
            ),
            rows,
        )
    ]


def _ranges(options: argparse.Namespace) -> str:
    exits = config_values(options)["exits"]
    ends = {m: layer_cost(exits, m)[[0, -1]] for m in ("sweet", "multi_model")}
    one, several = (f"{low:.3g} to {high:.3g}" for low, high in ends.values())
    return f"Costs of SWEET and Early-Exit: {one} of the full model's; of Multi-Model: {several}."


SCRIPT = Script("rates", __doc__, method_cells, sections)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
