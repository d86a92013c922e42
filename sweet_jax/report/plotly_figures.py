"""Makes the plotly figures of report.html; the page fills in what its slider changes.

Shape letters: E exit.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from sweet_jax.report.series import BOUNDS, baseline_series, exit_color


def layout(x: str, y: str) -> go.Figure:
    """Returns an empty figure in the page's style with titled axes."""
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        height=400,
        xaxis_title=x,
        yaxis_title=y,
        font={"family": "system-ui, sans-serif", "size": 14},
    )
    return figure


def curve_figure(results: Mapping[str, Any]) -> go.Figure:
    """Returns the figure of the metric against cost.

    Its traces are 0 the curve, 1 the paper's grid, 2 single exits, 3 the slider's marker, then the
    bounds in the order of BOUNDS, which the page fills in; then the baselines, filled in here.
    """
    metric = html.escape(results["metric"])
    figure = layout("cost (share of the full model's layers)", metric)
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
    figure.add_scatter(
        name="the paper's 11 thresholds",
        mode="markers",
        marker={"color": "#440154", "size": 7},
        hovertemplate="threshold %{customdata:.3f}<br>cost %{x:.3f}<br>%{y:.4f}<extra></extra>",
    )
    figure.add_scatter(
        name="one exit for all",
        mode="markers",
        marker={"symbol": "square", "color": "#e8833a", "size": 9},
        hovertemplate="%{text}<br>cost %{x:.3f}<br>%{y:.4f}<extra></extra>",
    )
    figure.add_scatter(
        name="the slider",
        mode="markers",
        hoverinfo="skip",
        marker={"symbol": "circle-open", "color": "#c0392b", "size": 16, "line": {"width": 3}},
    )
    for name, (about, ink, dash) in BOUNDS.items():
        figure.add_scatter(
            name=about,
            mode="lines",
            line={"color": ink, "dash": dash, "width": 1.5},
            visible=True if name in ("floor", "stable") else "legendonly",
            hovertemplate=f"{about}<br>cost %{{x:.3f}}<br>%{{y:.4f}}<extra></extra>",
        )
    figure.update_layout(
        height=600, legend={"orientation": "h", "y": -0.15, "yanchor": "top"}, margin={"t": 10}
    )
    _add_baselines(figure, results)
    return figure


def _add_baselines(figure: go.Figure, results: Mapping[str, Any]) -> None:
    """Adds the baselines as black markers, on an axis that begins at cost 0."""
    series = baseline_series(results)
    for entry in series:
        figure.add_scatter(
            name=html.escape(entry["title"]),
            mode="markers",
            x=entry["cost"],
            y=entry["score"],
            text=[html.escape(text) for text in entry["text"]],
            marker={"symbol": entry["symbol"], "color": "#222222", "size": 10},
            cliponaxis=False,
            visible="legendonly" if entry["far"] else True,
            hovertemplate="%{text}<br>cost %{x:.3f}<br>%{y:.4f}<extra></extra>",
        )
    if series:
        figure.update_xaxes(rangemode="tozero")
        figure.update_yaxes(ticklabelstandoff=10)  # markers at cost 0 overlap the axis
        figure.update_layout(height=figure.layout.height + 25 * len(series))  # lines of the legend


def shares_figure(layers: Sequence[int]) -> go.Figure:
    """Returns the bar chart of the shares that exit at each layer; the page fills it in."""
    figure = layout("", "share of the examples")
    figure.add_bar(
        x=[f"exit {layer}" for layer in layers],
        y=[0.0] * len(layers),
        marker_color=[exit_color(e) for e in range(len(layers))],
        texttemplate="%{y:.1%}",
        hoverinfo="skip",
    )
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%")
    return figure


def reliability_figure(series: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Returns the reliability diagram: dotted before, solid after temperature scaling."""
    figure = layout("confidence", "share correct")
    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        line={"color": "#bbbbbb"},
        name="perfect",
        hoverinfo="skip",
    )
    for e, row in enumerate(series):
        for name, dash in (("before", "dot"), ("after", "solid")):
            if name in row:
                bins = row[name]
                figure.add_scatter(
                    x=bins["confidence"],
                    y=bins["correct"],
                    customdata=bins["count"],
                    mode="lines+markers",
                    line={"color": exit_color(e), "dash": dash},
                    name=f"exit {row['layer']} {name}, ECE {bins['error']:.3f}",
                    hovertemplate="confidence %{x:.3f}<br>correct %{y:.3f}<br>%{customdata} rows",
                )
    return figure


def loss_figure(series: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Returns the figure of the training loss of every exit."""
    figure = layout("step", "cross-entropy, mean of 20 steps")
    for e, row in enumerate(series):
        figure.add_scatter(
            x=row["step"],
            y=row["loss"],
            mode="lines",
            name=f"exit {row['layer']}",
            line={"color": exit_color(e)},
        )
    return figure
