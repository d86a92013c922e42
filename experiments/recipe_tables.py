"""The tables of experiments.recipe, from the records of its finished variants.

Shape letters: S seed, E exit, D bootstrap draws.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.recipe_results import CELLS, Scores, read_record, record_path
from experiments.records import COLUMNS, write_table
from experiments.rendering import table_lines
from experiments.score_rows import score_rows
from sweet_jax.exits.metrics import mean_interval
from sweet_jax.files import write_text


class Interval(NamedTuple):
    """Holds a difference and its 95% interval."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        """Formats the difference in points, bold if the interval excludes zero."""
        text = f"{100 * self.value:+z.1f} [{100 * self.low:+z.1f}, {100 * self.high:+z.1f}]"
        return f"**{text}**" if self.low > 0 or self.high < 0 else text


def area_difference(first: Scores, second: Scores) -> Interval:
    """Returns the difference of the areas of two variants, with its 95% bootstrap interval.

    It is the mean over seeds. The bootstrap resamples rows, the same for both variants, and seeds
    with replacement. With three seeds, this says little about other seeds.
    """
    gaps = first.drawn_area - second.drawn_area  # [D, S]
    count = gaps.shape[1]
    seeds = np.random.default_rng(1).integers(0, count, (len(gaps), count))
    means = np.take_along_axis(gaps, seeds, axis=1).mean(axis=1)  # [D]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float((first.area - second.area).mean()), float(low), float(high))


AS_PUBLISHED = (
    "early_exit-first-random trained",
    "sweet-first-random trained",
    "multi_model-first-random trained",
)
DEFAULT = "recipe refit"


def load_scores(output: Path, variants: Sequence[str]) -> dict[str, dict[str, Scores]]:
    """Returns the scores by cell, and then by "VARIANT KIND" or the name of a baseline."""
    by_cell: dict[str, dict[str, Scores]] = {}
    for name in CELLS:
        rows = by_cell.setdefault(name, {})
        for variant in variants:
            record = read_record(output, name, variant)
            for kind, scores in record.scores.items() if record else ():
                rows[kind if variant == "baselines" else f"{variant} {kind}"] = scores
    return by_cell


def areas_table(by_cell: Mapping[str, Mapping[str, Scores]]) -> list[list[str]]:
    """Returns rows of: variant, mean area, and number of cells where it is significantly below.

    The mean is over the cells that all the variants done in the most cells have, or over the
    variant's own if it has fewer. The comparison is with the best method as published, in the cells
    that have all of these.
    """
    names = sorted({n for rows in by_cell.values() for n in rows if " " in n and "plain" not in n})
    most = max((sum(n in rows for rows in by_cell.values()) for n in names), default=0)
    complete = [n for n in names if sum(n in rows for rows in by_cell.values()) == most]
    shared = [c for c, rows in by_cell.items() if all(n in rows for n in complete)]
    table = []
    for name in names:
        cells = [c for c, rows in by_cell.items() if name in rows]
        own = shared if name in complete else cells
        mean = np.mean([by_cell[c][name].area.mean() for c in own])
        below, compared = 0, 0
        for c in cells:
            published = [by_cell[c][u] for u in AS_PUBLISHED if u in by_cell[c]]
            if len(published) < len(AS_PUBLISHED):
                continue
            best = max(published, key=lambda scores: scores.area.mean())
            compared += 1
            below += area_difference(by_cell[c][name], best).high < 0
        table.append([name, f"{100 * mean:.2f} ({len(own)} cells)", f"{below} of {compared}"])
    return sorted(table, key=lambda row: -float(row[1].split()[0]))


def cell_table(rows: Mapping[str, Scores]) -> list[list[str]]:
    """Returns rows of: variant, every exit, area, difference from the best method as published.

    rows: scores of a cell by name, see `load_scores`.
    """
    published = [rows[name] for name in AS_PUBLISHED if name in rows]
    best = max(published, key=lambda scores: scores.area.mean()) if published else None
    table = []
    for name, scores in rows.items():
        pairs = zip(scores.exits.mean(axis=0), _half_widths(scores.exits), strict=True)
        exits = [f"{100 * value:.1f} ± {100 * half:.1f}" for value, half in pairs]
        is_baseline, one_exit = " " not in name, scores.exits.shape[1] == 1
        if one_exit:
            exits = ["", "", "", *exits]
        if name.startswith("probe_"):
            exits = ["", "", "", ""]
            exits[(1, 2, 4, 6).index(int(name[6:]))] = f"{100 * scores.exits.mean():.1f}"
        area = "" if one_exit else f"{100 * scores.area.mean():.2f}"
        gap = "" if best is None or is_baseline else area_difference(scores, best).text()
        table.append([name, *exits, area, gap])
    return table


def check_goals(by_cell: Mapping[str, Mapping[str, Scores]], name: str = DEFAULT) -> list[str]:
    """Returns a line for each goal of the default recipe.

    name: "VARIANT KIND" of the recipe.
    """
    probe: list[bool] = []  # whether the goals are met
    tfidf: list[bool] = []
    plain: list[bool] = []
    below = []
    for cell, rows in by_cell.items():
        if name not in rows:
            continue
        exits = rows[name].exits.mean(axis=0)  # [E]
        for score, layer in zip(exits, (1, 2, 4, 6), strict=True):
            if f"probe_{layer}" in rows:
                probe.append(_reaches(score, rows[f"probe_{layer}"]))
        if "tfidf" in rows:
            tfidf.append(_reaches(exits.max(), rows["tfidf"]))
        if "plain trained" in rows:
            plain.append(_reaches(exits[-1], rows["plain trained"]))
        for method in AS_PUBLISHED:
            if method in rows and (gap := area_difference(rows[name], rows[method])).high < 0:
                below.append(f"{cell}: {method} {gap.text()}")
    return [
        f"exits at or above the frozen probe less 0.5 points: {sum(probe)} of {len(probe)}",
        f"best exit at or above TF-IDF less 0.5: {sum(tfidf)} of {len(tfidf)} cells",
        f"last exit at or above the plain full model less 0.5: {sum(plain)} of {len(plain)} cells",
        f"area significantly below a method as published: {'; '.join(below) or 'in no cell'}",
    ]


def _reaches(score: float, baseline: Scores) -> bool:
    """Returns whether a score is at most half a point below the mean score of a baseline."""
    return bool(score >= baseline.exits.mean() - 0.005)


def _half_widths(values: np.ndarray) -> np.ndarray:
    """Returns half the widths [E] of Student's 95% intervals over seeds, of values [S, E]."""
    half = mean_interval(values)[1]
    return np.zeros(values.shape[1]) if half is None else half


def render(output: Path, variants: Sequence[str]) -> None:
    """Writes scores.csv and README.md from the records."""
    by_cell = load_scores(output, variants)
    done = {cell: rows for cell, rows in by_cell.items() if rows}
    _write_scores(output, variants)
    lines = ["# Which recipe should be the default?", "", _ABOUT, ""]
    lines += [
        "## Areas",
        "",
        *table_lines(("variant", "mean area, %", "cells significantly below"), areas_table(done)),
        "",
    ]
    lines += [
        "## The goals for the default recipe",
        "",
        *(f"- {c}" for c in check_goals(done)),
        "",
    ]
    heading = (
        "variant",
        "exit 1",
        "exit 2",
        "exit 4",
        "exit 6",
        "area",
        "less the best as published",
    )
    for cell, rows in done.items():
        lines += [f"## {cell}", "", *table_lines(heading, cell_table(rows)), ""]
    lines += ["## Not run", "", *(_missing(output, variants) or ["Nothing is missing."]), ""]
    write_text(output / "README.md", "\n".join(lines))


_ABOUT = """Made by `python -m experiments.recipe`, whose docstring describes the variants and the
cost. The encoder is MiniLM, sentence-transformers' all-MiniLM-L6-v2. Accuracy in per cent on all
validation rows, mean of three seeds ± half the width of Student's 95% interval over seeds. Area is
the mean accuracy under the exact curve between the cost of exit 1 and that of the full model.
Differences have a 95% bootstrap interval over seeds and rows, bold if it excludes zero. "trained"
means the heads as trained, "refit" logistic regressions fitted on the same trunk. Methods as
published have the first token, random heads as trained and two epochs."""


def _missing(output: Path, variants: Sequence[str]) -> list[str]:
    """Returns a Markdown line for each variant with missing cells."""
    lines = []
    for variant in variants:
        cells = [c for c in CELLS if not record_path(output, c, variant).exists()]
        if cells:
            every = len(cells) == len(CELLS)
            lines.append(f"- {variant}: {'every cell' if every else ', '.join(cells)}")
    return lines


def _write_scores(output: Path, variants: Sequence[str]) -> None:
    """Writes scores.csv: a row for each variant, kind, seed and exit."""
    rows = []
    for name, variant in itertools.product(CELLS, variants):
        record = read_record(output, name, variant)
        if record is not None:
            rows += score_rows("recipe", CELLS[name].task, variant, record)
    if rows:
        write_table(output / "scores.csv", COLUMNS, rows)
