"""Statistics of experiments.panel: paired differences, Holm's correction, the criterion, the aims.

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
_SEED_DRAWS = 20  # of each draw of rows
LEVEL = 0.05  # of significance, of a whole table
NEAR = 0.005  # what "less half a point" allows

# By cell, and then by "VARIANT KIND", or the name of a baseline.
ScoresByCell = Mapping[str, Mapping[str, Scores]]


class Comparison(NamedTuple):
    """Holds a difference of areas, its 95% interval, and its p-value before any correction."""

    value: float
    low: float
    high: float
    p: float


@functools.cache  # tables ask for the same ones again
def compare(one: Scores, other: Scores) -> Comparison:
    """Compares the areas of two variants of a cell, paired by seed and by drawn rows.

    By a bootstrap that draws rows, the same on both sides, and seeds with replacement: percentile
    interval, and a two-sided p-value of the normal distribution with the draws' standard deviation.
    Of three seeds it says little of what a fourth would do.
    """
    assert one.drawn_area is not None, "one has no drawn areas"
    assert other.drawn_area is not None, "other has no drawn areas"
    value = float((one.area - other.area).mean())
    return compare_draws(value, one.drawn_area - other.drawn_area)


def compare_draws(value: float, gaps: np.ndarray) -> Comparison:
    """Returns a difference with its interval and p-value, of its values on drawn rows.

    Args:
      value: on the rows as they are, the mean over seeds.
      gaps: float64 [D, S], of each draw of rows and each seed.

    """
    count = gaps.shape[1]
    seeds = np.random.default_rng(1).integers(0, count, (_SEED_DRAWS, len(gaps), count))
    means = np.take_along_axis(gaps[None], seeds, axis=2).mean(axis=2).ravel()  # [P]
    low, high = np.quantile(means, [0.025, 0.975])
    return Comparison(value, float(low), float(high), two_sided(value, float(means.std())))


def two_sided(value: float, spread: float) -> float:
    """Returns the p-value of no difference, of the normal distribution with such a spread."""
    from scipy import stats

    if spread == 0:
        return float(value == 0)
    return float(2 * stats.norm.sf(abs(value) / spread))


def holm(p: Sequence[float]) -> np.ndarray:
    """Returns p-values adjusted by Holm (1979) for all of them together, float64 [H]."""
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.maximum.accumulate(np.asarray(p, np.float64)[order] * factors)
    found = np.empty(len(p))
    found[order] = np.minimum(adjusted, 1)
    return found


def load_scores(output: Path) -> tuple[dict[str, dict[str, Scores]], dict[tuple[str, str], Record]]:
    """Returns the scores of all cells with any, and the records by (cell, variant)."""
    found: dict[str, dict[str, Scores]] = {}
    records = {}
    for cell in CELLS:
        for variant in (BASELINES, *VARIANTS):
            own = stored_as(cell, variant)
            record = read_record(output, cell, own)
            if record is None:
                continue
            if own == variant:
                records[cell, variant] = record
            for kind, scores in record.scores.items():
                name = kind if variant == BASELINES else f"{variant} {kind}"
                found.setdefault(cell, {})[name] = scores
    return found, records


def variants_with_exits(found: ScoresByCell) -> list[str]:
    """Returns the names of all that have a curve, in the order of the variants."""
    names = {n for rows in found.values() for n, s in rows.items() if s.drawn_area is not None}
    order = [f"{variant} {kind}" for variant in VARIANTS for kind in _KINDS]
    return [name for name in order if name in names]


def cells_with(found: ScoresByCell, names: Iterable[str]) -> list[str]:
    """Returns the cells that have all of these."""
    wanted = set(names)
    return [cell for cell, rows in found.items() if wanted <= set(rows)]


def mean_area(found: ScoresByCell, name: str, cells: Sequence[str]) -> float:
    """Returns the mean area of a variant over cells, NaN for none."""
    return float(np.mean([found[c][name].area.mean() for c in cells])) if cells else np.nan


def published_references() -> dict[str, str]:
    """Returns the name of each method as published, by method."""
    return {m: f"{v} trained" for m, v in zip(METHODS, AS_PUBLISHED, strict=True)}


def best_readout_references(found: ScoresByCell) -> dict[str, str]:
    """Returns each method's pooling, start and refit with the largest mean area, by method.

    One for all cells: the best of each cell would be the luckiest. Of the read-outs that are done
    in the most cells, over the cells that have all of these.
    """
    best = {}
    for method in METHODS:
        own = {f"{method}-{readout} {kind}" for readout in READOUTS for kind in _KINDS}
        names = [n for n in variants_with_exits(found) if n in own]
        done = {n: sum(n in rows for rows in found.values()) for n in names}
        most = [n for n in names if done[n] == max(done.values())]
        cells = cells_with(found, most)
        if most and cells:
            best[method] = max(most, key=lambda n: mean_area(found, n, cells))
    return best


class BestComparison(NamedTuple):
    """Holds how a variant stands to the best of three references, cell by cell."""

    cells: list[str]  # that have the variant and all three
    against: list[str]  # the best of the three by mean area, of each cell
    gaps: list[Comparison]
    p: np.ndarray  # float64, of each cell, adjusted over the cells

    @property
    def below(self) -> list[str]:
        """Returns the cells where the variant is significantly below."""
        pairs = zip(self.cells, self.gaps, self.p, strict=True)
        return [cell for cell, gap, p in pairs if gap.value < 0 and p < LEVEL]

    @property
    def at_or_above(self) -> int:
        """Returns in how many cells the area is not smaller."""
        return sum(gap.value >= 0 for gap in self.gaps)


def compare_to_best(
    found: ScoresByCell, name: str, references: Mapping[str, str]
) -> BestComparison:
    """Compares a variant with the best of the references in every cell that has all of them."""
    names = list(references.values())
    cells = cells_with(found, [name, *names]) if len(names) == len(METHODS) else []
    against = [max(names, key=lambda n, c=c: found[c][n].area.mean()) for c in cells]
    gaps = [compare(found[c][name], found[c][best]) for c, best in zip(cells, against, strict=True)]
    return BestComparison(cells, against, gaps, holm([gap.p for gap in gaps]))


def choose_default(found: ScoresByCell) -> tuple[str | None, list[str]]:
    """Applies the criterion of docs/reproduction.md.

    Returns:
      The variant with the largest mean area that is in no cell significantly below, None where
      there is none; and all variants compared, the largest mean area first.

    """
    names = variants_with_exits(found)
    done = {n: sum(n in rows for rows in found.values()) for n in names}
    names = [n for n in names if done[n] == max(done.values())]
    cells = cells_with(found, names)
    names.sort(key=lambda n: -mean_area(found, n, cells))
    references = (published_references(), best_readout_references(found))
    for name in names:
        tried = [compare_to_best(found, name, r) for r in references]
        if all(s.cells and not s.below for s in tried):
            return name, names
    return None, names


class Count(NamedTuple):
    """Holds in how many of how many cells something holds, and the share that was aimed at."""

    what: str
    good: int
    cells: int
    aim: float

    @property
    def met(self) -> bool:
        """Returns whether the share is reached."""
        return self.cells > 0 and self.good >= self.aim * self.cells - 1e-9


def aims(found: ScoresByCell, name: str) -> list[Count]:
    """Returns what the default is asked for, and in how many cells it is so."""
    cells = {c: rows for c, rows in found.items() if name in rows}
    probes = [f"probe_{layer}" for layer in (1, 2, 4, 6)]
    probed = [c for c, rows in cells.items() if {*probes, "tfidf"} <= set(rows)]
    plain = [c for c, rows in cells.items() if "plain trained" in rows]

    def exits(cell: str) -> np.ndarray:
        return cells[cell][name].exits.mean(axis=0)  # [E]

    def baseline(cell: str, which: str) -> float:
        return float(cells[cell][which].exits.mean())

    frozen = [
        (exits(c) >= np.asarray([baseline(c, p) for p in probes]) - NEAR).all() for c in probed
    ]
    words = [(exits(c) >= baseline(c, "tfidf") - NEAR).all() for c in probed]
    last = [exits(c)[-1] >= baseline(c, "plain trained") - NEAR for c in plain]
    own = compare_to_best(found, name, best_readout_references(found))
    usual = compare_to_best(found, name, published_references())
    return [
        Count("every exit at or above the frozen probe less 0.5", sum(frozen), len(probed), 0.9),
        Count("every exit at or above TF-IDF less 0.5", sum(words), len(probed), 0.9),
        Count("last exit at or above the plain full model less 0.5", sum(last), len(plain), 0.9),
        Count(
            "area at or above all three methods with their own best read-out",
            own.at_or_above,
            len(own.cells),
            0.8,
        ),
        Count(
            "area not significantly below any of these",
            len(own.cells) - len(own.below),
            len(own.cells),
            1.0,
        ),
        Count(
            "area not significantly below any of the three methods as they are",
            len(usual.cells) - len(usual.below),
            len(usual.cells),
            1.0,
        ),
    ]
