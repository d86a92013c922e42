"""Tables of differences between the areas of two variants, over the cells of experiments.panel."""

from collections.abc import Mapping, Sequence
from pathlib import Path

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
SHOWN_READOUTS = _READOUTS[:6]
_P = "p after Holm"
# By what tables say: the variant that compares the texts of a pair, and the one that does not.
_POOLINGS = {
    "recipe": ("recipe", "recipe-mean"),
    **{
        f"{paper.NAMES[method]}, probe": (f"{method}-auto-probe", f"{method}-mean-probe")
        for method in METHODS
    },
}


def gaps_table(found: ScoresByCell, readouts: Sequence[str] = _READOUTS) -> Table:
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


def changes_table(found: ScoresByCell) -> Table:
    """Returns what each change adds to the area of the variant that it changes, by rows."""
    pairs = {
        (name, f"heads {said}"): (f"{name} {kind}", f"{base} {kind}")
        for name, (base, _) in CHANGES.items()
        for kind, said in (("trained", "as trained"), ("refit", "refitted"))
    }
    return _differences(found, pairs, "change")


def training_table(found: ScoresByCell) -> Table:
    """Returns what training the encoder as the recipe does adds to the area, by rows.

    To that of the frozen probe as a model with exits, and to that of Early-Exit from the same start
    in two epochs.
    """
    others = {"frozen probe": "frozen", "Early-Exit, two epochs": "early_exit-auto-probe"}
    pairs = {
        ("refitted", f"recipe - {said}"): ("recipe refit", f"{variant} refit")
        for said, variant in others.items()
    }
    return _differences(found, pairs, "heads", own_only=False)


def pooling_table(found: ScoresByCell, variants: Sequence[str] = tuple(_POOLINGS)) -> Table:
    """Returns what comparing the texts of a pair does to every exit, and to the area, by cell.

    variants: that are shown, of _POOLINGS, whose rows are all corrected for; the frozen probe
    stands before them, without an area.
    """
    frozen = [[f"{kind}_{layer}" for layer in (1, 2, 4, 6)] for kind in ("mean_probe", "probe")]
    rows = [
        ["frozen probe", title(cell), *(_exits([scores[name] for name in each]) for each in frozen)]
        for cell, scores in found.items()
        if set(frozen[0]) <= set(scores)
    ]
    compared = [row for row in _by_cell(found, _POOLINGS) if row[0] in variants]
    rows = [[*row, "", ""] for row in rows] + compared
    return ("variant", "cell", "exits, mean", "exits, pair", "area, pair - mean", _P), rows


def decay_table(found: ScoresByCell) -> Table:
    """Returns what slower lower layers do to every exit of the recipe, and to its area, by cell."""
    rows = _by_cell(found, {"recipe": ("recipe-decay", "recipe")})
    header = ("cell", "exits, layer_decay 1", "exits, layer_decay 0.8", "area, 0.8 - 1", _P)
    return header, [row[1:] for row in rows]


def scaling_table(found: ScoresByCell) -> Table:
    """Returns what layer scaling does to every exit of the recipe, and to its area, by cell."""
    rows = _by_cell(found, {"recipe": ("recipe-scaling", "recipe")})
    header = ("cell", "exits, layer_scaling 1", "exits, layer_scaling 0.5", "area, 0.5 - 1", _P)
    return header, [row[1:] for row in rows]


def _by_cell(found: ScoresByCell, variants: Mapping[str, tuple[str, str]]) -> list[list[str]]:
    """Returns a row for each pair of variants in each cell: exits of the second and the first, gap.

    Heads refitted; corrected for all rows.
    """
    compared = []
    for text, pair in variants.items():
        one, other = (f"{name} refit" for name in pair)
        for cell in cells_with(found, (one, other)):
            if _is_own(cell, one, other):
                scores = found[cell]
                texts = [text, title(cell), _exits([scores[other]]), _exits([scores[one]])]
                compared.append((texts, compare(scores[one], scores[other])))
    adjusted = holm([gap.p for _, gap in compared])
    return [
        [*texts, interval_text(gap, p), f"{p:.2g}"]
        for (texts, gap), p in zip(compared, adjusted, strict=True)
    ]


def title(cell: str) -> str:
    """Returns a cell's name for readers."""
    return f"{TASKS[CELLS[cell].task].title}, {CELLS[cell].rows:,}"


def interval_text(gap: Comparison, p: float) -> str:
    """Returns a difference with its interval, in points; bold where it is significant."""
    text = f"{100 * gap.value:+z.1f} [{100 * gap.low:+z.1f}, {100 * gap.high:+z.1f}]"
    return f"**{text}**" if p < LEVEL else text


def _exits(scores: Sequence[Scores]) -> str:
    """Returns the mean over seeds of every exit's score, of one variant or of a baseline each."""
    means = np.concatenate([np.atleast_1d(each.exits.mean(axis=0)).ravel() for each in scores])
    return " / ".join(f"{100 * mean:.1f}" for mean in means)


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
            texts.append(interval_text(gap, next(adjusted)))
        scores, about = record.scores[SETFIT], record.about
        rows.append([cell, f"{100 * scores.area.mean():.1f}", str(len(scores.area)), *texts])
        rows[-1].append(f"{about['cpu_seconds'] / len(scores.area):.0f}")
    exits = list(dict.fromkeys(name for _, name, _ in pairs))
    header = ("cell", "SetFit", "seeds", *(f"{name} - SetFit" for name in exits), "core s a seed")
    return header, rows


def _is_own(cell: str, *names: str) -> bool:
    """Returns whether in a cell none of some variants is the run of another one."""
    variants = [name.rsplit(" ", 1)[0] for name in names]
    return all(stored_as(cell, variant) == variant for variant in variants)


def _differences(
    found: ScoresByCell,
    pairs: Mapping[tuple[str, str], tuple[str, str]],
    what: str,
    *,
    own_only: bool = True,
) -> Table:
    """Returns the mean differences of area of pairs of variants, by rows.

    With the number of cells that are significantly above and below; corrected for all comparisons
    of the table. pairs: by the texts of their row and column. own_only: leave out cells where one
    of a pair is the run of another variant.
    """
    compared: dict[tuple[str, str, str], list[Comparison]] = {}
    for sizes in dict.fromkeys(ROW_GROUPS.values()):
        cells = {c: s for c, s in found.items() if ROW_GROUPS[CELLS[c].rows] == sizes}
        for texts, (one, other) in pairs.items():
            shared = cells_with(cells, (one, other))
            own = [c for c in shared if not own_only or _is_own(c, one, other)]
            both = [cells[c] for c in own]
            compared[sizes, *texts] = [compare(scores[one], scores[other]) for scores in both]
    adjusted = iter(holm([gap.p for gaps in compared.values() for gap in gaps]))
    shown: dict[tuple[str, str], list[str]] = {}
    for (sizes, row, _), gaps in compared.items():
        sure = [np.sign(gap.value) * (next(adjusted) < LEVEL) for gap in gaps]
        text = ""
        if gaps:
            mean = 100 * np.mean([gap.value for gap in gaps])
            text = f"{mean:+z.1f}; {sure.count(1)} above, {sure.count(-1)} below of {len(gaps)}"
        shown.setdefault((sizes, row), []).append(text)
    header = ("rows", what, *dict.fromkeys(column for _, column in pairs))
    return header, [[*key, *row] for key, row in shown.items() if any(row)]
