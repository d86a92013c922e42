"""Draws the report's figures as PNG and SVG with matplotlib.

Shape letters: E exit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.bootstrap import bootstrap_curve
from sweet_jax.files import atomic_write
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.report.traces import (
    LOSS_AXES,
    RELIABILITY_AXES,
    Trace,
    baseline_traces,
    bound_traces,
    exit_color,
    loss_traces,
    metric_title,
    operating_point_traces,
    reliability_traces,
    seed_band,
    with_shown_metric,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib's names for the markers and dashes of traces.
_MARKERS = {
    "": "",
    "circle": "o",
    "ring": "o",
    "square": "s",
    "x": "X",
    "diamond": "D",
    "triangle-up": "^",
    "star": "*",
    "cross": "P",
}
_DASHES = {
    "": "",
    "solid": "-",
    "dot": ":",
    "dash": "--",
    "dashdot": "-.",
    "longdash": (0, (9, 3)),
    "dashdotdot": (0, (6, 2, 1, 2, 1, 2)),
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
    }
    if traces := reliability_traces(analysis, best):  # empty for regression
        figures["reliability"] = reliability_figure(traces)
    figures["loss"], axes = _figure("", *LOSS_AXES)
    _plot(axes, loss_traces(metrics, best, trainings))
    axes.legend(frameon=False, fontsize=8)
    for name, figure in figures.items():
        write_figure(folder, name, figure)


def write_figure(folder: Path, name: str, figure: "Figure") -> None:
    """Writes one figure as .png and .svg."""
    for suffix in ("png", "svg"):
        with atomic_write(folder / f"{name}.{suffix}") as path:
            figure.savefig(path, dpi=150)


def curve_figure(analysis: Analysis, results: Mapping[str, Any]) -> "Figure":
    """Draws the metric against cost.

    The figure shows the best replica's exact curve, its single exits, the paper's grid, the band of
    several seeds, the bounds and the baselines.
    """
    shown = ShownMetric.of(results["metric"])
    figure, axes = _figure(
        f"{results['task']}, {results['method']}",
        "cost (share of the full model's layers)",
        f"{metric_title(results['metric'])} (n = {results['n']['validation']})",
    )
    best, curve = results["best_replica"], analysis.curve
    values = shown.value(curve.score[best])
    (line,) = axes.step(curve.cost[best], values, where="post", color="#21918c", lw=2)
    line.set(zorder=3, label="every threshold, 95% band over rows")
    if (seeds := seed_band(analysis)) is not None:
        low, high = shown.values(seeds.low), shown.values(seeds.y)
        area = axes.fill_between(seeds.x, low, high, color="#bbbbbb", alpha=0.6, lw=0)
        area.set_label(seeds.name)
    rows = analysis.validation.replica(best)
    band = bootstrap_curve(rows, analysis.policy, calibrators=[analysis.calibrators[best]])
    low, high = shown.value(band.score_interval[0]).T
    axes.fill_between(band.cost[0], low, high, color="#21918c", alpha=0.12, lw=0)
    baselines = baseline_traces(results)
    traces = [*operating_point_traces(results), *bound_traces(results), *baselines]
    _plot(axes, with_shown_metric(traces, results["metric"]), max if shown.sign > 0 else min)
    if baselines:
        axes.set_xlim(left=0)
    # Inside the axes, the legend would cover the markers of baselines.
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.set_size_inches(6.4, 5.4)
    return figure


def _plot(
    axes: "Axes", traces: Iterable[Trace | None], best: Callable[[Iterable[float]], float] = max
) -> None:
    """Draws traces, with markers above lines; traces far below the others only have a legend.

    best: function that returns the best of some values, which that legend names.
    """
    for trace in filter(None, traces):
        points: tuple[Sequence[float], Sequence[float]] = (trace.x, trace.y)
        label = trace.name
        if trace.far:
            points, label = ([], []), f"{trace.name}: {best(trace.y):.3f}"
        axes.plot(
            *points,
            label=label,
            color=trace.color,
            linestyle=_DASHES[trace.dash],
            linewidth=0.75 * trace.width,
            marker=_MARKERS[trace.symbol],
            markersize=0.7 * trace.size,
            zorder=4 if trace.symbol else 2,
            fillstyle="none" if trace.symbol == "ring" else "full",
            # At cost 0 a marker extends beyond the axis; without points, the layout would fail.
            clip_on=not (trace.symbol and len(points[0])),
        )


def reliability_figure(diagrams: Mapping[str, Sequence[Trace]]) -> "Figure":
    """Draws the reliability diagram of each exit in its own axes."""
    columns = max(1, min(4, len(diagrams)))
    rows = -(-max(1, len(diagrams)) // columns)
    figure = _empty_figure(2.6 * columns, 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(diagrams) :]:
        axes.set_visible(False)
    for axes, (title, traces) in zip(grid.flat, diagrams.items(), strict=False):
        _plot(axes, traces)
        axes.set_title(title, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(RELIABILITY_AXES[0], fontsize=9)
    figure.supylabel(f"{RELIABILITY_AXES[1]} (dotted: before scaling)", fontsize=9)
    return figure


def exits_figure(results: Mapping[str, Any]) -> "Figure":
    """Draws the metric of every exit of the best replica, with its 95% interval over rows.

    An exit that diverged has no marker but keeps its tick.
    """
    shown = ShownMetric.of(results["metric"])
    metric = f"{metric_title(results['metric'])} (n = {results['n']['validation']})"
    figure, axes = _figure("each exit alone, 95% interval over rows", "", metric)
    rows = results["replicas"][results["best_replica"]]["individual"]
    for e, row in enumerate(rows):
        if row["score"] is None:  # it diverged
            continue
        value, (low, high) = shown.value(row["score"]), shown.interval(row["interval"])
        bars = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar([e], [value], bars, fmt="o", color=exit_color(e), capsize=4)
    axes.set_xticks(range(len(rows)), [f"exit {row['layer']}" for row in rows])
    return figure


def _empty_figure(width: float, height: float) -> "Figure":
    """Returns a figure of a size in inches; imports matplotlib, which takes half a second."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _figure(title: str, x: str, y: str) -> "tuple[Figure, Axes]":
    figure = _empty_figure(6.4, 4.2)
    axes = figure.subplots()
    # The name of a data set may contain $, which matplotlib would parse as math.
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
