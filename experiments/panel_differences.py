"""Tables of differences between the areas of two variants, over the cells of experiments.panel."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments import paper
from experiments.panel_records import read_record
from experiments.panel_statistics import LEVEL, Comparison, Found, compare, holm, shared_cells
from experiments.panel_variants import CELLS, CHANGES, READOUTS, ROW_GROUPS, SETFIT

Table = tuple[Sequence[str], list[list[str]]]  # header, rows
_PAIRS = (("sweet", "early_exit"), ("multi_model", "early_exit"), ("sweet", "multi_model"))
_READOUTS = tuple(f"{readout} {kind}" for readout in READOUTS for kind in ("trained", "refit"))
SHOWN_READOUTS = _READOUTS[:4]


def gaps_table(found: Found, readouts: Sequence[str] = _READOUTS) -> Table:
    """Returns the mean differences of area between the methods, by rows and read-out."""
    pairs = {
        (readout, f"{paper.NAMES[one]} - {paper.NAMES[other]}"): (
            f"{one}-{readout}",
            f"{other}-{readout}",
        )
        for readout in readouts
        for one, other in _PAIRS
    }
    return _differences(found, pairs, "read-out")


def changes_table(found: Found) -> Table:
    """Returns what each change adds to the area of the variant that it changes, by rows."""
    pairs = {
        (name, f"heads {said}"): (f"{name} {kind}", f"{base} {kind}")
        for name, (base, _) in CHANGES.items()
        for kind, said in (("trained", "as trained"), ("refit", "refitted"))
    }
    return _differences(found, pairs, "change")


def setfit_table(output: Path) -> Table:
    """Returns SetFit's scores beside those of every exit of the recipe, on the same rows."""
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
            text = f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
            texts.append(f"**{text}**" if next(adjusted) < LEVEL else text)
        scores, about = record.scores[SETFIT], record.about
        rows.append([cell, f"{100 * scores.area.mean():.1f}", str(len(scores.area)), *texts])
        rows[-1].append(f"{about['cpu_seconds'] / len(scores.area):.0f}")
    exits = list(dict.fromkeys(name for _, name, _ in pairs))
    header = ("cell", "SetFit", "seeds", *(f"{name} - SetFit" for name in exits), "core s a seed")
    return header, rows


def _differences(
    found: Found, pairs: Mapping[tuple[str, str], tuple[str, str]], what: str
) -> Table:
    """Returns the mean differences of area of pairs of variants, by rows.

    With the number of cells that are significantly above and below; corrected for all comparisons
    of the table. pairs: by the texts of their row and column.
    """
    compared: dict[tuple[str, str, str], list[Comparison]] = {}
    for sizes in dict.fromkeys(ROW_GROUPS.values()):
        cells = {c: s for c, s in found.items() if ROW_GROUPS[CELLS[c].rows] == sizes}
        for texts, (one, other) in pairs.items():
            both = [cells[c] for c in shared_cells(cells, (one, other))]
            compared[sizes, *texts] = [compare(scores[one], scores[other]) for scores in both]
    adjusted = iter(holm([gap.p for gaps in compared.values() for gap in gaps]))
    shown: dict[tuple[str, str], list[str]] = {}
    for (sizes, row, _), gaps in compared.items():
        sure = [np.sign(gap.value) * (next(adjusted) < LEVEL) for gap in gaps]
        text = ""
        if gaps:
            mean = 100 * np.mean([gap.value for gap in gaps])
            text = f"{mean:+.1f}; {sure.count(1)} above, {sure.count(-1)} below of {len(gaps)}"
        shown.setdefault((sizes, row), []).append(text)
    header = ("rows", what, *dict.fromkeys(column for _, column in pairs))
    return header, [[*key, *row] for key, row in shown.items() if any(row)]
