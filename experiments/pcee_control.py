"""Is the dial an accuracy? Targets against what is achieved, by rule, on untouched rows.

  python -m experiments.pcee_control --model=minilm-l6 --data_dir=DIR

PCEE's first claim (Mofakhami et al. 2024): its threshold, an accuracy, is closer to the accuracy
achieved than a threshold of confidence is. For every finished cell of the grid the held-out rows,
calibration and validation alike, are split anew many times: half fits what a rule needs, half is
untouched and reported. Targets are five accuracies from the first exit's to the last one's, so that
all are within reach. Beside it the certified dial: calibration rows are drawn with replacement from
all held-out rows, which are then the population that the certificate speaks of, and what is counted
is how often more of them are harmed than it allowed.

Cost: that of experiments.individual, whose cells it trains where they are missing (--render_only:
none), then minutes for --splits=100: it reads the cells' outputs in --workdir. Writes
OUTPUT/pcee_control.csv and certificates.csv, from which it renders. Expected, if the claim carries
over to text: PCEE's error below confidence's; the certified dial broken in at most 5% of the draws.
Seen with minilm-l6 (2,000 rows): the second (at most 3.3%); not the first, whose errors are alike,
but on SST-2 under Early-Exit, whose first exits collapsed there: all but a chosen threshold give
far more than they are asked for.
"""

import argparse
import functools
import operator
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import paper
from experiments.cells import is_finished, outputs_folder
from experiments.comparison import Records, chosen, interval
from experiments.options import method_cells
from experiments.records import read_table, replace_rows
from experiments.rendering import Section
from experiments.runner import Script, main
from sweet_jax import ExitOutputs, simulate
from sweet_jax.config import UserError
from sweet_jax.exits.certificates import exit_losses
from sweet_jax.exits.metrics import wilson_interval
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.exits.policies import exit_confidences

# Title, policy, and whether the threshold is chosen on calibration rows (else it is the target).
RULES = (
    ("confidence, as it is", "raw_confidence", False),
    ("confidence, after temperature", "confidence", False),
    ("confidence, threshold chosen", "confidence", True),
    ("PCEE, equal width", "pcee", False),
    ("PCEE, equal mass", "pcee_equal_mass", False),
    ("PCEE, isotonic", "pcee_isotonic", False),
    ("PCEE-WS", "pcee_ws", False),
)
MEASURES = ("error", "achieved - asked", "cost")
METHODS = ("sweet", "multi_model", "early_exit")  # in the order of the table's columns
TARGETS = np.linspace(0.1, 0.9, 5)  # of the way from the first exit's accuracy to the last one's
LIMITS, LEVEL = (0.02, 0.05, 0.1), 0.95
ROWS = 400  # calibration rows of a certificate
# By task and method, of each seed [rules, measures].
Errors = dict[tuple[str, str], dict[int, np.ndarray]]
_CELL = ("study", "task", "method", "learning_rate", "seed")
CONTROL = (*_CELL, "rule", "splits", "asked", "achieved", "error", "cost")
CERTIFICATES = (*_CELL, "limit", "level", "rows", "draws", "certified", "broken", "cost")
_LEAST_GAIN = 0.01  # of the last exit on the first: below, no target is worth asking for


def pooled(folder: Path, replica: int) -> ExitOutputs:
    """All held-out rows of one replica, R = 1: its calibration rows, then the validation rows."""
    parts = [
        ExitOutputs.load(folder / f"{split}.npz").replica(replica)
        for split in ("calibration", "validation")
    ]
    if parts[0].identity.get("fitted_on", "held_out") != "held_out":
        raise UserError(
            f"{str(folder)!r} holds no rows out: its preset fits on the validation rows"
        )
    logits, labels = (
        np.concatenate([getattr(p, name) for p in parts], axis=axis)
        for name, axis in (("logits", 2), ("labels", 1))
    )
    return ExitOutputs(logits, labels, parts[0].layers, parts[0].cost)


def control(rows: ExitOutputs, targets: np.ndarray, splits: int, seed: int = 0) -> np.ndarray:
    """(achieved accuracy, cost) on untouched rows by rule and target, [rules, T, splits, 2]."""
    count, found = rows.labels.shape[1], np.empty((len(RULES), len(targets), splits, 2))
    for split in range(splits):
        order = np.random.default_rng([seed, split]).permutation(count)
        fitting, untouched = rows.rows(order[: count // 2]), rows.rows(order[count // 2 :])
        dials = make_resolver(fitting, tuple(policy for _, policy, choose in RULES if choose))
        for number, (_, policy, choose) in enumerate(RULES):
            thresholds = targets
            if choose:
                trade = dials.trades[policy]
                wanted = [trade.with_score(t) for t in targets]
                best = trade.threshold[-1]  # where the calibration rows do not reach the target
                thresholds = np.asarray([best if t is None else t for t in wanted])
            point = simulate(untouched, policy, fitted=dials.fitted, thresholds=thresholds)
            found[number, :, split] = np.stack([point.score[0], point.cost[0]], axis=-1)
    return found


def violations(rows: ExitOutputs, size: int, draws: int, seed: int = 0) -> np.ndarray:
    """Of each limit on the loss, [limits, 3]: certified, broken (counts over draws), mean cost.

    Calibration rows, `size` of them, are drawn with replacement; the truth is known: it is the
    share harmed of all rows.
    """
    count, harmful = rows.labels.shape[1], exit_losses(rows, 0, "risk")
    found = np.zeros((len(LIMITS), 3))
    for draw in range(draws):
        drawn = np.random.default_rng([seed, draw]).integers(0, count, size)
        dials = make_resolver(rows.rows(drawn), ("confidence",))
        points = np.maximum.accumulate(exit_confidences(rows, "confidence", dials.halved)[0, :-1])
        for number, limit in enumerate(LIMITS):
            threshold = dials.certificate("confidence", "risk", limit, LEVEL).threshold
            place = np.full(count, len(rows.layers) - 1)
            if threshold is not None:
                place = (points < threshold).sum(axis=0)
            broken = np.take_along_axis(harmful, place[None], axis=0).mean() > limit
            found[number] += (threshold is not None, broken, rows.cost[place].mean())
    found[:, 2] /= draws
    return found


def measurements(options: argparse.Namespace, records: Records) -> None:
    """Writes pcee_control.csv and certificates.csv of the cells with outputs in the workdir."""
    found: list[dict] = []
    certified: list[dict] = []
    for name, record in records.items():
        folder = outputs_folder(options.workdir, name)
        if not is_finished(options.workdir, name):
            print(f"{name} is not measured: its outputs are not in {str(options.workdir)!r}")
            continue
        for run in chosen(record):
            index = record.runs.index(run)
            cell = {
                "study": options.output.name,
                "task": record.config["task"],
                "method": record.config["method"],
                "learning_rate": run.learning_rate,
                "seed": run.seed,
            }
            rows = pooled(folder, index)
            seed = zlib.crc32(f"{name} {index}".encode())  # draws of cells are independent
            for limit, drawn in zip(
                LIMITS, violations(rows, ROWS, options.splits, seed).tolist(), strict=True
            ):
                values = (limit, LEVEL, ROWS, options.splits, *drawn)
                certified.append(cell | dict(zip(CERTIFICATES[5:], values, strict=True)))
            right = (rows.predictions == rows.labels[:, None])[0].mean(axis=-1)
            if right[-1] - right[0] >= _LEAST_GAIN:
                targets = right[0] + TARGETS * (right[-1] - right[0])
                points = control(rows, targets, options.splits, seed)
                found += _control_rows(cell, points, targets, options.splits)
    key = operator.itemgetter("task", "method")
    replace_rows(options.output / "pcee_control.csv", CONTROL, found, key)
    replace_rows(options.output / "certificates.csv", CERTIFICATES, certified, key)


def _control_rows(
    cell: dict, points: np.ndarray, targets: np.ndarray, splits: int
) -> list[dict[str, Any]]:
    """Returns rows of pcee_control.csv, means over splits of `control`'s answer for one run."""
    rows = []
    for (rule, _, _), of_rule in zip(RULES, points, strict=True):
        for target, found in zip(targets, of_rule, strict=True):  # [splits, 2]
            achieved, cost = found.mean(axis=0)
            error = np.abs(found[:, 0] - target).mean()
            values = (rule, splits, target, achieved, error, cost)
            rows.append(cell | dict(zip(CONTROL[5:], values, strict=True)))
    return rows


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the tables of control errors by rule, task and method, and of the certificates."""
    control_rows = read_table(options.output / "pcee_control.csv")
    certificates = read_table(options.output / "certificates.csv")
    if not certificates:
        return []
    errors = _errors(control_rows)
    kept = {(r["task"], r["method"], r["seed"]) for r in control_rows}
    runs = dict.fromkeys((r["task"], r["method"], r["seed"]) for r in certificates)
    left_out = [f"{task}-{m} seed {seed}" for task, m, seed in runs if (task, m, seed) not in kept]
    omitted = f" Left out, the last exit gains less than a point: {', '.join(left_out)}."
    draws = certificates[0]["draws"]
    return [
        Section(
            "pcee_control",
            f"Is the dial an accuracy? {options.model}",
            f"Points of accuracy, over {draws} splits and five targets between the first "
            "and the last exit's accuracy; mean and 95% interval over seeds. Error: achieved "
            "against asked, absolute. Cost: share of the full model's layers, which Multi-Model "
            "may exceed. Rows are finite: a rule that hit its target exactly would still err by "
            "about a standard error of the rows."
            f"{omitted if left_out else ''}{_whole_note(errors)}",
            (
                *("task", "rule"),
                *(f"{paper.NAMES[method]}: {what}" for method in METHODS for what in MEASURES),
            ),
            _error_rows(errors),
        ),
        Section(
            "certified",
            f"Certified thresholds, {options.model}",
            f"Loss against the last exit of at most the limit, confidence {LEVEL:g}: how often "
            f"{ROWS} calibration rows drawn anew ({draws} draws of each seed) certify a "
            "threshold at all, how often the promise is broken in all held-out rows (Wilson's 95% "
            "interval; it must not lie above 5%), and the mean cost, the last exit's where nothing "
            "was certified (Multi-Model's is above 1).",
            ("task", "method", "loss at most", "certified", "broken", "cost"),
            _violation_rows(certificates),
        ),
    ]


def _errors(rows: Sequence[Mapping[str, str]]) -> Errors:
    """Returns (error, achieved - asked, cost), means over targets, of each seed [rules, 3]."""
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


def _whole(errors: Errors) -> dict[str, list[str]]:
    """Of each method the tasks of which no seed is left out: means over them are comparable."""
    every = {seed for of_seed in errors.values() for seed in of_seed}
    found: dict[str, list[str]] = {}
    for (task, method), of_seed in errors.items():
        if set(of_seed) == every:
            found.setdefault(method, []).append(task)
    return found


def _whole_note(errors: Errors) -> str:
    if len({task for task, _ in errors}) < 2:
        return ""
    said = (f"{paper.NAMES[m]} {', '.join(tasks)}" for m, tasks in _whole(errors).items())
    return f" Mean of tasks, those without a seed left out: {'; '.join(said)}."


def _error_rows(errors: Errors) -> list[list[str]]:
    """A row for each task and rule, and the mean over tasks, taken seed by seed."""
    tasks = list(dict.fromkeys(task for task, _ in errors))
    whole = _whole(errors)
    rows = []
    for title in [*tasks, *(["mean of tasks"] if len(tasks) > 1 else [])]:
        for number, (rule, _, _) in enumerate(RULES):
            texts: list[str] = []
            for method in METHODS:
                of = [title] if title in tasks else whole.get(method, [])
                every = [errors[task, method] for task in of if (task, method) in errors]
                if not every:
                    texts += ["", "", ""]
                    continue
                values = np.mean([[e[seed][number] for seed in e] for e in every], axis=0)  # [S, 3]
                error, signed, cost = values.T
                texts += [interval(error), interval(signed, sign=True), f"{cost.mean():.3f}"]
            rows.append([title, rule, *texts])
    return rows


def _violation_rows(certificates: Sequence[Mapping[str, str]]) -> list[list[str]]:
    every: dict[tuple[str, str, str], list[Mapping[str, str]]] = {}
    for row in certificates:
        every.setdefault((row["task"], row["method"], row["limit"]), []).append(row)
    rows = []
    for (task, method, limit), of_seeds in every.items():
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


SCRIPT = Script(
    "pcee_control",
    __doc__,
    method_cells,
    sections,
    measurements,
    {"--splits": {"type": int, "default": 100, "help": "of the held-out rows (100)"}},
)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
