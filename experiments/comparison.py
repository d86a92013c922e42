"""Statistics of finished cells: scores of exits by seed, and differences paired by seed.

There are two kinds of area. An area is that under the exact curve of all thresholds. A grid area is
that under the paper's curve of 11 thresholds, up to the full model's cost. Comparisons of methods
at fixed costs, or over costs, use the exact curve.

Shape letters: S seed, E exit, K cost, T threshold, C table columns.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sweet_jax.exits.metrics import mean_interval


@dataclasses.dataclass(frozen=True)
class Run:
    """Holds the scores of one seed and learning rate of a cell, on validation rows, as fractions.

    Attributes:
      seed, learning_rate: seed and learning rate of the run.
      scores: score of each exit alone, by layer.
      diverged: a description and the step for each exit that collapsed or diverged, by layer.
      area: mean score under the exact curve, over its own range of costs.
      calibration_area: the same on calibration rows; None if the logits are not finite.
      area_to_full, grid_area: see `areas_to_full` and `grid_areas`.
      exact, grid: scores at fixed costs on the exact curve and on the paper's curve, by cost with
        four digits, without the costs that are not reached.

    """

    seed: int
    learning_rate: float
    scores: Mapping[int, float]
    diverged: Mapping[int, str]
    area: float
    calibration_area: float | None
    area_to_full: float = np.nan
    grid_area: float = np.nan
    exact: Mapping[str, float] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
    """Holds the results of a finished cell.

    Attributes:
      config: config of its runs as JSON values, without the keys that depend on the machine.
      metric: metric of the scores, "accuracy", "f1" or "matthews".
      n: numbers of rows, by "train", "calibration" and "validation".
      fitted_on: "held_out", or the kind of rows that served as calibration rows instead.
      learning_rate: rate with the largest area on calibration rows.
      runs: runs of every seed and learning rate.
      data_sha256: digest of the task's rows; None in old records.

    """

    config: Mapping[str, Any]
    metric: str
    n: Mapping[str, int]
    fitted_on: str
    learning_rate: float
    runs: tuple[Run, ...]
    data_sha256: str | None = None


Records = Mapping[str, Record]

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


def chosen_runs(record: Record) -> list[Run]:
    """Returns the runs of the record's learning rate, in the order of their seeds.

    Runs whose answers are not finite, and so have no area, are left out unless all are like that.
    """
    runs = _runs_at_chosen_rate(record)
    finite = [run for run in runs if run.calibration_area is not None]
    return sorted(finite or runs, key=lambda run: run.seed)


def _runs_at_chosen_rate(record: Record) -> list[Run]:
    return [r for r in record.runs if r.learning_rate == record.learning_rate]


def at_rate(record: Record, rate: float) -> Record:
    """Returns the record of the same cell with another chosen learning rate."""
    return dataclasses.replace(record, learning_rate=rate)


def exit_scores(record: Record) -> np.ndarray:
    """Returns the scores of the exits in per cent, float64 [S, E]."""
    return np.asarray([[100 * v for v in r.scores.values()] for r in chosen_runs(record)])


def areas(record: Record) -> np.ndarray:
    """Returns the areas under the exact curve over its own range of costs, in %, float64 [S]."""
    return np.asarray([100 * r.area for r in chosen_runs(record)])


def areas_to_full(record: Record) -> np.ndarray:
    """Returns the areas from the first exit's to the full model's cost, in per cent, float64 [S].

    They compare Multi-Model, whose own range ends above the full model's cost, over the range of
    the other methods, for which they equal `areas`.
    """
    return np.asarray([100 * r.area_to_full for r in chosen_runs(record)])


def grid_areas(record: Record) -> np.ndarray:
    """Returns the areas like `areas_to_full`, but of the paper's curve of 11 thresholds, [S].

    The curve is interpolated linearly between its points, which may be far apart.
    """
    return np.asarray([100 * r.grid_area for r in chosen_runs(record)])


def scores_at(costs: Sequence[float], record: Record) -> np.ndarray:
    """Returns the scores at some costs on the exact curve, in per cent, float64 [S, K]."""
    return np.asarray([[100 * r.exact[f"{c:.4g}"] for c in costs] for r in chosen_runs(record)])


def mean_to_full(cost: np.ndarray, score: np.ndarray) -> float:
    """Returns the mean score of a curve [T] from its first cost to the full model's.

    A curve that ends at a lower cost keeps its last score.
    """
    if cost[0] >= 1:
        return float(score[0])
    end = min(1.0, float(cost[-1]))
    inside = cost < end
    x = np.append(cost[inside], [end, 1.0])
    y = np.append(score[inside], [np.interp(end, cost, score)] * 2)
    return float(np.trapezoid(y, x) / (1 - cost[0]))


def exits_and_area(record: Record) -> np.ndarray:
    """Returns the scores of the exits, then `areas`, in per cent, float64 [S, E + 1]."""
    return np.column_stack([exit_scores(record), areas(record)])


def exits_and_area_to_full(record: Record) -> np.ndarray:
    """Returns the scores of the exits, then `areas_to_full`, in per cent, float64 [S, E + 1]."""
    return np.column_stack([exit_scores(record), areas_to_full(record)])


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
    runs, count = _runs_at_chosen_rate(record), len(chosen_runs(record))
    diverged = {layer for run in runs for layer in run.diverged}
    columns = [(formatter or format_interval)(column) for column in statistic(record).T]
    return [
        text
        + "*" * (place < len(layers) and layers[place] in diverged)
        + f" (n={count})" * (count < len(runs))
        for place, text in enumerate(columns)
    ]


def paired_differences(
    records: Sequence[Record], statistic: Callable[[Record], np.ndarray]
) -> np.ndarray:
    """Returns the differences of a statistic between records, paired by seed: float64 [S, ...].

    The seeds are those that all records have.

    Args:
      records: two, a and b, for a - b; or four, a, b, c and d, for (a - b) - (c - d).
      statistic: from a record to values [S, ...].

    """
    values = [
        dict(zip((run.seed for run in chosen_runs(record)), statistic(record), strict=True))
        for record in records
    ]
    signs = (1, -1, -1, 1)[: len(records)]
    return np.asarray(
        [
            sum(sign * by_seed[seed] for sign, by_seed in zip(signs, values, strict=True))
            for seed in common_seeds(records)
        ]
    )


def common_seeds(records: Sequence[Record]) -> list[int]:
    """Returns the seeds that all the records have, ascending."""
    return sorted(set.intersection(*({run.seed for run in chosen_runs(r)} for r in records)))


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
        fewer = len(gap) < max(len(_runs_at_chosen_rate(record)) for record in records)
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
