"""Traces of the report's figures, drawn by charts.js in the page and by matplotlib in files.

Shape letters: E exit, T points, R' replicas of the chosen learning rate.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.calibration import outcome_probabilities
from sweet_jax.exits.reliability import (
    expected_calibration_error,
    reliability_diagram,
    shares_right,
)
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.report.baselines import baseline_title

# Viridis from dark to light for exits in order of depth, distinguishable without color vision.
_COLORS = ("#440154", "#3b528b", "#21918c", "#2f8f3a", "#8f8500", "#cc6a1f", "#c0392b", "#7f7f7f")
_DASHES = ("solid", "longdash", "dashdot", "dashdotdot")  # of lines; bounds have others too
_FAR = 0.15  # distance below the lowest exit from which on a baseline is not drawn by default
_SMOOTHED = 20  # number of steps over which the loss is averaged
_FEW = 5  # minimum number of rows of a bin
LOSS_AXES = ("step", "training loss, mean of 20 steps")
RELIABILITY_AXES = ("confidence", "share correct")

# Title, color and dash of each bound of results.json, in the order of the figures.
BOUNDS = {
    "floor": ("floor: exits at random", "#7f7f7f", "dot"),
    "stable": ("stable oracle", "#3b528b", "dash"),
    "agreement": ("agreement oracle", "#8f8500", "dash"),
    "any_correct": ("any-correct oracle (inflated by luck)", "#c0392b", "dash"),
    "best_thresholds": ("one threshold per exit, fitted on these rows", "#2f8f3a", "dashdot"),
}

# Markers of the baselines. All probes share one; "" is for other names.
_SYMBOLS = {
    "majority": "x",
    "tfidf": "diamond",
    "constant": "x",
    "tfidf_one_vs_rest": "diamond",
    "tfidf_ridge": "diamond",
    "probe": "triangle-up",
    "fine_tuned": "star",
    "": "cross",
}


@dataclasses.dataclass(frozen=True)
class Trace:
    """Describes a line, a band or markers, and the entry in the legend."""

    name: str  # name in the legend; "" for no entry
    color: str
    x: Sequence[float] = ()  # [T]
    y: Sequence[float] = ()  # [T]
    low: Sequence[float] = ()  # [T], the lower edge of a band whose upper edge is y
    dash: str = ""  # dash of the line, a key of the dashes in figures.py; "" for no line
    width: float = 2  # width of the line, in CSS pixels
    symbol: str = ""  # symbol of the markers, a key of the markers in figures.py; "" for none
    size: int = 8  # size of the markers, in CSS pixels
    text: Sequence[str] = ()  # text of each point, shown next to the pointer
    steps: bool = False  # whether y is constant until the next x, rather than interpolated
    optional: bool = False  # whether the page shows it only after a click on its name
    far: bool = False  # whether it is so far below the other traces that it would flatten them


def with_shown_metric(traces: Iterable[Trace | None], metric: str) -> list[Trace | None]:
    """Returns traces of a metric, whose y becomes its values as shown: errors are positive."""
    shown = ShownMetric.of(metric)
    return [
        trace and dataclasses.replace(trace, y=shown.values(trace.y), low=shown.values(trace.low))
        for trace in traces
    ]


def metric_title(metric: str) -> str:
    """Returns the title of the axis of a metric."""
    shown = ShownMetric.of(metric)
    return shown.name.replace("_", " ") + shown.better


def exit_color(exit_index: int) -> str:
    """Returns the color of an exit, the same in every figure."""
    return _COLORS[exit_index % len(_COLORS)]


def line_dash(number: int) -> str:
    """Returns the dash of a line: another one for the next line, and when its color comes again.

    Lines thus differ without color vision too. No dash is that of the floor or the stable oracle.
    """
    rounds = number // len(_COLORS)
    return _DASHES[(rounds + number) % len(_DASHES)]


def operating_point_traces(results: Mapping[str, Any]) -> list[Trace]:
    """Returns traces of the best replica's grid of 11 thresholds, and of each exit for all rows."""
    replica = results["replicas"][results["best_replica"]]
    grid, exits = replica["grid"], replica["individual"]
    costs, values = ([row[key] for row in exits] for key in ("cost", "score"))
    paper = Trace(
        "the paper's 11 thresholds",
        "#440154",
        grid["cost"],
        grid["score"],
        symbol="circle",
        size=7,
        text=[f"threshold {threshold:.4g}" for threshold in grid["threshold"]],
        optional=True,
    )
    layers = [f"exit {row['layer']} for all" for row in exits]
    alone = Trace("one exit for all", "#cc6a1f", costs, values, symbol="square", text=layers)
    return [paper, alone]


def seed_band(analysis: Analysis, color: str = "#21918c") -> Trace | None:
    """Returns the band between the lowest and the highest curve of several seeds, otherwise None.

    The curves are those of the chosen learning rate, read at 200 common costs.
    """
    cost, scores = common_curves(analysis)
    if len(scores) < 2:
        return None
    low, high = scores.min(axis=0).tolist(), scores.max(axis=0).tolist()
    return Trace(f"{len(scores)} seeds, lowest to highest", color, cost.tolist(), high, low=low)


def common_curves(analysis: Analysis) -> tuple[np.ndarray, np.ndarray]:
    """Reads the curves of the chosen replicas at common costs: cost [T], metric [R', T]."""
    curve = analysis.curve
    cost = np.linspace(curve.cost.min(), curve.cost.max(), 200)
    scores = [np.interp(cost, curve.cost[r], curve.score[r]) for r in analysis.chosen]
    return cost, np.stack(scores)


def bound_traces(results: Mapping[str, Any]) -> list[Trace]:
    """Returns the best replica's bounds in the order of BOUNDS; missing bounds have no points.

    The page initially hides all bounds except the floor and the stable oracle.
    """
    bounds = results["replicas"][results["best_replica"]]["bounds"]
    none: dict[str, list[float]] = {"cost": [], "score": []}
    return [
        Trace(
            title,
            color,
            bounds.get(name, none)["cost"],
            bounds.get(name, none)["score"],
            dash=dash,
            width=1.5,
            optional=name not in ("floor", "stable"),
        )
        for name, (title, color, dash) in BOUNDS.items()
    ]


def baseline_traces(results: Mapping[str, Any]) -> list[Trace]:
    """Returns the baselines of results.json as black markers; [] if there are none.

    The probes of all layers share one entry of the legend.
    """
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, row in results.get("baselines", {}).items():
        group = "probe" if name.startswith("probe_") else name
        groups.setdefault(group, {})[name] = row
    exits = results["replicas"][results["best_replica"]]["individual"]
    known = [row["score"] for row in exits if row["score"] is not None]
    low = min(known, default=-np.inf) - _FAR
    return [
        Trace(
            "frozen encoder + probe" if group == "probe" else baseline_title(group),
            "#222222",
            [row["cost"] for row in rows.values()],
            [row["score"] for row in rows.values()],
            symbol=_SYMBOLS.get(group, _SYMBOLS[""]),
            size=10,
            text=[baseline_title(name) for name in rows],
            far=all(row["score"] is not None and row["score"] < low for row in rows.values()),
        )
        for group, rows in groups.items()
    ]


def reliability_traces(analysis: Analysis, replica: int) -> dict[str, list[Trace]]:
    """Returns the reliability diagram (Guo et al. 2017) of each exit on validation rows, by title.

    The traces show mean confidence and share correct in ten bins, dotted before and solid after
    temperature scaling. Bins with fewer than 5 rows, or fewer than 1% of all rows, are left out,
    since their shares are mostly noise. Exits that diverged are left out too. Returns {} if outputs
    are not probabilities.
    """
    logits, labels = analysis.validation.logits[replica], analysis.validation.labels[replica]
    objective = analysis.validation.objective
    if objective.categorical is None:
        return {}
    correct = shares_right(logits, labels, objective)  # [E, N]
    fitted = analysis.temperatures[replica]
    few, diagrams = max(_FEW, 0.01 * correct.shape[1]), {}
    for e, layer in enumerate(analysis.validation.layers):
        traces, errors = [Trace("perfect", "#bbbbbb", [0, 1], [0, 1], dash="solid", width=1)], []
        for when, dash, scale in (("before", "dot", np.ones(1)), ("after", "solid", fitted[[e]])):
            outcomes = outcome_probabilities(logits[[e]], scale, objective)[0]  # [N, V, K]
            confidences = outcomes.max(axis=-1).mean(axis=-1)  # [N]
            if np.isnan(confidences).any():
                break
            mean, share, count = reliability_diagram(confidences, correct[e])
            errors.append(expected_calibration_error(confidences, correct[e]))
            use = count >= few
            points = mean[use].tolist(), share[use].tolist()
            rows = [f"{n} rows" for n in count[use].tolist()]
            color = exit_color(e)
            traces.append(
                Trace(when, color, *points, dash=dash, symbol="circle", size=6, text=rows)
            )
        if len(errors) == 2:
            diagrams[f"exit {layer}: ECE {errors[0]:.3f}, after {errors[1]:.3f}"] = traces
    return diagrams


def loss_traces(
    metrics: Sequence[Mapping[str, Any]], replica: int, trainings: Mapping[str, Sequence[int]]
) -> list[Trace]:
    """Returns the training loss of each exit, averaged over 20 steps.

    `trainings` holds the layer numbers of the exits of each training in the log, by its name.
    """
    traces: list[Trace] = []
    for name, layers in trainings.items():
        rows = [row for row in metrics if row["training"] == name]
        steps = np.asarray([row["step"] for row in rows])
        for e, layer in enumerate(layers):
            values = np.asarray([row["loss"][replica][e] for row in rows], np.float64)
            total = np.cumsum(np.concatenate([[0.0], values]))
            width = np.minimum(np.arange(1, len(values) + 1), _SMOOTHED)
            smooth = (total[1:] - total[np.arange(1, len(values) + 1) - width]) / width
            finite = np.isfinite(smooth)
            color, dash = exit_color(len(traces)), line_dash(len(traces))
            points = steps[finite].tolist(), smooth[finite].tolist()
            traces.append(Trace(f"exit {layer}", color, *points, dash=dash))
    return traces
