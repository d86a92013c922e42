"""Formats the scores of finished cells and the differences between them for tables.

Shape letters: S seed, C table columns.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from experiments.comparison import (
    Record,
    at_rate,
    chosen_runs,
    common_seeds,
    exits_and_area,
    paired_differences,
    runs_at_chosen_rate,
)
from sweet_jax.exits.metrics import mean_interval

DIVERGED = (
    "A star: with at least one seed, the exit collapsed (it answers one class only) or diverged "
    "(its loss is not finite); (n=..): number of seeds whose answers were finite, if not all."
)

AREA = (
    "Area: mean score under the exact curve, of all thresholds, over the method's range of costs."
)

PAIRED = (
    "Points, paired by seed: mean and 95% interval over seeds (Student), bold if it excludes zero. "
    "Chosen: each at its own chosen learning rate; below, both at the same rate, if that is "
    "another comparison."
)


def format_rate(record: Record) -> str:
    """Formats the chosen learning rate of a cell."""
    return f"{record.learning_rate:g}"


def format_columns(
    record: Record,
    statistic: Callable[[Record], np.ndarray] = exits_and_area,
    formatter: Callable[[np.ndarray], str] | None = None,
) -> list[str]:
    """Formats the columns of a statistic over seeds, with a star for exits that diverged.

    If the runs of some seeds are left out (see `chosen_runs`), every column has the number of
    seeds, and the exits that diverged in these runs have their star too.

    Args:
      record: record of a cell.
      statistic: from a record to values [S, C], whose first columns are the exits.
      formatter: from the values of a column [S] to its text; default `format_interval`.

    """
    layers = list(record.runs[0].scores)
    runs, count = runs_at_chosen_rate(record), len(chosen_runs(record))
    diverged = {layer for run in runs for layer in run.diverged}
    columns = [(formatter or format_interval)(column) for column in statistic(record).T]
    return [
        text
        + "*" * (place < len(layers) and layers[place] in diverged)
        + f" (n={count})" * (count < len(runs))
        for place, text in enumerate(columns)
    ]


def differences(
    title: str,
    compared: Mapping[str, Sequence[Record | None]],
    statistic: Callable[[Record], np.ndarray],
) -> list[list[str]]:
    """Returns table rows of differences: title, task, learning rates, and a text for each column.

    The first rows have each record at its chosen rate, which may differ between the records; the
    others have all records at the same rate, for each rate at which this is another comparison.

    Args:
      title: first column of the rows.
      compared: two or four records by task, see `paired_differences`; a task with a missing record
        (None) is left out.
      statistic: from a record to values [S, C].

    """
    complete = {
        task: [record for record in records if record]
        for task, records in compared.items()
        if records and all(records)
    }
    rows = _difference_rows(title, complete, statistic, "chosen")
    every = [record for records in complete.values() for record in records]
    for rate in sorted({run.learning_rate for record in every for run in record.runs}):
        if any(record.learning_rate != rate for record in every):
            fixed = {t: [at_rate(r, rate) for r in records] for t, records in complete.items()}
            rows += _difference_rows(title, fixed, statistic, f"{rate:g}")
    return rows


def _difference_rows(
    title: str,
    compared: Mapping[str, Sequence[Record]],
    statistic: Callable[[Record], np.ndarray],
    label: str,
) -> list[list[str]]:
    """Returns a row for each task, and one for the mean over tasks, which is taken by seed."""
    rows, gaps, seeds = [], [], []  # of the tasks: gaps [S, C], seeds [S]
    for task, records in compared.items():
        if not all(map(chosen_runs, records)):
            continue
        if not len(gap := paired_differences(records, statistic)):
            continue
        gaps.append(gap)
        seeds.append(common_seeds(records))
        rates = ", ".join(dict.fromkeys(map(format_rate, records)))
        shown = f"{label}: {rates}" if label == "chosen" else label
        fewer = len(gap) < max(len(runs_at_chosen_rate(record)) for record in records)
        shown += f" (n={len(gap)})" * fewer
        rows.append([title, task, shown, *(format_interval(g, sign=True) for g in gap.T)])
    if len(gaps) > 1 and all(each == seeds[0] for each in seeds):
        columns = [format_interval(g, sign=True) for g in np.mean(gaps, axis=0).T]
        rows.append([title, f"mean of {len(gaps)} tasks", label, *columns])
    return rows


def format_interval(values: ArrayLike, sign: bool = False) -> str:
    """Formats the mean over seeds and half the width of Student's 95% interval.

    Returns "" if a value is not finite.

    Args:
      values: values by seed, [S].
      sign: format a difference: with its sign, and bold if the interval excludes zero.

    """
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return ""
    mean, half = mean_interval(values)
    text = f"{mean:+z.1f}" if sign else f"{mean:.1f}"
    if half is None:
        return text
    text = f"{text} ± {half:.1f}"
    return f"**{text}**" if sign and abs(mean) > half else text


def format_spread(values: np.ndarray) -> str:
    """Formats the mean and the standard deviation over seeds, of values [S]."""
    values = np.asarray(values, np.float64)
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")
