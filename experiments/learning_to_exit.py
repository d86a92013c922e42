"""Evaluates learning to exit, the SWEET paper's second exit policy, and its effect on the exits.

  python -m experiments.learning_to_exit --model=minilm-l6 --data_dir=DIR

It trains {off, joint, detached} x method. "joint" is the paper's: a head at every exit learns
whether the exit's class is right, and its loss also trains the layers below. With "detached", the
gradient stops at the pooled vector: the exits answer as with "off", and only the exit policy is
learned. Each area is that of the run's own policy, so detached - off compares the learned policy
with confidence, on the same logits if both chose the same learning rate.

Cost: twice experiments.individual besides its cells. Expected, from the paper: BERT-base's second
exit is 5 to 7 points lower with the joint loss than without. Found with MiniLM on SST-2 (2,000
rows, 3 seeds): with SWEET, differences of at most 0.6 points in either direction
(experiments/results/README.md).
"""

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping

from experiments import curves, paper
from experiments.cells import Cell
from experiments.comparison import Record, Records, exits_and_area
from experiments.comparison_tables import DIVERGED, PAIRED, differences, format_columns, format_rate
from experiments.options import chosen_methods, chosen_tasks, exit_columns, make_cell
from experiments.rendering import Section, missing_note
from experiments.runner import Script, main

# "off" is the cell of experiments.grid.
SWITCHES: dict[str, dict[str, str]] = {
    "off": {},
    "joint": {"learning_to_exit": "joint"},
    "detached": {"learning_to_exit": "detached"},
}


def cells(options: argparse.Namespace) -> list[Cell]:
    """Returns a cell for every task, method and switch."""
    return [
        make_cell(options, task, method, **changes)
        for task in chosen_tasks(options)
        for method in chosen_methods(options)
        for changes in SWITCHES.values()
    ]


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the scores, the effects paired by seed, and the curves of the joint runs."""
    tasks, methods = chosen_tasks(options), chosen_methods(options)
    by_cell = {
        (switch, task, method): records.get(make_cell(options, task, method, **changes).name)
        for task, method, (switch, changes) in itertools.product(tasks, methods, SWITCHES.items())
    }
    effects: list[list[str]] = []
    for method, switch in itertools.product(methods, ("joint", "detached")):
        pairs = {
            task: (by_cell[switch, task, method], by_cell["off", task, method]) for task in tasks
        }
        effects += differences(f"{paper.NAMES[method]}: {switch} - off", pairs, exits_and_area)
    joint = {f"{t}-{m}": record for (s, t, m), record in by_cell.items() if record and s == "joint"}
    return [
        _scores(options, records, by_cell),
        Section(
            "learning_to_exit-effects",
            f"Effects of learning to exit, {options.model}",
            PAIRED,
            ("difference", "task", "rate", *exit_columns(options)),
            effects,
        ),
        dataclasses.replace(
            curves.sections(options, joint)[0],
            name="learning_to_exit-curves",
            title=f"Speed-accuracy curves of the learned policy, {options.model}",
            note="Like the curves of experiments.curves, from 11 thresholds of the confidences "
            "learned with the joint loss. The paper's figure 7 is the mean of seven tasks; here, "
            "the mean is over the tasks that have all methods, if there are several.",
        ),
    ]


def _scores(
    options: argparse.Namespace,
    records: Records,
    by_cell: Mapping[tuple[str, str, str], Record | None],
) -> Section:
    """Returns the scores beside the paper's.

    by_cell: records of all cells by (switch, task, method).
    """
    names = [c.name for c in cells(options)]
    learned = {key[1:] for key, record in by_cell.items() if record and key[0] != "off"}
    rows = [
        [task, paper.NAMES[method], switch, format_rate(record), *format_columns(record)]
        for (switch, task, method), record in by_cell.items()
        if record is not None and (task, method) in learned
    ]
    reported = paper.LEARNING_TO_EXIT.get(options.model, {})
    for method, scores in reported.items():
        texts = [f"{score:.1f}" for score in scores]
        rows.append(["paper, mean of 7 tasks", paper.NAMES[method], "joint", "", *texts, ""])
    return Section(
        "learning_to_exit",
        f"Learning to exit, {options.model}",
        "Per cent, mean and 95% interval over seeds; validation rows. Area: mean score under "
        "the exact curve of the learned policy (off: of confidence), over the method's range of "
        f"costs. {DIVERGED}{f' {paper.LEFT_OUT}' * bool(reported)}"
        f"{missing_note(names, records)}",
        ("task", "method", "switch", "rate", *exit_columns(options)),
        rows,
    )


SCRIPT = Script("learning_to_exit", __doc__, cells, sections)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
