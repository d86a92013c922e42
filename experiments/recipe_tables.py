"""The tables of experiments.recipe, of what is done.

Shape letters: S seed, E exit, D bootstrap draws.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.recipe_results import CELLS, Scores, read_record, record_path
from sweet_jax.exits.metrics import mean_interval
from sweet_jax.files import atomic_write, write_text


class Interval(NamedTuple):
    """Holds a difference and its 95% interval."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        """Returns the difference in points, bold where the interval leaves out zero."""
        said = f"{100 * self.value:+z.1f} [{100 * self.low:+z.1f}, {100 * self.high:+z.1f}]"
        return f"**{said}**" if self.low > 0 or self.high < 0 else said


def difference(a: np.ndarray, b: np.ndarray, drawn_a: np.ndarray, drawn_b: np.ndarray) -> Interval:
    """Returns the mean over seeds of a - b, with its 95% interval over seeds and rows.

    By a bootstrap: each draw has its rows, the same on both sides, and seeds drawn with
    replacement. Of three seeds that says little of what a fourth would do.

    Args:
      a, b: float [S]; of one column, the same for all seeds.
      drawn_a, drawn_b: float [D, S], the same on each draw's rows.

    """
    gaps = drawn_a - drawn_b  # [D, S]
    count = gaps.shape[1]
    seeds = np.random.default_rng(1).integers(0, count, (len(gaps), count))
    means = np.take_along_axis(gaps, seeds, axis=1).mean(axis=1)  # [D]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float((a - b).mean()), float(low), float(high))


AS_PUBLISHED = (
    "early_exit-first-random trained",
    "sweet-first-random trained",
    "multi_model-first-random trained",
)
DEFAULT = "recipe refit"


def load_scores(output: Path, variants: Sequence[str]) -> dict[str, dict[str, Scores]]:
    """Returns the scores, by cell and then by "variant kind", or a baseline's name."""
    found: dict[str, dict[str, Scores]] = {}
    for name in CELLS:
        rows = found.setdefault(name, {})
        for variant in variants:
            record = read_record(output, name, variant)
            for kind, scores in record.scores.items() if record else ():
                rows[kind if variant == "baselines" else f"{variant} {kind}"] = scores
    return found


def areas_table(found: Mapping[str, Mapping[str, Scores]]) -> list[list[str]]:
    """Returns rows of: variant, mean area, and in how many cells it is significantly below.

    The mean is over the cells that all variants with the recipe's exits have; that many are named.
    Below the best of the methods as they are, in the cells where all of these are done.
    """
    names = sorted({n for rows in found.values() for n in rows if " " in n and "plain" not in n})
    most = max((sum(n in rows for rows in found.values()) for n in names), default=0)
    whole = [n for n in names if sum(n in rows for rows in found.values()) == most]
    shared = [c for c, rows in found.items() if all(n in rows for n in whole)]
    table = []
    for name in names:
        cells = [c for c, rows in found.items() if name in rows]
        own = shared if name in whole else cells
        mean = np.mean([found[c][name].area.mean() for c in own])
        below, compared = 0, 0
        for c in cells:
            usual = [found[c][u] for u in AS_PUBLISHED if u in found[c]]
            if len(usual) < len(AS_PUBLISHED):
                continue
            best = max(usual, key=lambda m: m.area.mean())
            mine = found[c][name]
            gap = difference(mine.area, best.area, mine.drawn_area, best.drawn_area)
            compared += 1
            below += gap.high < 0
        mark = f" ({len(own)} cells)"
        table.append([name, f"{100 * mean:.2f}{mark}", f"{below} of {compared}"])
    return sorted(table, key=lambda row: -float(row[1].split()[0]))


def cell_table(rows: Mapping[str, Scores]) -> list[list[str]]:
    """Returns rows of: variant, every exit, area, area less that of the best as they are."""
    usual = [rows[u] for u in AS_PUBLISHED if u in rows]
    best = max(usual, key=lambda m: m.area.mean()) if usual else None
    table = []
    for name, m in rows.items():
        pairs = zip(m.exits.mean(axis=0), _half(m.exits), strict=True)
        exits = [f"{100 * value:.1f} ± {100 * half:.1f}" for value, half in pairs]
        gap = (
            ""
            if best is None or " " not in name
            else difference(m.area, best.area, m.drawn_area, best.drawn_area).text()
        )
        alone = m.exits.shape[1] == 1
        exits = ["", "", "", *exits] if alone else exits
        if name.startswith("probe_"):
            exits = ["", "", "", ""]
            exits[(1, 2, 4, 6).index(int(name[6:]))] = f"{100 * m.exits.mean():.1f}"
        table.append([name, *exits, "" if alone else f"{100 * m.area.mean():.2f}", gap])
    return table


def check_goals(found: Mapping[str, Mapping[str, Scores]], name: str = DEFAULT) -> list[str]:
    """Returns a line for each thing that the default recipe was asked for."""
    exits = [0, 0]
    words, plain, below = [0, 0], [0, 0], []
    for cell, rows in found.items():
        if name not in rows:
            continue
        mine = rows[name]
        score = mine.exits.mean(axis=0)
        for e, layer in enumerate((1, 2, 4, 6)):
            if f"probe_{layer}" in rows:
                exits[1] += 1
                exits[0] += score[e] >= rows[f"probe_{layer}"].exits.mean() - 0.005
        if "tfidf" in rows:
            words[1] += 1
            words[0] += score.max() >= rows["tfidf"].exits.mean() - 0.005
        if "plain trained" in rows:
            plain[1] += 1
            plain[0] += score[-1] >= rows["plain trained"].exits.mean() - 0.005
        for usual in AS_PUBLISHED:
            if usual in rows:
                other = rows[usual]
                gap = difference(mine.area, other.area, mine.drawn_area, other.drawn_area)
                if gap.high < 0:
                    below.append(f"{cell}: {usual} {gap.text()}")
    return [
        f"exits at or above the frozen probe less 0.5 points: {exits[0]} of {exits[1]}",
        f"best exit at or above TF-IDF less 0.5: {words[0]} of {words[1]} cells",
        f"last exit at or above the plain full model less 0.5: {plain[0]} of {plain[1]} cells",
        f"area significantly below a method as it is: {'; '.join(below) or 'in no cell'}",
    ]


def _half(values: np.ndarray) -> np.ndarray:
    """Returns the half width of Student's 95% interval over seeds of values [S, E]."""
    half = mean_interval(values)[1]
    return np.zeros(values.shape[1]) if half is None else half


def render(output: Path, variants: Sequence[str]) -> None:
    """Writes scores.csv and README.md of what is done."""
    found = load_scores(output, variants)
    done = {cell: rows for cell, rows in found.items() if rows}
    _write_scores(output, variants)
    lines = ["# Which recipe should be the default?", "", _ABOUT, ""]
    lines += [
        "## Areas",
        "",
        *_markdown(("variant", "mean area, %", "cells significantly below"), areas_table(done)),
        "",
    ]
    lines += [
        "## What the default recipe was asked for",
        "",
        *(f"- {c}" for c in check_goals(done)),
        "",
    ]
    heading = ("variant", "exit 1", "exit 2", "exit 4", "exit 6", "area", "less the best as it is")
    for cell, rows in done.items():
        lines += [f"## {cell}", "", *_markdown(heading, cell_table(rows)), ""]
    lines += ["## Not run", "", *(_missing(output, variants) or ["Nothing is missing."]), ""]
    write_text(output / "README.md", "\n".join(lines))


_ABOUT = """Made by `python -m experiments.recipe` (its docstring says what the variants are, and
what it costs); MiniLM is sentence-transformers' all-MiniLM-L6-v2. Accuracy in per cent on the whole
validation files, mean of three seeds ± the half width of Student's 95% interval over seeds; area is
the mean accuracy between the cost of exit 1 and of the full model under the exact curve;
differences have a 95% bootstrap interval over seeds and rows, bold where it leaves out zero.
"trained" has the heads as trained, "refit" a logistic regression refitted on the same trunk. The
methods as they are: first token, random heads, as trained, two epochs."""


def _missing(output: Path, variants: Sequence[str]) -> list[str]:
    """Returns a line for each variant that lacks cells."""
    lines = []
    for variant in variants:
        cells = [c for c in CELLS if not record_path(output, c, variant).exists()]
        if cells:
            every = len(cells) == len(CELLS)
            lines.append(f"- {variant}: {'every cell' if every else ', '.join(cells)}")
    return lines


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _write_scores(output: Path, variants: Sequence[str]) -> None:
    """Writes scores.csv: a row for each variant, kind, seed and exit."""
    rows = []
    for name, cell in CELLS.items():
        for variant in variants:
            record = read_record(output, name, variant)
            for kind, m in record.scores.items() if record else ():
                search = record.about.get("search") or {}
                exits = (
                    record.config["exits"] if m.exits.shape[1] > 1 else [record.config["exits"][-1]]
                )
                for s, seed in enumerate(record.config["seeds"]):
                    for e, layer in enumerate(exits):
                        rows.append(
                            {
                                "study": "recipe",
                                "task": cell.task,
                                "method": record.config["method"]
                                if variant != "baselines"
                                else kind,
                                "setting": f"{variant} {kind}",
                                "train_size": cell.rows,
                                "learning_rate": search.get("learning_rate", ""),
                                "seed": seed,
                                "exit": layer,
                                "metric": "accuracy",
                                "value": f"{m.exits[s % len(m.exits), e]:.6f}",
                                "n": record.n["validation"],
                                "area": f"{m.area[s % len(m.area)]:.6f}",
                                "diverged": "",
                            }
                        )
    if rows:
        with atomic_write(output / "scores.csv") as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
