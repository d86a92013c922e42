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
from sweet_jax.report.baselines import baseline_title
from sweet_jax.report.console import describe_divergence, fitted_rows
from sweet_jax.report.plotly_figures import (
    curve_figure,
    layout,
    loss_figure,
    reliability_figure,
    shares_figure,
)
from sweet_jax.report.results import bound_curve, certificate_table
from sweet_jax.report.series import (
    BOUNDS,
    exit_color,
    loss_series,
    policy_series,
    reliability_series,
)
from sweet_jax.report.shortfalls import describe_shortfall, is_refitted, worst_shortfalls

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
        warnings=[describe_divergence(d) for r in results["replicas"] for d in r["diverged"]]
        + [
            describe_shortfall(finding, results["metric"], refitted=is_refitted(results))
            for finding in worst_shortfalls(results)
        ],
        baselines={baseline_title(name): row for name, row in results.get("baselines", {}).items()},
        plotly=plotly.offline.get_plotlyjs(),
        policies={name: POLICIES[name].about for name in policies[best]},
        bounds=list(BOUNDS),
        certificates=certificate_table(analysis, best),
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
    figure, rows = layout("cost (share of the full model's layers)", "score"), []
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
                    line={"color": exit_color(number), "width": 0.7},
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
            line={"color": exit_color(number), "width": 2.5},
            hovertemplate=f"{shown}<br>cost %{{x:.3f}}<br>score %{{y:.4f}}<extra></extra>",
        )
        for kind in ("floor", "stable"):
            bounds = [bound_curve(analysis, r, kind) for r in analysis.chosen]
            figure.add_scatter(
                x=cost,
                y=np.mean([np.interp(cost, b.cost, b.score) for b in bounds], axis=0),
                name=f"{shown}: {BOUNDS[kind][0]}",
                mode="lines",
                line={"color": exit_color(number), "dash": BOUNDS[kind][2], "width": 1},
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


def _json(figure: go.Figure) -> Any:
    return json.loads(figure.to_json())
