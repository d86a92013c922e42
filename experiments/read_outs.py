"""Compares read-outs: whether the gap between the methods remains with mean pooling and a probe.

  python -m experiments.read_outs --model=minilm-l6 --data_dir=DIR
  python -m experiments.read_outs --model=mpnet-base --set=dtype=bfloat16        # on a GPU

This is not in the paper, which reads the first token through a pooler whose classifier starts at
random: these are the cells of experiments.individual. Beside them, the script trains with the mean
of a text's tokens and classifiers initialized as logistic regressions on the frozen encoder's
features (which need another tenth of the training rows to choose their penalty), and evaluates
these regressions on the frozen encoder. Differences are paired by seed and by drawn rows as in
experiments.panel, and corrected with Holm's method over the table.

Cost: two more trained cells for each task; with MPNet-base, four tasks including the cells of
experiments.individual take 8 minutes of an H200. Expected, from MPNet-base: as in the paper,
Early-Exit's first exits learn nothing beside the deep ones, while the same layers trained alone do.
With mean and probe, which start them at what the frozen layers know, the methods' first exits are
alike, and SWEET's deep exits are behind (experiments/results/mpnet-base-gpu).

Shape letters: D bootstrap draw, S seed, E exit, N validation row.
"""

import argparse
import functools
import itertools
import operator
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import paper
from experiments.cells import Cell, is_finished, outputs_folder
from experiments.comparison import (
    Record,
    Records,
    chosen_runs,
    common_seeds,
    exits_and_area_to_full,
    paired_differences,
)
from experiments.comparison_tables import DIVERGED, format_columns, format_rate, format_spread
from experiments.options import chosen_methods, chosen_tasks, exit_columns, make_cell
from experiments.panel_differences import interval_text
from experiments.panel_records import bootstrap_areas, draw_counts
from experiments.panel_statistics import Comparison, compare_draws, holm
from experiments.records import read_study, read_table, replace_rows
from experiments.rendering import Section, missing_note
from experiments.runner import Script, main, study_options
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.outputs import ExitOutputs

FIRST, MEAN, FROZEN = "first token, random start", "mean and probe", "frozen"
_PROBE = {"pooling": "mean", "head_init": "probe"}
READ_OUTS: dict[str, dict[str, Any]] = {
    FIRST: {},
    MEAN: _PROBE,
    FROZEN: _PROBE | {"epochs": 0, "learning_rates": (5e-5,)},  # the rate has no effect
}


class Variant(NamedTuple):
    """Describes a method with a read-out, a key of READ_OUTS."""

    method: str
    read_out: str

    @property
    def title(self) -> str:
        """Returns its name in tables."""
        if self.read_out == FROZEN:
            return f"{FROZEN}, {MEAN}"
        return paper.NAMES[self.method] + f", {MEAN}" * (self.read_out == MEAN)


PAIRS = (
    (Variant("sweet", FIRST), Variant("early_exit", FIRST)),
    (Variant("multi_model", FIRST), Variant("early_exit", FIRST)),
    (Variant("sweet", FIRST), Variant("multi_model", FIRST)),
    (Variant("sweet", MEAN), Variant("early_exit", MEAN)),
    (Variant("early_exit", MEAN), Variant("early_exit", FIRST)),
    (Variant("early_exit", MEAN), Variant("sweet", FIRST)),
    (Variant("early_exit", MEAN), Variant("multi_model", FIRST)),
    (Variant("sweet", FIRST), Variant("early_exit", FROZEN)),
    (Variant("early_exit", MEAN), Variant("early_exit", FROZEN)),
)
_VARIANTS = tuple(dict.fromkeys(itertools.chain(*PAIRS)))
_FILE = "read_outs.csv"
_COLUMNS = ("study", "task", "one", "other", "of", "value", "low", "high", "p", "seeds", "n")


def cells(options: argparse.Namespace) -> list[Cell]:
    """Returns a cell for every task and variant that is compared with another."""
    return [
        _cell(options, task, variant)
        for task, variant in itertools.product(chosen_tasks(options), _VARIANTS)
        if variant.method in chosen_methods(options)
    ]


def _cell(options: argparse.Namespace, task: str, variant: Variant) -> Cell:
    return make_cell(options, task, variant.method, **READ_OUTS[variant.read_out])


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the scores by read-out, and the differences; none if no cell has another read-out."""
    variants = {
        (task, variant): records[name]
        for task in chosen_tasks(options)
        for variant in _VARIANTS
        if (name := _cell(options, task, variant).name) in records
    }
    if all(variant.read_out == FIRST for _, variant in variants):
        return []
    return [_scores(options, records, variants), _differences(options)]


def scores_of(output: Path) -> tuple[Sequence[str], list[list[str]]]:
    """Returns the header and the rows of a study's scores by read-out; they may be empty."""
    options = study_options(output)
    scores = sections(options, read_study(output)[0])[:1]
    return (scores[0].header, [list(row) for row in scores[0].rows]) if scores else ((), [])


def _scores(
    options: argparse.Namespace, records: Records, by_variant: dict[tuple[str, Variant], Record]
) -> Section:
    """Returns the table of scores.

    by_variant: records of the finished cells by task and variant.
    """
    rows = [
        [
            *(task, variant.title, "" if variant.read_out == FROZEN else format_rate(record)),
            *format_columns(record, exits_and_area_to_full, format_spread),
        ]
        for (task, variant), record in by_variant.items()
    ]
    variants = dict.fromkeys(v for _, v in by_variant)
    tasks = [t for t in chosen_tasks(options) if all((t, v) in by_variant for v in variants)]
    for variant in variants if len(tasks) > 1 else ():
        means = [exits_and_area_to_full(by_variant[task, variant]).mean(axis=0) for task in tasks]
        mean = [f"{value:.1f}" for value in np.mean(means, axis=0)]
        rows.append([f"mean of {', '.join(tasks)}", variant.title, "", *mean])
    missing = missing_note([c.name for c in cells(options)], records)
    return Section(
        "read-outs",
        f"Read-outs, {options.model}",
        "Mean and standard deviation over seeds, per cent; accuracy, Matthews for CoLA; validation "
        f"rows. Area: up to the full model's cost. {DIVERGED}{missing}",
        ("task", "variant", "rate", *exit_columns(options)),
        rows,
    )


def _differences(options: argparse.Namespace) -> Section:
    """Returns the table of the file that `measurements` wrote, corrected over all its rows."""
    titles = {(one.title, other.title): f"{one.title} - {other.title}" for one, other in PAIRS}
    measured = read_table(options.output / _FILE)
    adjusted = holm([float(row["p"]) for row in measured])
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row, p in zip(measured, adjusted.tolist(), strict=True):
        gap = Comparison(*(float(row[key]) for key in ("value", "low", "high", "p")))
        key = (titles[row["one"], row["other"]], row["task"])
        rows.setdefault(key, {})[row["of"]] = interval_text(gap, p)
    order = list(titles.values())
    return Section(
        "read-out-differences",
        f"Differences by read-out, {options.model}",
        "Points, with 95% intervals of a bootstrap that resamples seeds and validation rows, the "
        "same for both sides; bold if the p-value is below 0.05 after Holm's correction over the "
        "table. Each side has its own chosen learning rate. A bootstrap of few seeds varies less "
        "than new seeds would.",
        ("difference", "task", *exit_columns(options)),
        [
            [*key, *(texts.get(column, "") for column in exit_columns(options))]
            for key, texts in sorted(rows.items(), key=lambda item: order.index(item[0][0]))
        ],
    )


def measurements(options: argparse.Namespace, records: Records) -> None:
    """Writes the differences between the cells whose outputs are in --workdir."""
    differences = []
    for task in chosen_tasks(options):
        drawn: dict[Variant, tuple[Record, np.ndarray]] = {}
        for variant in _VARIANTS:
            name = _cell(options, task, variant).name
            if name in records and is_finished(options.workdir, name):
                draws = _draws(outputs_folder(options.workdir, name), records[name])
                drawn[variant] = (records[name], draws)
        for one, other in PAIRS:
            if one in drawn and other in drawn:
                about = {"study": options.output.name, "task": task}
                about |= {"one": one.title, "other": other.title}
                rows = _compare(drawn[one], drawn[other], exit_columns(options))
                differences += [about | row for row in rows]
    key = operator.itemgetter("task", "one", "other", "of")
    replace_rows(options.output / _FILE, _COLUMNS, differences, key)


def _compare(
    one: tuple[Record, np.ndarray], other: tuple[Record, np.ndarray], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns a row of the CSV file for each column, over the seeds that both cells have.

    one, other: record of a cell, and its scores on drawn rows (see `_draws`).
    """
    records = (one[0], other[0])
    seeds = common_seeds(records)
    gaps = paired_differences(records, exits_and_area_to_full) / 100  # [S, E + 1]
    first, second = (
        draws[:, [i for i, run in enumerate(chosen_runs(record)) if run.seed in seeds]]
        for record, draws in (one, other)
    )
    rows = []
    for place, column in enumerate(columns if seeds else ()):
        comparison = compare_draws(float(gaps[:, place].mean()), (first - second)[..., place])
        n = records[0].n["validation"]
        rows.append({"of": column, **comparison._asdict(), "seeds": len(seeds), "n": n})
    return rows


def _draws(folder: Path, record: Record) -> np.ndarray:
    """Returns the scores of the exits and the area on drawn rows, float64 [D, S, E + 1].

    All cells of a task have the same draws.
    """
    calibration, validation = (
        ExitOutputs.load(folder / f"{split}.npz") for split in ("calibration", "validation")
    )
    analysis = analyse(calibration, validation)
    outputs = analysis.validation
    replicas = [record.runs.index(run) for run in chosen_runs(record)]
    counts = draw_counts(outputs.labels.shape[1])  # [D, N]
    metric = outputs.objective.metric(outputs.metric)
    classes = outputs.logits.shape[-1]
    exits = []
    for replica in replicas:
        predicted, labels = outputs.predictions[replica], outputs.labels[replica]
        targets = counts @ np.asarray(metric.target_statistics(labels, classes), np.float64)
        each = np.asarray(metric.row_statistics(predicted, labels, classes), np.float64)
        exits.append([metric.value(counts @ rows, targets) for rows in each])  # [E, D]
    areas = bootstrap_areas(analysis, replicas)  # [D, S]
    return np.concatenate([np.transpose(exits, (2, 0, 1)), areas[..., None]], axis=-1)


SCRIPT = Script("read_outs", __doc__, cells, sections, measurements)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
