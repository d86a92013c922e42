"""report.html, a self-contained page with a slider over the threshold; and the comparison page.

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

from sweet_jax.exits.analysis import Analysis, curve_area
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


def write_comparison(path: Path, runs: Sequence[tuple[str, Analysis]]) -> None:
    """Writes one page that overlays the curves of several runs, (name, analysis) each.

    A run's line is the mean over the replicas of its chosen learning rate, read at common costs;
    each replica's own curve is drawn thin beside it, and the mean of its floor and of its stable
    oracle in the same colour, hidden until their names are clicked.
    """
    figure, rows = layout("cost (share of the full model's layers)", "metric"), []
    for number, (name, analysis) in enumerate(runs):
        cost = np.linspace(analysis.curve.cost.min(), analysis.curve.cost.max(), 200)  # [T]
        each = np.stack(
            [
                np.interp(cost, analysis.curve.cost[r], analysis.curve.score[r])
                for r in analysis.chosen
            ]
        )  # [chosen R, T]
        _add_run(figure, number, html.escape(name), cost, each)
        for kind in ("floor", "stable"):
            bounds = [bound_curve(analysis, r, kind) for r in analysis.chosen]
            figure.add_scatter(
                x=cost,
                y=np.mean([np.interp(cost, b.cost, b.score) for b in bounds], axis=0),
                name=f"{html.escape(name)}: {BOUNDS[kind][0]}",
                mode="lines",
                line={"color": exit_color(number), "dash": BOUNDS[kind][2], "width": 1},
                visible="legendonly",
            )
        identity = analysis.validation.identity
        rows.append(
            {
                "name": name,
                "task": identity.task,
                "method": identity.method,
                "metric": identity.metric,
                "seeds": len(each),
                "n": analysis.validation.labels.shape[1],
                "area": float(np.mean([curve_area(cost, metric) for metric in each])),
                "first": float(each[:, 0].mean()),
                "last": float(each[:, -1].mean()),
            }
        )
    page = _ENVIRONMENT.get_template("comparison.html").render(
        rows=rows, plotly=plotly.offline.get_plotlyjs(), figure=_json(figure)
    )
    write_text(path, page)


def _add_run(
    figure: go.Figure, number: int, shown: str, cost: np.ndarray, each: np.ndarray
) -> None:
    """Adds a run's mean line, and the replicas' own where there are several.

    cost [T], each [R, T]: the replicas' metric at these costs. `shown` is escaped.
    """
    if len(each) > 1:
        for metric in each:
            figure.add_scatter(
                x=cost,
                y=metric,
                line={"color": exit_color(number), "width": 0.7},
                opacity=0.5,
                showlegend=False,
                hoverinfo="skip",
                mode="lines",
            )
    figure.add_scatter(
        x=cost,
        y=each.mean(axis=0),
        name=shown,
        mode="lines",
        line={"color": exit_color(number), "width": 2.5},
        hovertemplate=f"{shown}<br>cost %{{x:.3f}}<br>metric %{{y:.4f}}<extra></extra>",
    )


def _json(figure: go.Figure) -> Any:
    return json.loads(figure.to_json())
