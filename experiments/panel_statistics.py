"""Statistics of experiments.panel: paired differences, Holm's method, the criterion, the goals.

Shape letters: S seed, E exit, D bootstrap draws, P draws of rows and seeds, H hypotheses.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.panel_records import Record, Scores, read_record
from experiments.panel_variants import (
    AS_PUBLISHED,
    BASELINES,
    CELLS,
    METHODS,
    READOUTS,
    VARIANTS,
    stored_as,
)

_KINDS = ("trained", "refit")
_SEED_DRAWS = 20  # draws of seeds for each draw of rows
LEVEL = 0.05  # level of significance, for all comparisons of a table together

# Scores by cell, and then by "VARIANT KIND" or the name of a baseline.
ScoresByCell = Mapping[str, Mapping[str, Scores]]


class Comparison(NamedTuple):
    """Holds a difference of areas with its 95% interval and its uncorrected p-value."""

    value: float
    low: float
    high: float
    p: float


@functools.cache  # several tables make the same comparisons
def compare(first: Scores, second: Scores) -> Comparison:
    """Returns the difference of the areas of two variants of a cell, paired by seed and by row.

    See `compare_draws`. Both variants must have `drawn_area`.
    """
    assert first.drawn_area is not None, "first has no drawn areas"
    assert second.drawn_area is not None, "second has no drawn areas"
    value = float((first.area - second.area).mean())
    return compare_draws(value, first.drawn_area - second.drawn_area)


def compare_draws(value: float, gaps: np.ndarray) -> Comparison:
    """Returns a difference with its bootstrap interval and p-value.

    The bootstrap resamples rows, the same for both sides, and seeds with replacement. The interval
    has its percentiles; the two-sided p-value is that of a normal distribution with the standard
    deviation of the draws. With three seeds, this says little about other seeds.

    Args:
      value: difference on the original rows, mean over seeds.
      gaps: difference on the drawn rows, float64 [D, S].

    """
    count = gaps.shape[1]
    seeds = np.random.default_rng(1).integers(0, count, (_SEED_DRAWS, len(gaps), count))
    means = np.take_along_axis(gaps[None], seeds, axis=2).mean(axis=2).ravel()  # [P]
    low, high = np.quantile(means, [0.025, 0.975])
    return Comparison(value, float(low), float(high), two_sided(value, float(means.std())))


def two_sided(value: float, spread: float) -> float:
    """Returns the two-sided p-value of a value, normal with mean 0 and the deviation `spread`."""
    from scipy import stats

    if spread == 0:
        return float(value == 0)
    return float(2 * stats.norm.sf(abs(value) / spread))


def holm(p: Sequence[float]) -> np.ndarray:
    """Returns p-values adjusted for multiple comparisons by Holm's method (1979), float64 [H]."""
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.maximum.accumulate(np.asarray(p, np.float64)[order] * factors)
    result = np.empty(len(p))
    result[order] = np.minimum(adjusted, 1)
    return result


def load_scores(output: Path) -> tuple[dict[str, dict[str, Scores]], dict[tuple[str, str], Record]]:
    """Returns the scores of the cells that have records, and the records by (cell, variant)."""
    by_cell: dict[str, dict[str, Scores]] = {}
    records = {}
    for cell in CELLS:
        for variant in (BASELINES, *VARIANTS):
            stored = stored_as(cell, variant)
            record = read_record(output, cell, stored)
            if record is None:
                continue
            if stored == variant:
                records[cell, variant] = record
            for kind, scores in record.scores.items():
                name = kind if variant == BASELINES else f"{variant} {kind}"
                by_cell.setdefault(cell, {})[name] = scores
    return by_cell, records


def variants_with_exits(by_cell: ScoresByCell) -> list[str]:
    """Returns the names of all variants that have several exits, in the order of VARIANTS."""
    names = {n for rows in by_cell.values() for n, s in rows.items() if s.drawn_area is not None}
    order = [f"{variant} {kind}" for variant in VARIANTS for kind in _KINDS]
    return [name for name in order if name in names]


def cells_with(by_cell: ScoresByCell, names: Iterable[str]) -> list[str]:
    """Returns the cells that have scores of all these names."""
    required = set(names)
    return [cell for cell, rows in by_cell.items() if required <= set(rows)]


def names_in_most_cells(by_cell: ScoresByCell, names: Iterable[str]) -> list[str]:
    """Returns the names that have scores in the largest number of cells."""
    counts = {name: sum(name in rows for rows in by_cell.values()) for name in names}
    return [name for name, count in counts.items() if count == max(counts.values())]


def mean_area(by_cell: ScoresByCell, name: str, cells: Sequence[str]) -> float:
    """Returns the mean area of a variant over cells, NaN if there are none."""
    return float(np.mean([by_cell[c][name].area.mean() for c in cells])) if cells else np.nan


def published_references() -> dict[str, str]:
    """Returns the name of the variant of each method as published, by method."""
    return {m: f"{v} trained" for m, v in zip(METHODS, AS_PUBLISHED, strict=True)}


def best_readout_references(by_cell: ScoresByCell) -> dict[str, str]:
    """Returns the variant of each method with its best read-out, by method.

    A read-out is a pooling, an initialization and a kind of heads. The best one has the largest
    mean area; it is the same for all cells, since the best in each cell could be so by chance. Only
    the read-outs that are done in the most cells are compared, over the cells that have all of
    them.
    """
    best = {}
    for method in METHODS:
        own = {f"{method}-{readout} {kind}" for readout in READOUTS for kind in _KINDS}
        names = [name for name in variants_with_exits(by_cell) if name in own]
        names = names_in_most_cells(by_cell, names)
        cells = cells_with(by_cell, names)
        if names and cells:
            best[method] = max(names, key=lambda name: mean_area(by_cell, name, cells))
    return best


class BestComparison(NamedTuple):
    """Holds the comparison of a variant with the best of three references in each cell.

    Attributes:
      cells: cells that have the variant and all three references.
      best: name of the reference with the largest mean area in each cell.
      gaps: difference of the variant from that reference in each cell.
      p: p-value in each cell, adjusted over the cells, float64.

    """

    cells: list[str]
    best: list[str]
    gaps: list[Comparison]
    p: np.ndarray

    @property
    def below(self) -> list[str]:
        """Returns the cells where the variant is significantly below."""
        pairs = zip(self.cells, self.gaps, self.p, strict=True)
        return [cell for cell, gap, p in pairs if gap.value < 0 and p < LEVEL]

    @property
    def at_or_above(self) -> int:
        """Returns the number of cells where the variant's area is not smaller."""
        return sum(gap.value >= 0 for gap in self.gaps)


def compare_to_best(
    by_cell: ScoresByCell, name: str, references: Mapping[str, str]
) -> BestComparison:
    """Compares a variant with the best of three references in every cell that has all of them.

    There are no cells if fewer than three references are known.
    """
    names = list(references.values())
    cells = cells_with(by_cell, [name, *names]) if len(names) == len(METHODS) else []
    best = []
    for cell in cells:
        areas = {n: float(by_cell[cell][n].area.mean()) for n in names}
        best.append(max(areas, key=areas.__getitem__))
    gaps = [compare(by_cell[c][name], by_cell[c][b]) for c, b in zip(cells, best, strict=True)]
    return BestComparison(cells, best, gaps, holm([gap.p for gap in gaps]))
