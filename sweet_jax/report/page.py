"""report.html: one self-contained page, drawn by plotly, with a slider over the threshold.

Shape letters: R replica, E exit, T thresholds.
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
import plotly.offline

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.policies import POLICIES
from sweet_jax.files import write_text
from sweet_jax.report.lines import describe_divergence, fitted_rows
from sweet_jax.report.series import (
    BOUNDS,
    colour,
    loss_series,
    policy_series,
    reliability_series,
)
from sweet_jax.report.tables import bound, certificates

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("sweet_jax", "report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def write_report(
    path: Path,
    analysis: Analysis,
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    trainings: Mapping[str, Sequence[int]],
) -> None:
    """Writes the page of one run. Text that comes from the user or the data is escaped."""
    best, layers = results["best_replica"], results["exits"]
    policies = [policy_series(analysis, r) for r in range(len(results["replicas"]))]
    page = _ENVIRONMENT.get_template("page.html").render(
        results=results,
        best=best,
        fitted=fitted_rows(results),
        warnings=[describe_divergence(d) for r in results["replicas"] for d in r["diverged"]],
        plotly=plotly.offline.get_plotlyjs(),
        policies={name: POLICIES[name].about for name in policies[best]},
        bounds=list(BOUNDS),
        certificates=certificates(analysis, best),
        data={
            "policies": policies,
            "layers": layers,
            "best": best,
            "exits": [r["individual"] for r in results["replicas"]],
            "grids": [r["grid"] for r in results["replicas"]],
            "bounds": [r["bounds"] for r in results["replicas"]],
        },
        figures={
            "curve": _json(curve_figure(results)),
            "shares": _json(shares_figure(layers)),
            "reliability": _json(reliability_figure(reliability_series(analysis, best))),
            "loss": _json(loss_figure(loss_series(metrics, best, trainings))),
        },
    )
    write_text(path, page)


def write_comparison(path: Path, runs: Sequence[tuple[str, Mapping[str, Any], Analysis]]) -> None:
    """Writes one page that overlays the curves of several runs, (name, identity, analysis) each.

    A run's line is the mean over the replicas of its chosen learning rate, read at common costs;
    each replica's own curve is drawn thin beside it, and the mean of its floor and of its stable
    oracle in the same colour, hidden until their names are clicked.
    """
    figure, rows = _layout("cost (share of the full model's layers)", "score"), []
    for number, (name, identity, analysis) in enumerate(runs):
        cost = np.linspace(analysis.curve.cost.min(), analysis.curve.cost.max(), 200)
        each = [
            np.interp(cost, analysis.curve.cost[r], analysis.curve.score[r])
            for r in analysis.chosen
        ]
        shown = html.escape(name)
        if len(each) > 1:
            for values in each:
                figure.add_scatter(
                    x=cost,
                    y=values,
                    line={"color": colour(number), "width": 0.7},
                    opacity=0.5,
                    showlegend=False,
                    hoverinfo="skip",
                    mode="lines",
                )
        figure.add_scatter(
            x=cost,
            y=np.mean(each, axis=0),
            name=shown,
            mode="lines",
            line={"color": colour(number), "width": 2.5},
            hovertemplate=f"{shown}<br>cost %{{x:.3f}}<br>score %{{y:.4f}}<extra></extra>",
        )
        for kind in ("floor", "stable"):
            bounds = [bound(analysis, r, kind) for r in analysis.chosen]
            figure.add_scatter(
                x=cost,
                y=np.mean([np.interp(cost, b.cost, b.score) for b in bounds], axis=0),
                name=f"{shown}: {BOUNDS[kind][0]}",
                mode="lines",
                line={"color": colour(number), "dash": BOUNDS[kind][2], "width": 1},
                visible="legendonly",
            )
        rows.append(
            {
                "name": name,
                "task": identity.get("task", ""),
                "method": identity.get("method", ""),
                "metric": identity.get("metric", "accuracy"),
                "seeds": len(each),
                "n": analysis.validation.labels.shape[1],
                "area": float(np.mean([np.trapezoid(v, cost) / (cost[-1] - cost[0]) for v in each]))
                if cost[-1] > cost[0]
                else float(np.mean(each)),
                "first": float(np.mean([v[0] for v in each])),
                "last": float(np.mean([v[-1] for v in each])),
            }
        )
    page = _ENVIRONMENT.get_template("comparison.html").render(
        rows=rows, plotly=plotly.offline.get_plotlyjs(), figure=_json(figure)
    )
    write_text(path, page)


def curve_figure(results: Mapping[str, Any]) -> go.Figure:
    """Traces 0 curve, 1 grid, 2 single exits, 3 the slider's marker, then the bounds in the order
    of BOUNDS; the page fills them in.
    """
    metric = html.escape(results["metric"])
    figure = _layout("cost (share of the full model's layers)", metric)
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
    for name, (title, ink, dash) in BOUNDS.items():
        figure.add_scatter(
            name=title,
            mode="lines",
            line={"color": ink, "dash": dash, "width": 1.5},
            visible=True if name in ("floor", "stable") else "legendonly",
            hovertemplate=f"{title}<br>cost %{{x:.3f}}<br>%{{y:.4f}}<extra></extra>",
        )
    figure.update_layout(
        height=600, legend={"orientation": "h", "y": -0.15, "yanchor": "top"}, margin={"t": 10}
    )
    return figure


def shares_figure(layers: Sequence[int]) -> go.Figure:
    """Where examples leave at the slider's threshold; the page fills it in."""
    figure = _layout("", "share of the examples")
    figure.add_bar(
        x=[f"exit {layer}" for layer in layers],
        y=[0.0] * len(layers),
        marker_color=[colour(e) for e in range(len(layers))],
        texttemplate="%{y:.1%}",
        hoverinfo="skip",
    )
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%")
    return figure


def reliability_figure(series: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Share correct against confidence: dotted before, solid after temperature scaling."""
    figure = _layout("confidence", "share correct")
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
                    line={"color": colour(e), "dash": dash},
                    name=f"exit {row['layer']} {name}, ECE {bins['error']:.3f}",
                    hovertemplate="confidence %{x:.3f}<br>correct %{y:.3f}<br>%{customdata} rows",
                )
    return figure


def loss_figure(series: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Training loss of every exit."""
    figure = _layout("step", "cross-entropy, mean of 20 steps")
    for e, row in enumerate(series):
        figure.add_scatter(
            x=row["step"],
            y=row["loss"],
            mode="lines",
            name=f"exit {row['layer']}",
            line={"color": colour(e)},
        )
    return figure


def _layout(x: str, y: str) -> go.Figure:
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


def _json(figure: go.Figure) -> Any:
    return json.loads(figure.to_json())
