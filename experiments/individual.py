"""Makes tables 1, 3 and 4 of the SWEET paper: every exit alone, by task and method.

  python -m experiments.individual --model=minilm-l6 --data_dir=DIR
  python -m experiments.individual --model=bert-base --tasks=sst2,mrpc,rte,cola,mnli,qnli,qqp

It runs the missing cells (see experiments.grid) and prints the tables. Cost: hours on 2 cores for
minilm-l6; the paper's models need a GPU or TPU. Expected, from the paper: Multi-Model is above
Early-Exit at every exit, most at the first; SWEET is above Early-Exit at the first exits and about
a point below it at the last two. Found with minilm-l6 on SST-2: with 2,000 rows, SWEET is above by
23 points at the first exits; with 6,000, it is below by nearly 4 at the last two.
"""

import argparse
import functools
import sys

import numpy as np

from experiments import paper
from experiments.comparison import Records, exit_scores
from experiments.comparison_tables import (
    DIVERGED,
    PAIRED,
    differences,
    format_columns,
    format_spread,
)
from experiments.encoders import MODELS
from experiments.options import chosen_tasks, config_values, method_cells
from experiments.rendering import Section, missing_note
from experiments.runner import Script, main


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the scores of all exits, and the differences between methods paired by seed."""
    return [_scores(options, records), _differences(options, records)]


def _scores(options: argparse.Namespace, records: Records) -> Section:
    exits = config_values(options)["exits"]
    rows: list[list[str]] = []
    means: dict[str, list[np.ndarray]] = {method: [] for method in paper.NAMES}
    for task in chosen_tasks(options):
        for method, title in paper.NAMES.items():
            if f"{task}-{method}" in records:
                record = records[f"{task}-{method}"]
                scores = exit_scores(record)
                means[method].append(scores.mean(axis=0))
                size = f"{len(scores)} x {record.n['validation']}"
                shown = format_columns(record, exit_scores, format_spread)
                rows.append([task, title, *shown, size])
    for method, title in paper.NAMES.items():
        if len(means[method]) > 1:
            mean = [f"{v:.1f}" for v in np.mean(means[method], axis=0)]
            rows.append([f"mean of {len(means[method])} tasks", title, *mean, ""])
    # For a model that is not in the paper, show the paper's smallest complete table.
    reference = options.model if options.model in paper.INDIVIDUAL else "deberta-base"
    layers = MODELS[reference]["exits"]
    shows_paper = len(exits) == len(layers)
    for method, reported in paper.INDIVIDUAL[reference].items() if shows_paper else ():
        texts = ["" if score is None else f"{score:.1f}" for score in reported]
        title = f"paper, {reference}, exits {', '.join(map(str, layers))}, mean of 7 tasks"
        rows.append([title, paper.NAMES[method], *texts, "3"])
    names = [cell.name for cell in method_cells(options)]
    return Section(
        "individual",
        f"Each exit alone, {options.model} (tables 1, 3, 4)",
        "Mean and standard deviation over seeds, per cent; accuracy, Matthews for CoLA; validation "
        "rows. Each method at the learning rate with the largest area under its exact curve on "
        f"{_fitted(records)} rows. {DIVERGED}{f' {paper.LEFT_OUT}' * shows_paper}"
        f"{missing_note(names, records)}",
        ("task", "method", *(f"exit {e}" for e in exits), "seeds x rows"),
        rows,
    )


def _differences(options: argparse.Namespace, records: Records) -> Section:
    exits = config_values(options)["exits"]
    rows: list[list[str]] = []
    for first, second in paper.PAIRS:
        pairs = {
            task: (records.get(f"{task}-{first}"), records.get(f"{task}-{second}"))
            for task in chosen_tasks(options)
        }
        rows += differences(f"{paper.NAMES[first]} - {paper.NAMES[second]}", pairs, exit_scores)
    return Section(
        "differences",
        f"Differences between methods, {options.model}",
        PAIRED,
        ("difference", "task", "rate", *(f"exit {e}" for e in exits)),
        rows,
    )


def _fitted(records: Records) -> str:
    """Returns the kind of rows on which learning rates were chosen."""
    held_out = all(record.fitted_on == "held_out" for record in records.values())
    return "held-out" if held_out else "the validation"


SCRIPT = Script("individual", __doc__, method_cells, sections)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
