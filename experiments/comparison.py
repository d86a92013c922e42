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


def chosen_runs(record: Record) -> list[Run]:
    """Returns the runs of the record's learning rate, in the order of their seeds.

    Runs whose answers are not finite, and so have no area, are left out unless all are like that.
    """
    runs = runs_at_chosen_rate(record)
    finite = [run for run in runs if run.calibration_area is not None]
    return sorted(finite or runs, key=lambda run: run.seed)


def runs_at_chosen_rate(record: Record) -> list[Run]:
    """Returns all runs of the record's learning rate."""
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
