"""Tables of differences between the areas of two variants, over the cells of experiments.panel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import paper
from experiments.panel_records import Scores, read_record
from experiments.panel_statistics import LEVEL, Comparison, ScoresByCell, cells_with, compare, holm
from experiments.panel_variants import (
    CELLS,
    CHANGES,
    METHODS,
    READOUTS,
    ROW_GROUPS,
    SETFIT,
    TASKS,
    stored_as,
)

Table = tuple[Sequence[str], list[list[str]]]  # header, rows
_PAIRS = (("sweet", "early_exit"), ("multi_model", "early_exit"), ("sweet", "multi_model"))
_READOUTS = tuple(f"{readout} {kind}" for readout in READOUTS for kind in ("trained", "refit"))
SHOWN_READOUTS = _READOUTS[:8]
_P = "p after Holm"


class _PoolingNames(NamedTuple):
    """Holds the names of what was run with a pooling of pairs."""

    probe: str  # prefix of the frozen probes among the baselines
    recipe: str  # variant
    readout: str  # pooling and initialization in the variants of the methods


_POOLINGS = {
    "mean": _PoolingNames("mean_probe", "recipe-mean", "mean-probe"),
    "pair": _PoolingNames("pair_probe", "recipe-pair", "pair-probe"),
    "aligned_pair": _PoolingNames("probe", "recipe", "auto-probe"),
}
_COMPARED_WITH = {"pair": "mean", "aligned_pair": "pair"}


def gaps_table(by_cell: ScoresByCell, readouts: Sequence[str] = _READOUTS) -> Table:
    """Returns the mean differences of area between the methods, by number of rows and read-out."""
    pairs = {
        (readout, f"{paper.NAMES[first]} - {paper.NAMES[second]}"): (
            f"{first}-{readout}",
            f"{second}-{readout}",
        )
        for readout in readouts
        for first, second in _PAIRS
    }
    return _differences(by_cell, pairs, "read-out")


def changes_table(by_cell: ScoresByCell) -> Table:
    """Returns the mean differences of area between each changed variant and its base, by rows."""
    pairs = {
        (name, f"heads {label}"): (f"{name} {kind}", f"{base} {kind}")
        for name, (base, _) in CHANGES.items()
        for kind, label in (("trained", "as trained"), ("refit", "refitted"))
    }
    return _differences(by_cell, pairs, "change")


def training_table(by_cell: ScoresByCell) -> Table:
    """Returns the mean gains of area from the training of `recipe-pair`, by number of rows.

    They are over the frozen probe as a model with exits, and over Early-Exit that is initialized
    from the same probe and trained for two epochs.
    """
    others = {"frozen probe": "frozen-pair", "Early-Exit, two epochs": "early_exit-pair-probe"}
    pairs = {
        ("refitted", f"recipe-pair - {label}"): ("recipe-pair refit", f"{variant} refit")
        for label, variant in others.items()
    }
    return _differences(by_cell, pairs, "heads", distinct=False)


def pooling_table(by_cell: ScoresByCell, pooling: str, shown: Sequence[str] | None = None) -> Table:
    """Returns exits and areas with a pooling that compares pairs, and with another one, by cell.

    The first rows are the frozen probe's, which has no area.

    Args:
      by_cell: scores of all cells.
      pooling: one of _COMPARED_WITH.
      shown: labels of the variants to show, all by default; p-values are corrected over all.

    """
    other = _COMPARED_WITH[pooling]
    new, old = _POOLINGS[pooling], _POOLINGS[other]
    variants = {"recipe": (new.recipe, old.recipe)}
    for method in METHODS:
        names = (f"{method}-{new.readout}", f"{method}-{old.readout}")
        variants[f"{paper.NAMES[method]}, probe"] = names
    frozen = [[f"{each.probe}_{layer}" for layer in (1, 2, 4, 6)] for each in (old, new)]
    rows = [
        [
            "frozen probe",
            title(cell),
            *(exits_text([scores[name] for name in each]) for each in frozen),
        ]
        for cell, scores in by_cell.items()
        if {*frozen[0], *frozen[1]} <= set(scores)
    ]
    compared = [
        row
        for row in _by_cell(by_cell, variants)
        if row[0] in (variants if shown is None else shown)
    ]
    rows = [[*row, "", ""] for row in rows] + compared
    area = f"area, {pooling} - {other}"
    return ("variant", "cell", f"exits, {other}", f"exits, {pooling}", area, _P), rows


def decay_table(by_cell: ScoresByCell) -> Table:
    """Returns the exits and area of `recipe-pair` with and without layer_decay, by cell."""
    rows = _by_cell(by_cell, {"recipe": ("recipe-decay", "recipe-pair")})
    header = ("cell", "exits, layer_decay 1", "exits, layer_decay 0.8", "area, 0.8 - 1", _P)
    return header, [row[1:] for row in rows]


def scaling_table(by_cell: ScoresByCell) -> Table:
    """Returns the exits and area of `recipe-pair` with and without layer_scaling, by cell."""
    rows = _by_cell(by_cell, {"recipe": ("recipe-scaling", "recipe-pair")})
    header = ("cell", "exits, layer_scaling 1", "exits, layer_scaling 0.5", "area, 0.5 - 1", _P)
    return header, [row[1:] for row in rows]


def _by_cell(by_cell: ScoresByCell, variants: Mapping[str, tuple[str, str]]) -> list[list[str]]:
    """Returns a row for each pair of variants, with refitted heads, and each cell that has both.

    A row has the label, the cell, the exits of the second and of the first variant, the difference
    of the first's area from the second's, and its p-value, corrected over all rows.

    variants: pairs of variants by label.
    """
    compared = []
    for label, pair in variants.items():
        first, second = (f"{name} refit" for name in pair)
        for cell in cells_with(by_cell, (first, second)):
            if len({stored_as(cell, variant) for variant in pair}) == 2:
                scores = by_cell[cell]
                texts = [
                    label,
                    title(cell),
                    exits_text([scores[second]]),
                    exits_text([scores[first]]),
                ]
                compared.append((texts, compare(scores[first], scores[second])))
    adjusted = holm([gap.p for _, gap in compared])
    return [
        [*texts, interval_text(gap, p), f"{p:.2g}"]
        for (texts, gap), p in zip(compared, adjusted, strict=True)
    ]


def title(cell: str) -> str:
    """Returns the title of a cell in tables."""
    return f"{TASKS[CELLS[cell].task].title}, {CELLS[cell].rows:,}"


def interval_text(gap: Comparison, p: float) -> str:
    """Formats a difference with its interval in points, bold if it is significant.

    p: corrected p-value.
    """
    text = f"{100 * gap.value:+z.1f} [{100 * gap.low:+z.1f}, {100 * gap.high:+z.1f}]"
    return f"**{text}**" if p < LEVEL else text


def exits_text(scores: Sequence[Scores]) -> str:
    """Formats the scores of the exits of a variant, or of one baseline per exit, as means."""
    means = np.concatenate([np.atleast_1d(each.exits.mean(axis=0)).ravel() for each in scores])
    return " / ".join(f"{100 * mean:.1f}" for mean in means)


def setfit_table(output: Path) -> Table:
    """Returns SetFit's scores, and how far every exit of the recipe is above, on the same rows."""
    records = {c: r for c in CELLS if (r := read_record(output, c, SETFIT)) is not None}
    pairs = [
        (cell, name, compare(scores, record.scores[SETFIT]))
        for cell, record in records.items()
        for name, scores in record.scores.items()
        if name != SETFIT
    ]
    adjusted = iter(holm([gap.p for *_, gap in pairs]))
    rows = []
    for cell, record in records.items():
        texts = []
        for gap in (gap for of_cell, _, gap in pairs if of_cell == cell):
            texts.append(interval_text(gap, next(adjusted)))
        scores, about = record.scores[SETFIT], record.about
        rows.append([cell, f"{100 * scores.area.mean():.1f}", str(len(scores.area)), *texts])
        rows[-1].append(f"{about['cpu_seconds'] / len(scores.area):.0f}")
    exits = list(dict.fromkeys(name for _, name, _ in pairs))
    header = ("cell", "SetFit", "seeds", *(f"{name} - SetFit" for name in exits), "core s a seed")
    return header, rows


def _are_distinct_runs(cell: str, *names: str) -> bool:
    """Returns whether none of some variants is the run of another one in a cell."""
    variants = [name.rsplit(" ", 1)[0] for name in names]
    return all(stored_as(cell, variant) == variant for variant in variants)


def _differences(
    by_cell: ScoresByCell,
    pairs: Mapping[tuple[str, str], tuple[str, str]],
    header: str,
    *,
    distinct: bool = True,
) -> Table:
    """Returns the mean differences of area between pairs of variants, by number of rows.

    Each comes with the numbers of cells where the first variant is significantly above and below;
    p-values are corrected over the table.

    Args:
      by_cell: scores of all cells.
      pairs: pairs of variants by the labels of their row and column.
      header: header of the row labels.
      distinct: leave out the cells where one of a pair is the run of another variant.

    """
    compared: dict[tuple[str, str, str], list[Comparison]] = {}
    for sizes in dict.fromkeys(ROW_GROUPS.values()):
        cells = {c: s for c, s in by_cell.items() if ROW_GROUPS[CELLS[c].rows] == sizes}
        for texts, (first, second) in pairs.items():
            shared = cells_with(cells, (first, second))
            shared = [c for c in shared if not distinct or _are_distinct_runs(c, first, second)]
            compared[sizes, *texts] = [compare(cells[c][first], cells[c][second]) for c in shared]
    adjusted = iter(holm([gap.p for gaps in compared.values() for gap in gaps]))
    shown: dict[tuple[str, str], list[str]] = {}
    for (sizes, row, _), gaps in compared.items():
        signs = [np.sign(gap.value) * (next(adjusted) < LEVEL) for gap in gaps]  # 0: insignificant
        text = ""
        if gaps:
            mean = 100 * np.mean([gap.value for gap in gaps])
            text = f"{mean:+z.1f}; {signs.count(1)} above, {signs.count(-1)} below of {len(gaps)}"
        shown.setdefault((sizes, row), []).append(text)
    columns = ("rows", header, *dict.fromkeys(column for _, column in pairs))
    return columns, [[*key, *row] for key, row in shown.items() if any(row)]
