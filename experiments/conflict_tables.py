"""Makes the tables and figures of experiments.conflict from conflict.csv.

Shape letters: E exit, N batch.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.encoders import encoder_note
from experiments.records import read_table
from experiments.rendering import Section
from sweet_jax.exits.metrics import mean_interval

HEADER = ("layer", "exits", "cosine")
TITLES = {"first": "first token", "mean": "mean of all tokens"}


def sections(output: Path) -> list[Section]:
    """Returns the tables and figures of each read-out in OUTPUT/conflict.csv."""
    rows = read_table(output / "conflict.csv")
    result = []
    for pooling, title in TITLES.items():
        if of_pooling := [row for row in rows if row["pooling"] == pooling]:
            name = "conflict" if pooling == "first" else f"conflict-{pooling}"
            result += _sections(of_pooling, name, title)
    return result


class _Batches(NamedTuple):
    """Holds the measurements of all batches; NaN for exits below the layer and zero gradients."""

    cosines: np.ndarray  # float64 [N, E, E, E]: layer, exit, other exit
    norms: np.ndarray  # float64 [N, E, E]: layer, exit
    losses: np.ndarray  # float64 [N, E, E]: the same for all layers


def _read_batches(rows: Sequence[dict[str, str]], exits: Sequence[int]) -> _Batches:
    """Returns the measurements in the rows of a read-out."""
    batches = len({row["batch"] for row in rows})
    shapes = ((batches, *[len(exits)] * dimensions) for dimensions in (3, 2, 2))
    cosines, norms, losses = (np.full(shape, np.nan) for shape in shapes)
    for row in rows:
        i, j, k = (exits.index(int(row[key])) for key in ("layer", "exit", "other_exit"))
        batch = int(row["batch"])
        cosines[batch, i, [j, k], [k, j]] = float(row["cosine"] or "nan")
        if j == k:
            norms[batch, i, j], losses[batch, i, j] = float(row["norm"]), float(row["loss"])
    return _Batches(cosines, norms, losses)


def _sections(rows: Sequence[dict[str, str]], name: str, read_out: str) -> list[Section]:
    """Returns the cosines and the norms of a read-out."""
    exits = list(dict.fromkeys(int(row["layer"]) for row in rows))
    cosines, norms, losses = _read_batches(rows, exits)
    batches = len(cosines)
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
            f"over its rows; mean and 95% interval over {batches} batches, all with the "
            "same parameters. Made by python -m experiments.conflict." + f" {about}" * bool(about),
            HEADER,
            table(exits, mean, half),
            conflict_figure(exits, mean),
        ),
        Section(
            f"{name}-norms",
            f"Norms of {title}",
            "Norm of each exit's gradient with respect to these matrices, and each exit's loss: "
            f"mean and 95% interval over the same {batches} batches.",
            ("exit", "loss", *(f"norm in layer {layer}" for layer in exits)),
            _norm_rows(exits, norms, losses),
        ),
    ]


def _norm_rows(exits: Sequence[int], norms: np.ndarray, losses: np.ndarray) -> list[list[str]]:
    """Returns rows of: exit, its loss, and the norm of its gradient in each exit's layer.

    norms, losses: see `_Batches`.
    """
    rows = []
    for j, layer in enumerate(exits):
        columns = [losses[:, j, j], *(norms[:, i, j] for i in range(j + 1))]
        rows.append([str(layer), *map(_mean_text, columns), *[""] * (len(exits) - 1 - j)])
    return rows


def _mean_text(values: np.ndarray) -> str:
    """Formats a mean over batches with half the width of its 95% interval."""
    mean, half = mean_interval(values)
    return f"{mean:.3g}" if half is None else f"{mean:.3g} ± {half:.2g}"


def table(exits: Sequence[int], mean: np.ndarray, half: np.ndarray | None) -> list[list[str]]:
    """Returns rows of: layer, pair of exits at or above it, and cosine with its interval.

    mean, half: mean cosine and half the width of its interval, float [E, E, E]: layer, exit, exit;
      NaN if a gradient is zero.
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
    """Returns heat maps of the cosines of `compare_gradients` [E, E, E] (SWEET paper, figure 3).

    There is a panel for each of the first E - 1 exits' layers; the last layer has one gradient.
    """
    panels = len(layers) - 1
    figure = Figure(figsize=(3.2 * panels + 0.8, 3.4), layout="constrained")
    every = figure.subplots(1, panels, squeeze=False)[0]
    for i, axes in enumerate(every):
        cosines, above = conflict[i, i:, i:], layers[i:]
        image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu")
        for (row, column), value in np.ndenumerate(cosines):
            color = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:z.2f}", ha="center", va="center", color=color)
        axes.set_xticks(range(len(above)), above)
        axes.set_yticks(range(len(above)), above)
        axes.set_xlabel("loss of exit")
        axes.set_title(f"gradients in layer {layers[i]}", fontsize=10)
    every[0].set_ylabel("loss of exit")
    figure.colorbar(image, ax=every, label="cosine, mean over rows", shrink=0.8)
    return figure
