"""Learning to exit: the SWEET paper's second rule for leaving, and what its loss does to the exits.

  python -m experiments.learning_to_exit --model=minilm-l6 --data_dir=DIR

{off, joint, detached} x method. joint is the paper's: a head at every exit learns whether the
exit's class is right, and its loss reaches the layers below. Detached, that gradient ends at the
pooled vector: the exits answer as without it, only the rule for leaving is learned. Areas are each
run's own rule's, so that detached against off compares the learned rule with confidence, on the
same logits where both areas choose the same rate. Cost: twice experiments.individual besides its
cells. Expected, from the paper: BERT-BASE's second exit 5 to 7 points lower with the joint loss
than without. Seen with MiniLM on SST-2 (2,000 rows, 3 seeds): at most 0.6 points either way under
SWEET (README).
"""

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping

from experiments import curves, paper
from experiments.cells import Cell
from experiments.comparison import (
    DIVERGED,
    PAIRED,
    Record,
    Records,
    differences,
    exits_and_area,
    format_columns,
    format_rate,
)
from experiments.options import chosen_methods, chosen_tasks, exit_columns, make_cell
from experiments.rendering import Section, missing_note
from experiments.runner import Script, main

# Off is the main grid's own cell.
SWITCHES: dict[str, dict[str, str]] = {
    "off": {},
    "joint": {"learning_to_exit": "joint"},
    "detached": {"learning_to_exit": "detached"},
}


def cells(options: argparse.Namespace) -> list[Cell]:
    """Returns a cell for every task, method and setting of the switch."""
    return [
        make_cell(options, task, method, **changes)
        for task in chosen_tasks(options)
        for method in chosen_methods(options)
        for changes in SWITCHES.values()
    ]


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns scores, what the switch does paired by seed, and the curves of the joint runs."""
    tasks, methods = chosen_tasks(options), chosen_methods(options)
    found = {
        (switch, task, method): records.get(make_cell(options, task, method, **changes).name)
        for task, method, (switch, changes) in itertools.product(tasks, methods, SWITCHES.items())
    }
    effects: list[list[str]] = []
    for method, switch in itertools.product(methods, ("joint", "detached")):
        pairs = {task: (found[switch, task, method], found["off", task, method]) for task in tasks}
        effects += differences(f"{paper.NAMES[method]}: {switch} - off", pairs, exits_and_area)
    joint = {f"{t}-{m}": record for (s, t, m), record in found.items() if record and s == "joint"}
    return [
        _scores(options, records, found),
        Section(
            "learning_to_exit-effects",
            f"What learning to exit does, {options.model}",
            PAIRED,
            ("difference", "task", "rate", *exit_columns(options)),
            effects,
        ),
        dataclasses.replace(
            curves.sections(options, joint)[0],
            name="learning_to_exit-curves",
            title=f"Speed-accuracy curves of the learned rule, {options.model}",
            note="As the curves of experiments.curves, between 11 thresholds over what was learned "
            "with the joint loss. The paper's figure 7 is the mean of seven tasks; here it is that "
            "of the tasks that have all methods, where there are several.",
        ),
    ]


def _scores(
    options: argparse.Namespace,
    records: Records,
    found: Mapping[tuple[str, str, str], Record | None],
) -> Section:
    """Returns the scores, by (switch, task, method), beside the paper's."""
    names = [c.name for c in cells(options)]
    learned = {key[1:] for key, record in found.items() if record and key[0] != "off"}
    rows = [
        [task, paper.NAMES[method], switch, format_rate(record), *format_columns(record)]
        for (switch, task, method), record in found.items()
        if record is not None and (task, method) in learned
    ]
    reported = paper.LEARNING_TO_EXIT.get(options.model, {})
    for method, theirs in reported.items():
        known = [f"{v:.1f}" for v in theirs]
        rows.append(["paper, mean of 7 tasks", paper.NAMES[method], "joint", "", *known, ""])
    return Section(
        "learning_to_exit",
        f"Learning to exit, {options.model}",
        "Per cent, mean and 95% interval over seeds; validation rows. Area: mean score under "
        "the exact curve of the learned rule, where off of confidence, over the costs that the "
        f"method can spend. {DIVERGED}{f' {paper.LEFT_OUT}' * bool(reported)}"
        f"{missing_note(names, records)}",
        ("task", "method", "switch", "rate", *exit_columns(options)),
        rows,
    )


SCRIPT = Script("learning_to_exit", __doc__, cells, sections)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
