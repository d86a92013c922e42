"""The tables and figures of experiments.conflict, of conflict.csv.

Shape letters: E exit.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.options import encoder_note
from experiments.records import read_table
from experiments.rendering import Section
from sweet_jax.exits.metrics import mean_interval

HEADER = ("layer", "exits", "cosine")
TITLES = {"first": "first token", "mean": "mean of all tokens"}


def sections(output: Path) -> list[Section]:
    """Returns the tables and figures of OUTPUT/conflict.csv, of each read-out that it has."""
    rows = read_table(output / "conflict.csv")
    found = []
    for pooling, title in TITLES.items():
        if of_pooling := [row for row in rows if row["pooling"] == pooling]:
            name = "conflict" if pooling == "first" else f"conflict-{pooling}"
            found += _sections(of_pooling, name, title)
    return found


def _sections(rows: Sequence[dict[str, str]], name: str, read_out: str) -> list[Section]:
    exits = list(dict.fromkeys(int(row["layer"]) for row in rows))
    batches = len({row["batch"] for row in rows})
    cosines = np.full((batches, *[len(exits)] * 3), np.nan)  # [batches, E, E, E]
    norms, losses = (np.full((batches, *[len(exits)] * 2), np.nan) for _ in range(2))
    for row in rows:
        i, j, k = (exits.index(int(row[key])) for key in ("layer", "exit", "other_exit"))
        batch = int(row["batch"])
        # A number is left out where a gradient is zero.
        cosines[batch, i, [j, k], [k, j]] = float(row["cosine"] or "nan")
        if j == k:
            norms[batch, i, j], losses[batch, i, j] = float(row["norm"]), float(row["loss"])
    mean, half = mean_interval(cosines)
    run = rows[0]
    about = encoder_note(run["checkpoint"])
    title = f"the exits' gradients, {run['task']}, {read_out}"
    return [
        Section(
            name,
            f"Conflict of {title} (figures 3, 9)",
            f"After {run['steps']} steps of Early-Exit with {run['checkpoint']} "
            f"({int(run['train_rows']):,} training "
            f"rows, learning rate {float(run['learning_rate']):g}, seed {run['seed']}): cosine of "
            "two exits' gradients with respect to the last feed-forward matrix of a layer, mean "
            f"over its rows; mean and 95% interval over {batches} batches, all at the "
            "same parameters. Made by python -m experiments.conflict." + f" {about}" * bool(about),
            HEADER,
            table(exits, mean, half),
            conflict_figure(exits, mean),
        ),
        Section(
            f"{name}-norms",
            f"Norms of {title}",
            "Of each exit's gradient in each of those matrices, and each exit's loss: mean and 95% "
            f"interval over the same {batches} batches.",
            ("exit", "loss", *(f"norm in layer {layer}" for layer in exits)),
            _norm_rows(exits, norms, losses),
        ),
    ]


def _norm_rows(exits: Sequence[int], norms: np.ndarray, losses: np.ndarray) -> list[list[str]]:
    """Returns (exit, its loss, the norm of its gradient in each exit's layer) as text.

    norms, losses: float [batches, E, E], layer, exit; NaN where the exit lies below the layer.
    """
    rows = []
    for j, number in enumerate(exits):
        each = [losses[:, j, j], *(norms[:, i, j] for i in range(j + 1))]
        rows.append([str(number), *map(_mean_text, each), *[""] * (len(exits) - 1 - j)])
    return rows


def _mean_text(values: np.ndarray) -> str:
    mean, half = mean_interval(values)
    return f"{mean:.3g}" if half is None else f"{mean:.3g} ± {half:.2g}"


def table(exits: Sequence[int], mean: np.ndarray, half: np.ndarray | None) -> list[list[str]]:
    """Returns (layer, pair of exits at or above it, cosine with its interval) as text.

    mean, half: float [E, E, E], layer, exit, exit; NaN where a gradient is zero.
    """
    rows = []
    for i, layer in enumerate(exits):
        for j, k in itertools.combinations(range(i, len(exits)), 2):
            text = f"{mean[i, j, k]:.3f}" if np.isfinite(mean[i, j, k]) else "-"
            if text != "-" and half is not None:
                text += f" ± {half[i, j, k]:.3f}"
            rows.append([str(layer), f"{exits[j]} and {exits[k]}", text])
    return rows


def conflict_figure(layers: Sequence[int], conflict: np.ndarray) -> Figure:
    """Draws heat maps of the cosines of `compare_gradients` [E, E, E] (SWEET paper, figure 3).

    A panel for each of the first E - 1 exits' layers: the last exit's has one gradient only.
    """
    panels = len(layers) - 1
    figure = Figure(figsize=(3.2 * panels + 0.8, 3.4), layout="constrained")
    each = figure.subplots(1, panels, squeeze=False)[0]
    for i, axes in enumerate(each):
        cosines, above = conflict[i, i:, i:], layers[i:]
        image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu")
        for (row, column), value in np.ndenumerate(cosines):
            ink = "white" if abs(value) > 0.6 else "black"
            shown = f"{value:.2f}".replace("-0.00", "0.00")
            axes.text(column, row, shown, ha="center", va="center", color=ink)
        axes.set_xticks(range(len(above)), above)
        axes.set_yticks(range(len(above)), above)
        axes.set_xlabel("loss of exit")
        axes.set_title(f"gradients in layer {layers[i]}", fontsize=10)
    each[0].set_ylabel("loss of exit")
    figure.colorbar(image, ax=each, label="cosine, mean over rows", shrink=0.8)
    return figure
