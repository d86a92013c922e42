"""Charts of the page as JSON, which charts.js draws and page.js updates with the slider.

Shape letters: E exit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sweet_jax.files import replace_nonfinite
from sweet_jax.report.details import ExitTimes
from sweet_jax.report.traces import (
    Trace,
    baseline_traces,
    bound_traces,
    metric_title,
    operating_point_traces,
    with_shown_metric,
)

COST_AXIS = "share of the full model's layers"


def make_chart(
    title: str, x: str, y: str, traces: Sequence[Trace | None], **options: Any
) -> dict[str, Any]:
    """Returns a chart with titles, the traces that are not None, and options (see charts.js)."""
    return {
        "title": title,
        "x": x,
        "y": y,
        "traces": [_trace(trace) for trace in traces if trace is not None],
        **options,
    }


def _trace(trace: Trace) -> dict[str, Any]:
    """Returns the non-default fields of a trace, with rounded numbers; None if not finite."""
    values = {k: v for k, v in dataclasses.asdict(trace).items() if v != () and v is not False}
    for name in ("x", "y", "low"):
        numbers = np.asarray(values.get(name, ()), np.float64)  # NaN for None
        values[name] = replace_nonfinite(numbers.round(6).tolist())
    values["hidden"] = bool(values.pop("optional", False) or values.pop("far", False))
    return values


def curve_chart(
    results: Mapping[str, Any], band: Trace | None, times: ExitTimes | None
) -> dict[str, Any]:
    """Returns the chart of the metric against cost.

    The traces are, in order: 0 the curve, 1 the paper's grid, 2 single exits, 3 the recommended
    point, 4 the slider's point, the bounds in the order of BOUNDS, the baselines, and the band of
    several seeds. The page fills in all traces up to the bounds. A second x axis shows the
    milliseconds of a text that leaves at each exit, at the exit's share of the layers.
    """
    exits = results["replicas"][results["best_replica"]]["individual"]
    curve = Trace("every threshold", "#21918c", dash="solid", steps=True)
    recommended = Trace("recommended", "#c0392b", symbol="ring", size=14)
    slider = Trace("the slider", "#c0392b", symbol="circle", size=8)
    baselines = baseline_traces(results)
    options: dict[str, Any] = {"zero": bool(baselines)}
    if times is not None:
        pairs = zip((row["cost"] for row in exits), times.milliseconds.tolist(), strict=True)
        title = f"milliseconds until each exit, a text of {times.tokens} tokens"
        options["top"] = {"title": title, "points": [list(pair) for pair in pairs]}
    metric = metric_title(results["metric"])
    traces = [
        *(curve, *operating_point_traces(results), recommended, slider),
        *(*bound_traces(results), *baselines, band),
    ]
    shown = with_shown_metric(traces, results["metric"])
    return make_chart(f"{metric} against {COST_AXIS}", COST_AXIS, metric, shown, **options)
