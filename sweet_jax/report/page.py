"""report.html, a self-contained page with a slider over the threshold; and the comparison page.

Shape letters: R replica, E exit, T thresholds.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
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
from sweet_jax.report.classes import class_report
from sweet_jax.report.console import describe_divergence, fitted_rows, other_measures
from sweet_jax.report.page_tables import certificate_table, policy_series
from sweet_jax.report.plotly_figures import curve_figure, make_figure, shares_figure
from sweet_jax.report.results import bound_curve, bound_kinds
from sweet_jax.report.shortfalls import describe_shortfall, is_refitted, worst_shortfalls
from sweet_jax.report.traces import (
    BOUNDS,
    LOSS_AXES,
    RELIABILITY_AXES,
    Trace,
    exit_color,
    loss_traces,
    reliability_traces,
)

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
    texts: Sequence[tuple[str, ...]] | None = None,
) -> None:
    """Writes the page of one run. Text that comes from the user or the data is escaped.

    texts: of the validation rows; None leaves the list of mistakes out.
    """
    best, layers = results["best_replica"], results["exits"]
    policies = [policy_series(analysis, r) for r in range(len(results["replicas"]))]
    page = _ENVIRONMENT.get_template("page.html").render(
        results=results,
        best=best,
        fitted=fitted_rows(results),
        measures=other_measures(results["replicas"][best]["individual"][0], results["metric"]),
        temperatures=analysis.validation.objective.categorical is not None,
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
        report=class_report(analysis, best, texts),
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
            "reliability": _json(
                make_figure(*RELIABILITY_AXES, reliability_traces(analysis, best))
            ),
            "loss": _json(make_figure(*LOSS_AXES, loss_traces(metrics, best, trainings))),
        },
    )
    write_text(path, page)


def write_comparison(path: Path, runs: Sequence[tuple[str, Analysis]]) -> None:
    """Writes one page that overlays the curves of several runs, (name, analysis) each.

    A run's line is the mean over the replicas of its chosen learning rate, read at common costs;
    each replica's own curve is drawn thin beside it, and the mean of its floor and of its stable
    oracle in the same color, hidden until their names are clicked.
    """
    traces, rows = [], []
    for number, (name, analysis) in enumerate(runs):
        identity, curve = analysis.validation.identity, analysis.curve
        cost = np.linspace(curve.cost.min(), curve.cost.max(), 200)  # [T]
        each = _read_at(cost, [(curve.cost[r], curve.score[r]) for r in analysis.chosen])
        lines = [("", metric, "solid", 0.7) for metric in each if len(each) > 1]
        lines.append((name, each.mean(axis=0), "solid", 2.5))
        for kind in bound_kinds(analysis.validation):
            if kind not in ("floor", "stable"):
                continue
            title, _, dash = BOUNDS[kind]
            bounds = [bound_curve(analysis, r, kind) for r in analysis.chosen]
            mean = _read_at(cost, [(b.cost, b.score) for b in bounds]).mean(axis=0)
            lines.append((f"{name}: {title}", mean, dash, 1))
        traces += [
            Trace(
                label,
                exit_color(number),
                cost.tolist(),
                values.tolist(),
                dash=dash,
                width=width,
                optional=dash != "solid",
            )
            for label, values, dash, width in lines
        ]
        rows.append(
            {
                "name": name,
                **{key: getattr(identity, key) for key in ("task", "method", "metric")},
                "seeds": len(each),
                "n": analysis.validation.labels.shape[1],
                "area": float(np.mean([curve_area(cost, metric) for metric in each])),
                "first": float(each[:, 0].mean()),
                "last": float(each[:, -1].mean()),
            }
        )
    figure = make_figure("cost (share of the full model's layers)", "metric", traces)
    page = _ENVIRONMENT.get_template("comparison.html").render(
        rows=rows, plotly=plotly.offline.get_plotlyjs(), figure=_json(figure)
    )
    write_text(path, page)


def _read_at(cost: np.ndarray, curves: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns the metric of curves, each (cost, metric), at these costs [T]: [chosen R, T]."""
    return np.stack([np.interp(cost, *curve) for curve in curves])


def _json(figure: go.Figure) -> Any:
    return json.loads(figure.to_json())
