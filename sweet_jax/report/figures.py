"""Draws the report's figures as PNG and SVG with matplotlib.

Shape letters: R replica, E exit, T thresholds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.bootstrap import bootstrap_curve
from sweet_jax.files import atomic_write
from sweet_jax.report.series import (
    BOUNDS,
    baseline_series,
    exit_color,
    loss_series,
    reliability_series,
)

# Matplotlib's marker and its size for each plotly symbol of `baseline_series`.
_MARKS = {
    "x": ("X", 7),
    "diamond": ("D", 6),
    "triangle-up": ("^", 6),
    "star": ("*", 10),
    "cross": ("P", 7),
}


def write_figures(
    folder: Path,
    analysis: Analysis,
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    trainings: Mapping[str, Sequence[int]],
) -> None:
    """Writes the figures curve, exits, reliability and loss, each as .png and .svg."""
    best = results["best_replica"]
    figures = {
        "curve": curve_figure(analysis, results),
        "exits": exits_figure(results),
        "reliability": reliability_figure(reliability_series(analysis, best)),
        "loss": loss_figure(loss_series(metrics, best, trainings)),
    }
    for name, figure in figures.items():
        write_figure(folder, name, figure)


def write_figure(folder: Path, name: str, figure: Figure) -> None:
    """Writes one figure as .png and .svg."""
    for suffix in ("png", "svg"):
        with atomic_write(folder / f"{name}.{suffix}") as path:
            figure.savefig(path, dpi=150)


def curve_figure(analysis: Analysis, results: Mapping[str, Any]) -> Figure:
    """Draws the metric against cost: every replica's exact curve, the best one's single exits and
    the paper's grid, the bounds, and the baselines.
    """
    figure, axes = _figure(f"{results['task']}, {results['method']}")
    best = results["best_replica"]
    for r in range(len(analysis.curve.cost)):
        style = {"color": "#21918c", "lw": 2, "zorder": 3} if r == best else {"color": "#bbbbbb"}
        axes.step(analysis.curve.cost[r], analysis.curve.score[r], where="post", **style)
    axes.plot([], [], color="#21918c", label="every threshold, 95% band over rows")
    rows = analysis.validation.replica(best)
    band = bootstrap_curve(rows, analysis.policy, calibrators=[analysis.calibrators[best]])
    low, high = band.score_interval[0].T
    axes.fill_between(band.cost[0], low, high, color="#21918c", alpha=0.12, lw=0)
    grid = results["replicas"][best]["grid"]
    axes.plot(
        grid["cost"], grid["score"], "o", color="#440154", ms=4, zorder=4, label="11 thresholds"
    )
    exits = results["replicas"][best]["individual"]
    axes.plot(
        [row["cost"] for row in exits],
        [row["score"] for row in exits],
        "s",
        color="#e8833a",
        zorder=4,
        label="one exit for all",
    )
    dashes = {"dot": ":", "dash": "--", "dashdot": "-."}
    for name, bound in results["replicas"][best]["bounds"].items():
        title, ink, dash = BOUNDS[name]
        axes.plot(bound["cost"], bound["score"], dashes[dash], color=ink, lw=1, label=title)
    _plot_baselines(axes, results)
    axes.set_xlabel("cost (share of the full model's layers)")
    axes.set_ylabel(f"{results['metric']} (n = {results['n']['validation']})")
    # Below the axes: inside them it would cover a baseline's mark.
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.set_size_inches(6.4, 5.4)
    return figure


def _plot_baselines(axes, results: Mapping[str, Any]) -> None:
    """Draws the baselines as black markers, on an axis that begins at cost 0."""
    series = baseline_series(results)
    for entry in series:
        mark, size = _MARKS[entry["symbol"]]
        style = {"color": "#222222", "ms": size, "zorder": 5, "clip_on": False}
        if entry["far"]:
            axes.plot([], [], mark, label=f"{entry['title']}: {max(entry['score']):.3f}", **style)
        else:
            axes.plot(entry["cost"], entry["score"], mark, label=entry["title"], **style)
    if series:
        axes.set_xlim(left=0)


def exits_figure(results: Mapping[str, Any]) -> Figure:
    """Draws the metric of every exit of the best replica, with its 95% interval over rows."""
    figure, axes = _figure("each exit alone, 95% interval over rows")
    rows = results["replicas"][results["best_replica"]]["individual"]
    for e, row in enumerate(rows):
        low, high = row["interval"]
        bars = [[max(0.0, row["score"] - low)], [max(0.0, high - row["score"])]]
        axes.errorbar([e], [row["score"]], bars, fmt="o", color=exit_color(e), capsize=4)
    axes.set_xticks(range(len(rows)), [f"exit {row['layer']}" for row in rows])
    axes.set_ylabel(f"{results['metric']} (n = {results['n']['validation']})")
    return figure


def reliability_figure(series: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws reliability diagrams (Guo et al. 2017) before and after temperature scaling."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, name in zip(panels, ("before", "after"), strict=True):
        axes.plot([0, 1], [0, 1], color="#bbbbbb", lw=1)
        for e, row in enumerate(series):
            if name in row:
                bins = row[name]
                label = f"exit {row['layer']}, ECE {bins['error']:.3f}"
                axes.plot(
                    bins["confidence"], bins["correct"], "o-", color=exit_color(e), label=label
                )
        axes.set_title(f"{name} temperature scaling")
        axes.set_xlabel("confidence")
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("share correct")
    return figure


def loss_figure(series: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the training loss of every exit."""
    figure, axes = _figure("training loss, mean of 20 steps")
    for e, row in enumerate(series):
        axes.plot(row["step"], row["loss"], color=exit_color(e), label=f"exit {row['layer']}")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy")
    axes.legend(frameon=False)
    return figure


def conflict_figure(layers: Sequence[int], conflict: np.ndarray) -> Figure:
    """Draws heat maps of `training.conflict.gradient_conflict` [E, E, E] (SWEET paper, figure 3).

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


def _figure(title: str):
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    # A data set's name may hold $, which matplotlib would read as mathematics.
    axes.set_title(title, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
