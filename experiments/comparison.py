"""Statistics of finished cells: scores of exits by seed, and differences paired by seed.

There are two kinds of area. An area is under the exact curve, of all thresholds; a grid area
is under the paper's curve of 11 thresholds, up to the full model's cost. What is claimed of methods
at set costs, or over costs, is read from the exact curve.

Shape letters: S seed, E exit, K cost, T threshold.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sweet_jax.exits.metrics import mean_interval


@dataclasses.dataclass(frozen=True)
class Run:
    """Scores of one seed and learning rate of a cell, on validation rows, as fractions.

    Attributes:
      seed, learning_rate: of the run.
      scores: of each exit alone, by layer.
      diverged: of each exit that collapsed or diverged what it did and when, by layer.
      area: mean score under the exact curve over its own range of cost.
      calibration_area: the same on the rows fitted on; None where the logits are not finite.
      area_to_full, grid_area: see `areas_to_full` and `grid_areas`.
      exact, grid: scores at set costs of the exact curve and of the paper's 11 thresholds, by cost
        with four digits; without the costs that are not reached.

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
    """Results of a finished cell.

    Attributes:
      config: of its runs, as JSON has it, without what depends on the machine.
      metric: of the scores, "accuracy", "f1" or "matthews".
      n: numbers of rows, by "train", "calibration" and "validation".
      fitted_on: "held_out", or the rows that temperatures and rates were chosen on instead.
      learning_rate: the one that the area on the rows fitted on chose.
      runs: one for each seed and learning rate.
      data_sha256: digest of the task's rows; None of old records.

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
    "A star: an exit that collapsed (it answers one class only) or diverged (its loss is not "
    "finite), of at least one seed; (n=..): of so many seeds, the others' answers were not finite."
)
AREA = (
    "Area: mean score under the exact curve, of all thresholds, over the costs that the method can "
    "spend."
)
PAIRED = (
    "Points, paired by seed, mean and 95% interval over seeds (Student), in bold where it leaves "
    "out zero. Chosen: each at the rate that its own area chose; below, both at one rate, where "
    "that is another comparison."
)


def chosen_runs(record: Record) -> list[Run]:
    """Returns the runs of the learning rate with the largest area on the rows fitted on, by seed.

    Without those whose answers are not finite, which have no area, unless that is all of them.
    """
    found = _at_its_rate(record)
    sound = [r for r in found if r.calibration_area is not None]
    return sorted(sound or found, key=lambda r: r.seed)


def _at_its_rate(record: Record) -> list[Run]:
    return [r for r in record.runs if r.learning_rate == record.learning_rate]


def at_rate(record: Record, rate: float) -> Record:
    """Returns the same cell as if that learning rate had been chosen."""
    return dataclasses.replace(record, learning_rate=rate)


def exit_scores(record: Record) -> np.ndarray:
    """Returns the scores of the exits in per cent, float64 [S, E]."""
    return np.asarray([[100 * v for v in r.scores.values()] for r in chosen_runs(record)])


def areas(record: Record) -> np.ndarray:
    """Returns areas in per cent, float64 [S]: under the exact curve, over its own range of cost."""
    return np.asarray([100 * r.area for r in chosen_runs(record)])


def areas_to_full(record: Record) -> np.ndarray:
    """Returns areas under the exact curve up to the full model's cost, in per cent, float64 [S].

    From the first exit's cost. So Multi-Model, whose own range ends beyond the full model's cost,
    is compared where the other methods are; of these it is `areas`.
    """
    return np.asarray([100 * r.area_to_full for r in chosen_runs(record)])


def grid_areas(record: Record) -> np.ndarray:
    """Returns what `areas_to_full` does, under the paper's curve of 11 thresholds, float64 [S].

    Straight lines stand for what lies between the points, which may be far apart.
    """
    return np.asarray([100 * r.grid_area for r in chosen_runs(record)])


def scores_at(costs: Sequence[float], record: Record) -> np.ndarray:
    """Returns scores in per cent at set costs, read from the exact curve, float64 [S, K]."""
    return np.asarray([[100 * r.exact[f"{c:.4g}"] for c in costs] for r in chosen_runs(record)])


def mean_to_full(cost: np.ndarray, score: np.ndarray) -> float:
    """Returns the mean score of a curve [T] from its first cost to the full model's."""
    if cost[0] >= 1:
        return float(score[0])
    end = min(1.0, float(cost[-1]))  # a curve that ends before spends no more
    inside = cost < end
    x = np.append(cost[inside], [end, 1.0])
    y = np.append(score[inside], [np.interp(end, cost, score)] * 2)
    return float(np.trapezoid(y, x) / (1 - cost[0]))


def exits_and_area(record: Record) -> np.ndarray:
    """Scores of the exits, then the area (see `areas`), in per cent: float64 [S, E + 1]."""
    return np.column_stack([exit_scores(record), areas(record)])


def exits_and_area_to_full(record: Record) -> np.ndarray:
    """Scores of the exits, then the area as `areas_to_full` has it: float64 [S, E + 1]."""
    return np.column_stack([exit_scores(record), areas_to_full(record)])


def format_rate(record: Record) -> str:
    """Returns the learning rate that a cell's area chose, as text."""
    return f"{record.learning_rate:g}"


def format_columns(
    record: Record,
    of: Callable[[Record], np.ndarray] = exits_and_area,
    as_text: Callable[[np.ndarray], str] | None = None,
) -> list[str]:
    """Returns of(record) column by column as text, what collapsed or diverged with a star.

    Where a seed is left out (see `chosen`), its exits have their star too, and every column says
    how many seeds it is of.
    """
    layers = list(record.runs[0].scores)
    every, left = _at_its_rate(record), len(chosen_runs(record))
    bad = {layer for r in every for layer in r.diverged}
    found = [(as_text or format_interval)(column) for column in of(record).T]
    return [
        text
        + "*" * (place < len(layers) and layers[place] in bad)
        + f" (n={left})" * (left < len(every))
        for place, text in enumerate(found)
    ]


def paired_differences(records: Sequence[Record], of: Callable[[Record], np.ndarray]) -> np.ndarray:
    """Returns of(one) - of(other), seed by seed over the seeds that all have: float64 [S, ...].

    Of four records (one - other) - (third - fourth).
    """
    values = [dict(zip((r.seed for r in chosen_runs(x)), of(x), strict=True)) for x in records]
    signs = (1, -1, -1, 1)[: len(records)]
    return np.asarray(
        [
            sum(sign * of_seed[seed] for sign, of_seed in zip(signs, values, strict=True))
            for seed in common_seeds(records)
        ]
    )


def common_seeds(records: Sequence[Record]) -> list[int]:
    """Returns the seeds that all the records have, ascending."""
    return sorted(set.intersection(*({r.seed for r in chosen_runs(x)} for x in records)))


def differences(
    title: str,
    pairs: Mapping[str, Sequence[Record | None]],
    of: Callable[[Record], np.ndarray],
) -> list[list[str]]:
    """Returns table rows (title, task, rate, values of one - other paired by seed).

    `pairs` holds by task two records to compare, or four (see `paired`); a task that lacks one is
    left out. First each record at the rate that its area chose, which may differ from the other's;
    then, where that is not the same comparison, both at each rate.
    """
    whole = {t: [r for r in given if r] for t, given in pairs.items() if given and all(given)}
    rows = _rows(title, whole, of, "chosen")
    rates = sorted({r.learning_rate for g in whole.values() for x in g for r in x.runs})
    for value in rates:
        if any(x.learning_rate != value for given in whole.values() for x in given):
            fixed = {t: [at_rate(x, value) for x in given] for t, given in whole.items()}
            rows += _rows(title, fixed, of, f"{value:g}")
    return rows


def _rows(
    title: str,
    pairs: Mapping[str, Sequence[Record]],
    of: Callable[[Record], np.ndarray],
    label: str,
) -> list[list[str]]:
    """Returns a row for each task and one for their mean, taken seed by seed as the interval is."""
    rows, every, of_task = [], [], []
    for task, given in pairs.items():
        if all(map(chosen_runs, given)) and len(
            gaps := paired_differences(given, of)
        ):  # [S, columns]
            every.append(gaps)
            of_task.append(common_seeds(given))
            rates = ", ".join(dict.fromkeys(map(format_rate, given)))
            shown = f"{label}: {rates}" if label == "chosen" else label
            fewer = len(gaps) < max(len(_at_its_rate(x)) for x in given)
            shown += f" (n={len(gaps)})" * fewer
            rows.append([title, task, shown, *(format_interval(g, sign=True) for g in gaps.T)])
    if len(every) > 1 and all(seeds == of_task[0] for seeds in of_task):
        columns = [format_interval(g, sign=True) for g in np.mean(every, axis=0).T]
        rows.append([title, f"mean of {len(every)} tasks", label, *columns])
    return rows


def format_interval(values: ArrayLike, sign: bool = False) -> str:
    """Returns mean and half of the 95% interval over seeds (Student) as text; bold if 0 is outside.

    Empty where a value is not a number.
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
    """Returns mean and standard deviation over seeds as text."""
    values = np.asarray(values, np.float64)
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")
