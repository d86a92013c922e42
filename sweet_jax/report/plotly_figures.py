"""Makes the plotly figures of report.html; the page fills in what its slider changes.

Shape letters: E exit.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from sweet_jax.report.traces import (
    Trace,
    baseline_traces,
    bound_traces,
    exit_color,
    operating_point_traces,
)


def make_figure(x: str, y: str, traces: Sequence[Trace] = ()) -> go.Figure:
    """Returns a figure of traces in the page's style with titled axes."""
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        height=400,
        xaxis_title=x,
        yaxis_title=y,
        font={"family": "system-ui, sans-serif", "size": 14},
    )
    return _add(figure, traces)


def _add(figure: go.Figure, traces: Sequence[Trace]) -> go.Figure:
    """Adds traces to a figure; returns it. Their names and texts are escaped."""
    what = (figure.layout.xaxis.title.text or "").partition(" (")[0]
    for trace in traces:
        kinds = (("lines", trace.dash), ("markers", trace.symbol))
        name = html.escape(trace.name)
        first = "%{text}" if trace.text else name
        figure.add_scatter(
            x=trace.x,
            y=trace.y,
            name=name,
            showlegend=bool(name),
            opacity=1 if name else 0.5,
            mode="+".join(kind for kind, used in kinds if used),
            line={"color": trace.color, "dash": trace.dash or None, "width": trace.width},
            marker={"color": trace.color, "symbol": trace.symbol or None, "size": trace.size},
            cliponaxis=not trace.symbol,
            text=[html.escape(text) for text in trace.text] or None,
            visible="legendonly" if trace.optional or trace.far else True,
            hovertemplate=f"{first}<br>{what} %{{x:.5~g}}<br>%{{y:.4f}}<extra></extra>",
        )
    return figure


def curve_figure(results: Mapping[str, Any]) -> go.Figure:
    """Returns the figure of the metric against cost.

    Its traces are 0 the curve, 1 the paper's grid, 2 single exits, 3 the slider's marker, then the
    bounds in the order of BOUNDS, all of which the page fills in; then the baselines.
    """
    metric = html.escape(results["metric"])
    figure = make_figure("cost (share of the full model's layers)", metric)
    hover = "<b>threshold %{customdata[0]:.7f}</b><br>cost %{x:.3f}<br>"
    hover += f"{metric} %{{y:.4f}}"
    for e, layer in enumerate(results["exits"], start=1):
        hover += f"<br>exit {layer}: %{{customdata[{e}]:.1%}}"
    figure.add_scatter(
        name="every threshold",
        mode="lines",
        line={"shape": "hv", "color": "#21918c", "width": 2},
        hovertemplate=hover + "<extra></extra>",
    )
    _add(figure, operating_point_traces(results))
    figure.add_scatter(
        name="the slider",
        mode="markers",
        hoverinfo="skip",
        marker={"symbol": "circle-open", "color": "#c0392b", "size": 16, "line": {"width": 3}},
    )
    _add(figure, [*bound_traces(results), *(baselines := baseline_traces(results))])
    figure.update_layout(
        height=600 + 25 * len(baselines),  # each is a line of the legend
        legend={"orientation": "h", "y": -0.15, "yanchor": "top"},
        margin={"t": 10},
    )
    if baselines:
        figure.update_xaxes(rangemode="tozero")
        figure.update_yaxes(ticklabelstandoff=10)  # markers at cost 0 overlap the axis
    return figure


def shares_figure(layers: Sequence[int]) -> go.Figure:
    """Returns the bar chart of the shares that exit at each layer; the page fills it in."""
    figure = make_figure("", "share of the examples")
    figure.add_bar(
        x=[f"exit {layer}" for layer in layers],
        y=[0.0] * len(layers),
        marker_color=[exit_color(e) for e in range(len(layers))],
        texttemplate="%{y:.1%}",
        hoverinfo="skip",
    )
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%")
    return figure
