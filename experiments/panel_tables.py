"""The tables of experiments.panel, of what is done.

Shape letters: S seed, E exit.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments import paper
from experiments.panel_differences import (
    Table,
    changes_table,
    decay_table,
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
    aims,
    best_readout_references,
    cells_with,
    choose_default,
    compare_to_best,
    load_scores,
    mean_area,
    published_references,
    variants_with_exits,
)
from experiments.panel_variants import (
    BASELINES,
    CELLS,
    ROW_GROUPS,
    VARIANTS,
    stored_as,
    units,
)
from experiments.rendering import table_lines
from sweet_jax.files import write_text

DEFAULT = "recipe refit"

ABOUT = """Made by `python -m experiments.panel`: its docstring has the cells, the variants and
what is searched. MiniLM is sentence-transformers' all-MiniLM-L6-v2. Per cent of 1,000 validation
rows at most: accuracy, of CoLA Matthews correlation. Area is the mean between a sixth of the full
model's cost and the full model's, under the exact curve. "trained" has the heads as trained,
"refit" a logistic regression refitted on the same trunk. Significant, and bold: below 0.05 after
Holm's correction over the table. The panel in docs/reproduction.md has the statistics and the
criterion."""


def render(output: Path) -> None:
    """Writes README.md of what is done; nothing where nothing is."""
    found, records = load_scores(output)
    if not found:
        return
    lines = ["# The panel", "", ABOUT, ""]
    sections = _sections(found) | {"SetFit on the same rows": setfit_table(output)}
    for heading, (header, rows) in sections.items():
        if rows:
            lines += [f"## {heading}", "", *table_lines(header, rows), ""]
    lines += ["## Not run", "", *_missing(records), ""]
    write_text(output / "README.md", "\n".join(lines))


def _sections(found: ScoresByCell) -> dict[str, Table]:
    """Returns all tables, by title."""
    best, names = choose_default(found)
    sections: dict[str, Table] = {
        "Areas": areas_table(found),
        "The criterion": criterion_table(found),
        f"The aims: {DEFAULT}": aims_table(found, DEFAULT),
    }
    other = best or next((n for n in names if n != DEFAULT), DEFAULT)
    if other != DEFAULT:
        sections[f"The aims: {other}"] = aims_table(found, other)
    sections["Differences between the methods, by read-out"] = gaps_table(found)
    sections["What a change adds to mean pooling and a probe"] = changes_table(found)
    sections["What the recipe's training adds"] = training_table(found)
    sections["What comparing the texts of a pair adds, heads refitted"] = pooling_table(found)
    sections["What layer_decay 0.8 adds to the recipe, heads refitted"] = decay_table(found)
    sections["What layer_scaling 0.5 adds to the recipe, heads refitted"] = scaling_table(found)
    for heading, references in (
        ("the methods as they are", published_references()),
        ("the methods with their own best read-out", best_readout_references(found)),
    ):
        sections[f"{DEFAULT} less the best of {heading}"] = standing_table(found, references)
    for rows in (100, 500, 2000, 6000):
        own = {c: s for c, s in found.items() if ROW_GROUPS[CELLS[c].rows] == ROW_GROUPS[rows]}
        sections[f"Areas, {ROW_GROUPS[rows]} rows"] = matrix(own, _area)
        sections[f"Exits 1, 2, 4 and 6, {ROW_GROUPS[rows]} rows"] = matrix(own, _exits)
    return sections


def areas_table(found: ScoresByCell, most: int | None = None) -> Table:
    """Returns the mean area of the variants, and in how many cells each is significantly below.

    The mean is over the cells that those done in the most cells all have; of the others, over
    their own, after these, with the default's in the same cells. most: rows, at most.
    """
    names = variants_with_exits(found)
    done = {n: sum(n in rows for rows in found.values()) for n in names}
    whole = [n for n in names if done[n] == max(done.values())]
    shared = cells_with(found, whole)
    references = (published_references(), best_readout_references(found))
    rows = []
    for name in names:
        cells = shared if name in whole else cells_with(found, [name])
        tried = [compare_to_best(found, name, r) for r in references]
        below = [f"{len(s.below)} of {len(s.cells)}" if s.cells else "" for s in tried]
        mean = mean_area(found, name, cells)
        own = [c for c in cells if DEFAULT in found[c]]
        there = f"{100 * mean_area(found, DEFAULT, own):.2f}" if own == cells else ""
        texts = [name, f"{100 * mean:.2f}", str(len(cells)), there, *below]
        rows.append((name not in whole, -mean, texts))
    header = (
        "variant",
        "mean area",
        "cells",
        f"{DEFAULT} there",
        "below the best as they are",
        "below the best of their own best read-outs",
    )
    return header, [row for *_, row in sorted(rows, key=lambda r: r[:2])][:most]


def criterion_table(found: ScoresByCell) -> Table:
    """Returns what the criterion chooses, or the two that come nearest and where each fails."""
    best, names = choose_default(found)
    references = (published_references(), best_readout_references(found))
    shown = [best] if best else sorted(names, key=lambda n: len(_below(found, n, references)))[:2]
    rows = []
    for name in shown:
        cells = cells_with(found, names)
        fails = ", ".join(_below(found, name, references)) or "in no cell"
        rows.append([name, f"{100 * mean_area(found, name, cells):.2f}", str(len(cells)), fails])
    for method, name in references[1].items():
        cells = cells_with(found, [name])
        area = f"{100 * mean_area(found, name, cells):.2f}"
        what = f"{paper.NAMES[method]}'s own best read-out: {name}"
        rows.append([what, area, str(len(cells)), ""])
    what = "largest area that meets the criterion" if best else "nearest to the criterion"
    return (what, "mean area", "cells", "significantly below"), rows


def _below(found: ScoresByCell, name: str, references: Sequence[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(c for r in references for c in compare_to_best(found, name, r).below))


def progress_table(records: Mapping[tuple[str, str], Record]) -> Table:
    """Returns in how many cells each variant that is done in some is done, by rows."""
    stages = list(dict.fromkeys(ROW_GROUPS.values()))
    rows = []
    for variant in (BASELINES, *VARIANTS):
        texts = []
        for rows_of in stages:
            cells = [c for c in CELLS if ROW_GROUPS[CELLS[c].rows] == rows_of]
            cells = [c for c in cells if stored_as(c, variant) == variant]
            texts.append(f"{sum((c, variant) in records for c in cells)} of {len(cells)}")
        if any(known == variant for _, known in records):
            rows.append([variant, *texts])
    return ("cells done", *(f"{rows_of} rows" for rows_of in stages)), rows


def aims_table(found: ScoresByCell, name: str) -> Table:
    """Returns what the default is asked for, and whether it is so."""
    rows = [
        [
            count.what,
            f"{count.good} of {count.cells}",
            f"{100 * count.good / count.cells:.0f}%",
            f"{100 * count.aim:.0f}%",
            "yes" if count.met else "no",
        ]
        for count in aims(found, name)
        if count.cells
    ]
    return ("in cells", "holds in", "share", "aim", "met"), rows


def standing_table(found: ScoresByCell, references: Mapping[str, str]) -> Table:
    """Returns the default's area less that of the best reference, cell by cell."""
    own = compare_to_best(found, DEFAULT, references)
    rows = []
    for cell, best, gap, p in zip(own.cells, own.against, own.gaps, own.p, strict=True):
        scores = found[cell]
        areas = [f"{100 * scores[n].area.mean():.1f}" for n in (DEFAULT, best)]
        said = interval_text(gap, p)
        rows.append([title(cell), areas[0], best, areas[1], said, f"{p:.2g}"])
    return ("cell", "area", "best", "its area", "difference", "p after Holm"), rows


def matrix(found: ScoresByCell, text: Callable[[Scores], str]) -> Table:
    """Returns a text of every variant in every cell."""
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    rows = [
        [name, *(text(scores[name]) if name in scores else "" for scores in found.values())]
        for name in names
    ]
    rows = [row for row in rows if any(row[1:])]
    return ("variant", *map(title, found)), rows


def _area(scores: Scores) -> str:
    return "" if scores.drawn_area is None else f"{100 * scores.area.mean():.1f}"


def _exits(scores: Scores) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in scores.exits.mean(axis=0))


def _missing(records: Mapping[tuple[str, str], Record]) -> list[str]:
    """Returns a line for each variant that lacks cells."""
    lacking: dict[str, list[str]] = {}
    for cell, variant in units():
        if (cell, variant) not in records:
            lacking.setdefault(variant, []).append(cell)
    lines = [
        f"- {variant}: {'every cell' if len(cells) == len(CELLS) else ', '.join(cells)}"
        for variant, cells in lacking.items()
    ]
    return lines or ["Nothing is missing."]
