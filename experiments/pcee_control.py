"""Tests whether a target is an accuracy: compares the achieved accuracy with it, by exit rule.

  python -m experiments.pcee_control --model=minilm-l6 --data_dir=DIR

PCEE's first claim (Mofakhami et al. 2024) is that its threshold, an accuracy, is closer to the
achieved accuracy than a confidence threshold. For every finished cell of the grid, the rows that
were not trained on (calibration and validation rows) are split many times: one half fits what a
rule needs, and accuracy and cost are reported on the other. The targets are five accuracies between
the first and the last exit's, so that all can be reached. The script also tests certified
thresholds: calibration rows are drawn with replacement from all held-out rows, which are the
population of the certificate, and it counts how often more of them are harmed than it allows.

Cost: that of experiments.individual, whose missing cells it trains (with --render_only, none), then
minutes for --splits=100. It reads the cells' outputs in --workdir, and it writes
OUTPUT/pcee_control.csv and certificates.csv, from which it renders. Expected, if the claim holds on
texts: PCEE's error is below that of confidence, and certified thresholds are broken in at most 5%
of the draws. Found with minilm-l6 (2,000 rows): the second is true (at most 3.3%). The first is
not, since the errors are alike, except for Early-Exit on SST-2, whose first exits collapsed: there,
all rules but a chosen threshold achieve far more than the target.

Shape letters: S seed.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from experiments import paper
from experiments.comparison import Records
from experiments.comparison_tables import format_interval
from experiments.options import method_cells
from experiments.pcee_measurements import CONTROL, LEVEL, ROWS, RULES, measurements
from experiments.records import read_table
from experiments.rendering import Section
from experiments.runner import Script, main
from sweet_jax.exits.metrics import wilson_interval

MEASURES = ("error", "achieved - target", "cost")
METHODS = ("sweet", "multi_model", "early_exit")  # in the order of the table's columns
# [rules, measures] of each seed, by task and method.
Errors = dict[tuple[str, str], dict[int, np.ndarray]]


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the tables of the rules' errors by task and method, and of the certificates."""
    control_rows = read_table(options.output / "pcee_control.csv")
    certificates = read_table(options.output / "certificates.csv")
    if not certificates:
        return []
    errors = _errors(control_rows)
    kept = {(r["task"], r["method"], r["seed"]) for r in control_rows}
    runs = dict.fromkeys((r["task"], r["method"], r["seed"]) for r in certificates)
    left_out = [f"{task}-{m} seed {seed}" for task, m, seed in runs if (task, m, seed) not in kept]
    omitted = f" Left out, since the last exit gains less than a point: {', '.join(left_out)}."
    draws = certificates[0]["draws"]
    return [
        Section(
            "pcee_control",
            f"Is the target an accuracy? {options.model}",
            f"Points of accuracy, over {draws} splits and five targets between the first "
            "and the last exit's accuracy; mean and 95% interval over seeds. Error: absolute "
            "difference between achieved accuracy and target. Cost: share of the full model's "
            "layers, which Multi-Model may exceed. Since rows are few, a rule that is exactly "
            "right would still have an error of about a standard error."
            f"{omitted if left_out else ''}{_mean_note(errors)}",
            (
                *("task", "rule"),
                *(f"{paper.NAMES[method]}: {what}" for method in METHODS for what in MEASURES),
            ),
            _error_rows(errors),
        ),
        Section(
            "certified",
            f"Certified thresholds, {options.model}",
            "The loss compared with the last exit is at most the limit, with confidence "
            f"{LEVEL:g}: how often {ROWS} drawn calibration rows ({draws} draws for each seed) "
            "certify any threshold, how often the limit is broken on all held-out rows (with "
            "Wilson's 95% interval, which must not lie above 5%), and the mean cost, which is the "
            "last exit's if nothing was certified (for Multi-Model, above 1).",
            ("task", "method", "loss at most", "certified", "broken", "cost"),
            _certificate_rows(certificates),
        ),
    ]


def _errors(rows: Sequence[Mapping[str, str]]) -> Errors:
    """Returns the MEASURES, means over targets, of each seed [rules, 3], by task and method."""
    names = [rule for rule, _, _ in RULES]
    by_seed: dict[tuple[str, str], dict[int, list[list[np.ndarray]]]] = {}
    for row in rows:
        asked, achieved, error, cost = (float(row[key]) for key in CONTROL[7:])
        of_seed = by_seed.setdefault((row["task"], row["method"]), {})
        of_rules = of_seed.setdefault(int(row["seed"]), [[] for _ in names])
        point = np.asarray([100 * error, 100 * (achieved - asked), cost])
        of_rules[names.index(row["rule"])].append(point)
    return {
        cell: {seed: np.asarray(rules).mean(axis=1) for seed, rules in of_seed.items()}
        for cell, of_seed in by_seed.items()
    }


def _complete_tasks(errors: Errors) -> dict[str, list[str]]:
    """Returns the tasks with all seeds, by method; only their means can be compared."""
    every = {seed for of_seed in errors.values() for seed in of_seed}
    tasks: dict[str, list[str]] = {}
    for (task, method), of_seed in errors.items():
        if set(of_seed) == every:
            tasks.setdefault(method, []).append(task)
    return tasks


def _mean_note(errors: Errors) -> str:
    """Returns a sentence with the tasks that the means are over; "" if there is one task."""
    if len({task for task, _ in errors}) < 2:
        return ""
    complete = _complete_tasks(errors)
    texts = (f"{paper.NAMES[method]} {', '.join(tasks)}" for method, tasks in complete.items())
    return f" The means are over the tasks with all seeds: {'; '.join(texts)}."


def _error_rows(errors: Errors) -> list[list[str]]:
    """Returns a row for each task and rule, and for the mean over tasks, which is by seed."""
    tasks = list(dict.fromkeys(task for task, _ in errors))
    complete = _complete_tasks(errors)
    rows = []
    for title in [*tasks, *(["mean of tasks"] if len(tasks) > 1 else [])]:
        for number, (rule, _, _) in enumerate(RULES):
            texts: list[str] = []
            for method in METHODS:
                averaged = [title] if title in tasks else complete.get(method, [])
                every = [errors[task, method] for task in averaged if (task, method) in errors]
                if not every:
                    texts += ["", "", ""]
                    continue
                values = np.mean([[e[seed][number] for seed in e] for e in every], axis=0)  # [S, 3]
                error, signed, cost = values.T
                texts += [
                    format_interval(error),
                    format_interval(signed, sign=True),
                    f"{cost.mean():.3f}",
                ]
            rows.append([title, rule, *texts])
    return rows


def _certificate_rows(certificates: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Returns a row for each task, method and limit, over seeds."""
    by_limit: dict[tuple[str, str, str], list[Mapping[str, str]]] = {}
    for row in certificates:
        by_limit.setdefault((row["task"], row["method"], row["limit"]), []).append(row)
    rows = []
    for (task, method, limit), of_seeds in by_limit.items():
        total = sum(int(row["draws"]) for row in of_seeds)
        certified, broken = (
            sum(float(row[key]) for row in of_seeds) for key in ("certified", "broken")
        )
        low, high = wilson_interval(np.asarray(broken), total)
        rows.append(
            [
                *(task, paper.NAMES[method], f"{100 * float(limit):g}%"),
                f"{100 * certified / total:.0f}%",
                f"{100 * broken / total:.1f}% [{100 * low:.1f}, {100 * high:.1f}]",
                f"{np.mean([float(row['cost']) for row in of_seeds]):.3f}",
            ]
        )
    return rows


_ARGUMENTS = {
    "--splits": {
        "type": int,
        "default": 100,
        "help": "number of splits of the held-out rows; default: %(default)s",
    }
}
SCRIPT = Script("pcee_control", __doc__, method_cells, sections, measurements, _ARGUMENTS)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
