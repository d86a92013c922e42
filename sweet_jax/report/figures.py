"""Draws the report's figures as PNG and SVG with matplotlib.

Shape letters: E exit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.bootstrap import bootstrap_curve
from sweet_jax.files import atomic_write
from sweet_jax.report.traces import (
    LOSS_AXES,
    RELIABILITY_AXES,
    Trace,
    baseline_traces,
    bound_traces,
    exit_color,
    loss_traces,
    operating_point_traces,
    reliability_traces,
)

# Matplotlib's names for plotly's.
_MARKERS = {
    "": "",
    "circle": "o",
    "square": "s",
    "x": "X",
    "diamond": "D",
    "triangle-up": "^",
    "star": "*",
    "cross": "P",
}
_DASHES = {"": "", "solid": "-", "dot": ":", "dash": "--", "dashdot": "-."}


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
    }
    for name, titles, traces in (
        ("reliability", RELIABILITY_AXES, reliability_traces(analysis, best)),
        ("loss", LOSS_AXES, loss_traces(metrics, best, trainings)),
    ):
        if not traces:  # a regression has no confidences
            continue
        figures[name], axes = _figure("", *titles)
        _plot(axes, traces)
        axes.legend(frameon=False, fontsize=8)
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
    figure, axes = _figure(
        f"{results['task']}, {results['method']}",
        "cost (share of the full model's layers)",
        f"{results['metric']} (n = {results['n']['validation']})",
    )
    best, curve = results["best_replica"], analysis.curve
    for r in range(len(curve.cost)):
        style = {"color": "#21918c", "lw": 2, "zorder": 3} if r == best else {"color": "#bbbbbb"}
        axes.step(curve.cost[r], curve.score[r], where="post", **style)
    axes.plot([], [], color="#21918c", label="every threshold, 95% band over rows")
    rows = analysis.validation.replica(best)
    band = bootstrap_curve(rows, analysis.policy, calibrators=[analysis.calibrators[best]])
    low, high = band.score_interval[0].T
    axes.fill_between(band.cost[0], low, high, color="#21918c", alpha=0.12, lw=0)
    baselines = baseline_traces(results)
    _plot(axes, [*operating_point_traces(results), *bound_traces(results), *baselines])
    if baselines:
        axes.set_xlim(left=0)
    # Below the axes: inside them it would cover a baseline's mark.
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.set_size_inches(6.4, 5.4)
    return figure


def _plot(axes: Axes, traces: Sequence[Trace]) -> None:
    """Draws traces, markers above lines; of what is far below the rest, only the name and value."""
    for trace in traces:
        points: tuple[Sequence[float], Sequence[float]] = (trace.x, trace.y)
        label = trace.name
        if trace.far:
            points, label = ([], []), f"{trace.name}: {max(trace.y):.3f}"
        axes.plot(
            *points,
            label=label,
            color=trace.color,
            linestyle=_DASHES[trace.dash],
            linewidth=0.75 * trace.width,
            marker=_MARKERS[trace.symbol],
            markersize=0.7 * trace.size,
            zorder=4 if trace.symbol else 2,
            clip_on=not trace.symbol,  # at cost 0 a marker reaches beyond the axis
        )


def exits_figure(results: Mapping[str, Any]) -> Figure:
    """Draws the metric of every exit of the best replica, with its 95% interval over rows."""
    metric = f"{results['metric']} (n = {results['n']['validation']})"
    figure, axes = _figure("each exit alone, 95% interval over rows", "", metric)
    rows = results["replicas"][results["best_replica"]]["individual"]
    for e, row in enumerate(rows):
        low, high = row["interval"]
        bars = [[max(0.0, row["score"] - low)], [max(0.0, high - row["score"])]]
        axes.errorbar([e], [row["score"]], bars, fmt="o", color=exit_color(e), capsize=4)
    axes.set_xticks(range(len(rows)), [f"exit {row['layer']}" for row in rows])
    return figure


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    # A data set's name may hold $, which matplotlib would read as mathematics.
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
