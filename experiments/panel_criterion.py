"""The criterion by which experiments.panel chooses the default recipe, and the goals for it.

docs/reproduction.md describes both.

Shape letters: E exit.
"""

from typing import NamedTuple

import numpy as np

from experiments.panel_statistics import (
    ScoresByCell,
    best_readout_references,
    cells_with,
    compare_to_best,
    mean_area,
    names_in_most_cells,
    published_references,
    variants_with_exits,
)

_MARGIN = 0.005 + 1e-9  # half a point, which rounding does not exceed


def choose_default(by_cell: ScoresByCell) -> tuple[str | None, list[str]]:
    """Applies the criterion of docs/reproduction.md.

    Returns:
      The variant with the largest mean area among those that are significantly below the best
      reference in no cell, None if there is none; and all variants compared, in descending order of
      their mean areas.

    """
    names = names_in_most_cells(by_cell, variants_with_exits(by_cell))
    cells = cells_with(by_cell, names)
    names.sort(key=lambda name: -mean_area(by_cell, name, cells))
    references = (published_references(), best_readout_references(by_cell))
    for name in names:
        comparisons = [compare_to_best(by_cell, name, each) for each in references]
        if all(comparison.cells and not comparison.below for comparison in comparisons):
            return name, names
    return None, names


class Goal(NamedTuple):
    """Holds a goal, the number of cells that meet it, of `cells`, and the share that must."""

    text: str
    met_in: int
    cells: int
    required: float

    @property
    def met(self) -> bool:
        """Returns whether the share of cells is reached."""
        return self.cells > 0 and self.met_in >= self.required * self.cells - 1e-9


def goals(by_cell: ScoresByCell, name: str) -> list[Goal]:
    """Returns the goals for the default (docs/reproduction.md), counted for a variant."""
    cells = {c: rows for c, rows in by_cell.items() if name in rows}
    probes = [f"probe_{layer}" for layer in (1, 2, 4, 6)]
    probed = [c for c, rows in cells.items() if {*probes, "tfidf"} <= set(rows)]
    plain = [c for c, rows in cells.items() if "plain trained" in rows]

    def exits(cell: str) -> np.ndarray:
        return cells[cell][name].exits.mean(axis=0)  # [E]

    def baseline(cell: str, which: str) -> float:
        return float(cells[cell][which].exits.mean())

    frozen = [
        bool((exits(c) >= np.asarray([baseline(c, p) for p in probes]) - _MARGIN).all())
        for c in probed
    ]
    tfidf = [bool((exits(c) >= baseline(c, "tfidf") - _MARGIN).all()) for c in probed]
    last = [bool(exits(c)[-1] >= baseline(c, "plain trained") - _MARGIN) for c in plain]
    readouts = compare_to_best(by_cell, name, best_readout_references(by_cell))
    published = compare_to_best(by_cell, name, published_references())
    return [
        Goal("every exit at or above the frozen probe less 0.5", sum(frozen), len(probed), 0.9),
        Goal("every exit at or above TF-IDF less 0.5", sum(tfidf), len(probed), 0.9),
        Goal("last exit at or above the plain full model less 0.5", sum(last), len(plain), 0.9),
        Goal(
            "area at or above all three methods with their own best read-out",
            readouts.at_or_above,
            len(readouts.cells),
            0.8,
        ),
        Goal(
            "area not significantly below any of these",
            len(readouts.cells) - len(readouts.below),
            len(readouts.cells),
            1.0,
        ),
        Goal(
            "area not significantly below any of the three methods as published",
            len(published.cells) - len(published.below),
            len(published.cells),
            1.0,
        ),
    ]
