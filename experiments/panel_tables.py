"""The tables of experiments.panel, from the records of its finished variants.

Shape letters: S seed, E exit.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments import paper
from experiments.panel_criterion import choose_default, goals
from experiments.panel_differences import (
    Table,
    changes_table,
    decay_table,
    exits_text,
    gaps_table,
    interval_text,
    pooling_table,
    scaling_table,
    setfit_table,
    title,
    training_table,
)
from experiments.panel_records import Record, Scores
from experiments.panel_statistics import (
    ScoresByCell,
    best_readout_references,
    cells_with,
    compare_to_best,
    load_scores,
    mean_area,
    names_in_most_cells,
    published_references,
    variants_with_exits,
)
from experiments.panel_variants import BASELINES, CELLS, ROW_GROUPS, VARIANTS, stored_as, units
from experiments.records import COLUMNS, write_table
from experiments.rendering import table_lines
from experiments.score_rows import score_rows
from sweet_jax.files import write_text

DEFAULT = "recipe refit"

ABOUT = """Made by `python -m experiments.panel`, whose docstring describes the cells, the variants
and the learning-rate search. The encoder is MiniLM, sentence-transformers' all-MiniLM-L6-v2. Scores
are in per cent of at most 1,000 validation rows: accuracy or, for CoLA, Matthews correlation. Area
is the mean score under the exact curve between a sixth of the full model's cost and the full
model's cost. "trained" means the heads as trained, "refit" logistic regressions fitted on the same
trunk. Methods as published have the first token, random heads as trained and two epochs.
Significant differences, in bold, have a p-value below 0.05 after Holm's correction over the table.
The panel in docs/reproduction.md has the statistics and the criterion."""


def render(output: Path) -> None:
    """Writes README.md and scores.csv from the records; nothing if there are none."""
    by_cell, records = load_scores(output)
    if not by_cell:
        return
    lines = ["# The panel", "", ABOUT, ""]
    sections = _sections(by_cell) | {"SetFit on the same rows": setfit_table(output)}
    for heading, (header, rows) in sections.items():
        if rows:
            lines += [f"## {heading}", "", *table_lines(header, rows), ""]
    lines += ["## Not run", "", *_missing(records), ""]
    write_text(output / "README.md", "\n".join(lines))
    stored = (
        score_rows("panel", CELLS[cell].task, variant, record)
        for (cell, variant), record in records.items()
    )
    write_table(output / "scores.csv", COLUMNS, itertools.chain.from_iterable(stored))


def _sections(by_cell: ScoresByCell) -> dict[str, Table]:
    """Returns all tables, by title."""
    best, names = choose_default(by_cell)
    sections: dict[str, Table] = {
        "Areas": areas_table(by_cell),
        "The criterion": criterion_table(by_cell),
        f"The goals: {DEFAULT}": goals_table(by_cell, DEFAULT),
    }
    other = best or next((n for n in names if n != DEFAULT), DEFAULT)
    if other != DEFAULT:
        sections[f"The goals: {other}"] = goals_table(by_cell, other)
    sections["Differences between the methods, by read-out"] = gaps_table(by_cell)
    sections["What a change adds to mean pooling and a probe"] = changes_table(by_cell)
    sections["What the training of recipe-pair adds"] = training_table(by_cell)
    for pooling, what in (("pair", "comparing the texts"), ("aligned_pair", "aligning the tokens")):
        heading = f"What {what} of a pair adds, heads refitted"
        sections[heading] = pooling_table(by_cell, pooling)
    sections["What layer_decay 0.8 adds to recipe-pair, heads refitted"] = decay_table(by_cell)
    sections["What layer_scaling 0.5 adds to recipe-pair, heads refitted"] = scaling_table(by_cell)
    for heading, references in (
        ("the methods as published", published_references()),
        ("the methods with their own best read-out", best_readout_references(by_cell)),
    ):
        sections[f"{DEFAULT} less the best of {heading}"] = standing_table(by_cell, references)
    for rows in (100, 500, 2000, 6000):
        own = {c: s for c, s in by_cell.items() if ROW_GROUPS[CELLS[c].rows] == ROW_GROUPS[rows]}
        sections[f"Areas, {ROW_GROUPS[rows]} rows"] = matrix(own, _area)
        sections[f"Exits 1, 2, 4 and 6, {ROW_GROUPS[rows]} rows"] = matrix(
            own, lambda scores: exits_text([scores])
        )
    return sections


def areas_table(by_cell: ScoresByCell, most: int | None = None) -> Table:
    """Returns the mean areas, and the numbers of cells significantly below the best reference.

    The first rows are the variants that are done in the most cells, with means over the cells that
    all of these have. Means of the others are over their own cells, beside the default's there.

    most: maximum number of rows.
    """
    names = variants_with_exits(by_cell)
    complete = names_in_most_cells(by_cell, names)
    shared = cells_with(by_cell, complete)
    references = (published_references(), best_readout_references(by_cell))
    rows = []
    for name in names:
        cells = shared if name in complete else cells_with(by_cell, [name])
        comparisons = [compare_to_best(by_cell, name, each) for each in references]
        below = [f"{len(c.below)} of {len(c.cells)}" if c.cells else "" for c in comparisons]
        mean = mean_area(by_cell, name, cells)
        own = [c for c in cells if DEFAULT in by_cell[c]]
        default = f"{100 * mean_area(by_cell, DEFAULT, own):.2f}" if own == cells else ""
        texts = [name, f"{100 * mean:.2f}", str(len(cells)), default, *below]
        rows.append((name not in complete, -mean, texts))
    header = (
        "variant",
        "mean area",
        "cells",
        f"{DEFAULT} in these cells",
        "below the best method as published",
        "below the best method with its best read-out",
    )
    return header, [row for *_, row in sorted(rows, key=lambda r: r[:2])][:most]


def criterion_table(by_cell: ScoresByCell) -> Table:
    """Returns the variant that the criterion chooses, or the nearest two and where they fail."""
    best, names = choose_default(by_cell)
    references = (published_references(), best_readout_references(by_cell))
    shown = [best] if best else sorted(names, key=lambda n: len(_below(by_cell, n, references)))[:2]
    rows = []
    for name in shown:
        cells = cells_with(by_cell, names)
        below = ", ".join(_below(by_cell, name, references)) or "in no cell"
        rows.append([name, f"{100 * mean_area(by_cell, name, cells):.2f}", str(len(cells)), below])
    for method, name in references[1].items():
        cells = cells_with(by_cell, [name])
        area = f"{100 * mean_area(by_cell, name, cells):.2f}"
        label = f"{paper.NAMES[method]}'s own best read-out: {name}"
        rows.append([label, area, str(len(cells)), ""])
    label = "largest area that meets the criterion" if best else "nearest to the criterion"
    return (label, "mean area", "cells", "significantly below"), rows


def _below(by_cell: ScoresByCell, name: str, references: Sequence[Mapping[str, str]]) -> list[str]:
    return list(
        dict.fromkeys(c for r in references for c in compare_to_best(by_cell, name, r).below)
    )


def progress_table(records: Mapping[tuple[str, str], Record]) -> Table:
    """Returns the number of finished cells of each variant that has any, by number of rows."""
    groups = list(dict.fromkeys(ROW_GROUPS.values()))
    rows = []
    for variant in (BASELINES, *VARIANTS):
        texts = []
        for group in groups:
            cells = [c for c in CELLS if ROW_GROUPS[CELLS[c].rows] == group]
            cells = [c for c in cells if stored_as(c, variant) == variant]
            texts.append(f"{sum((c, variant) in records for c in cells)} of {len(cells)}")
        if any(recorded == variant for _, recorded in records):
            rows.append([variant, *texts])
    return ("cells done", *(f"{group} rows" for group in groups)), rows


def goals_table(by_cell: ScoresByCell, name: str) -> Table:
    """Returns the goals for the default, and whether a variant meets them."""
    rows = [
        [
            goal.text,
            f"{goal.met_in} of {goal.cells}",
            f"{100 * goal.met_in / goal.cells:.0f}%",
            f"{100 * goal.required:.0f}%",
            "yes" if goal.met else "no",
        ]
        for goal in goals(by_cell, name)
        if goal.cells
    ]
    return ("goal for a cell", "cells", "share", "goal for the share", "met"), rows


def standing_table(by_cell: ScoresByCell, references: Mapping[str, str]) -> Table:
    """Returns the default's area less that of the best reference in each cell."""
    comparison = compare_to_best(by_cell, DEFAULT, references)
    rows = []
    for cell, best, gap, p in zip(*comparison, strict=True):
        scores = by_cell[cell]
        areas = [f"{100 * scores[n].area.mean():.1f}" for n in (DEFAULT, best)]
        rows.append([title(cell), areas[0], best, areas[1], interval_text(gap, p), f"{p:.2g}"])
    return ("cell", "area", "best", "its area", "difference", "p after Holm"), rows


def matrix(by_cell: ScoresByCell, text: Callable[[Scores], str]) -> Table:
    """Returns a table of a text for every variant in every cell."""
    names = list(dict.fromkeys(name for rows in by_cell.values() for name in rows))
    rows = [
        [name, *(text(scores[name]) if name in scores else "" for scores in by_cell.values())]
        for name in names
    ]
    rows = [row for row in rows if any(row[1:])]
    return ("variant", *map(title, by_cell)), rows


def _area(scores: Scores) -> str:
    return "" if scores.drawn_area is None else f"{100 * scores.area.mean():.1f}"


def _missing(records: Mapping[tuple[str, str], Record]) -> list[str]:
    """Returns a Markdown line for each variant with missing cells."""
    missing: dict[str, list[str]] = {}
    for cell, variant in units():
        if (cell, variant) not in records:
            missing.setdefault(variant, []).append(cell)
    lines = [
        f"- {variant}: {'every cell' if len(cells) == len(CELLS) else ', '.join(cells)}"
        for variant, cells in missing.items()
    ]
    return lines or ["Nothing is missing."]
