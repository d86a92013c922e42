"""report.html, a self-contained page with a slider over the threshold.

Shape letters: R replica, E exit, N validation rows, T positions of the slider.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.intervals import score_interval
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.policies import policy_rule
from sweet_jax.files import replace_nonfinite, write_text
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.report.baselines import baseline_title
from sweet_jax.report.charts import curve_chart, make_chart
from sweet_jax.report.classes import class_report, describe_never_predicted
from sweet_jax.report.console import (
    describe_divergence,
    fitted_rows,
    format_number,
    other_measures,
)
from sweet_jax.report.details import ReportDetails, recommended_threshold
from sweet_jax.report.page_tables import certificate_table, policy_series, row_series
from sweet_jax.report.shortfalls import (
    Effect,
    describe_effects,
    describe_shortfall,
    worst_shortfalls,
)
from sweet_jax.report.traces import (
    BOUNDS,
    LOSS_AXES,
    RELIABILITY_AXES,
    exit_color,
    loss_traces,
    reliability_traces,
    seed_band,
)
from sweet_jax.report.verdict import describe_spread, describe_training, verdict

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("sweet_jax", "report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
ENVIRONMENT.filters["number"] = format_number
_RAISED = 0.001  # increase of the ECE by temperature scaling from which on the page warns
_AT = "For the run's own policy at the recommended threshold, on {:,} validation rows."


def read_script(name: str) -> markupsafe.Markup:
    """Returns a script of this folder for inclusion in a page without escaping."""
    return markupsafe.Markup((Path(__file__).parent / f"{name}.js").read_text(encoding="utf-8"))


def write_report(
    path: Path,
    analysis: Analysis,
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    trainings: Mapping[str, Sequence[int]],
    details: ReportDetails | None = None,
) -> None:
    """Writes the page of one run. Text from the user or the data is escaped.

    Args:
      path: path of the page.
      analysis: analysis of the run.
      results: contents of results.json.
      metrics: rows of metrics.jsonl.
      trainings: layer numbers of the exits of each training in `metrics`, by its name.
      details: texts, times and other contents that cannot be computed from these.

    """
    details = details or ReportDetails()
    best, shown = results["best_replica"], ShownMetric.of(results["metric"])
    threshold, met = recommended_threshold(analysis, best, details)
    reliability = reliability_traces(analysis, best)
    charts = {
        "curve": curve_chart(results, seed_band(analysis), details.times),
        "loss": make_chart("training loss", *LOSS_AXES, loss_traces(metrics, best, trainings)),
    }
    for number, (title, traces) in enumerate(reliability.items()):
        made = make_chart(title, *RELIABILITY_AXES, traces)
        charts[f"reliability-{number}"] = made | {"square": True, "legend": False}
    policies = _policies(analysis, best, details)
    own = next(iter(policies[best].values()))
    page = ENVIRONMENT.get_template("page.html").render(
        results=results,
        title=details.title or results["task"],
        best=best,
        trained=describe_training(results, len(analysis.validation.identity.classes)),
        verdict=verdict(analysis, results, best, threshold, details),
        fitted=fitted_rows(results),
        metric=shown.name.replace("_", " "),
        shown=shown,
        asked=_describe_target(details.target if met else {}, shown.name),
        unmet=None if met else _describe_target(details.target, shown.name),
        **_warnings(analysis, results, threshold),
        raised=_raised_errors(results),
        measures=other_measures(results["replicas"][best]["individual"][0], results["metric"]),
        temperatures=analysis.validation.objective.categorical is not None,
        baselines={baseline_title(name): row for name, row in results.get("baselines", {}).items()},
        policies={name: policy_rule(name).about for name in policies[best]},
        certificates=certificate_table(analysis, best),
        report=class_report(analysis, best, threshold, details.texts),
        classes_at=_AT.format(results["n"]["validation"]),
        cut=_describe_cut(analysis, best, threshold, details),
        times=details.times,
        split=details.split,
        spread=_spread(analysis, best, threshold, details),
        shares=own["curve"]["shares"][own["start"]],
        colors=[f"var(--c-{c[1:]}, {c})" for c in map(exit_color, range(len(results["exits"])))],
        reliability=list(reliability),
        error="error" in own["targets"],
        data=replace_nonfinite(_page_data(analysis, results, policies, details)),
        charts=charts,
        scripts={name: read_script(name) for name in ("charts", "page")},
    )
    write_text(path, page)


def _policies(
    analysis: Analysis, best: int, details: ReportDetails
) -> list[dict[str, dict[str, Any]]]:
    """Returns `policy_series` of each replica, with all policies for the best one."""
    series = []
    for replica in range(len(analysis.replicas)):
        threshold, _ = recommended_threshold(analysis, replica, details)
        series.append(policy_series(analysis, replica, threshold, every=replica == best))
    return series


def _page_data(
    analysis: Analysis,
    results: Mapping[str, Any],
    policies: Sequence[dict[str, dict[str, Any]]],
    details: ReportDetails,
) -> dict[str, Any]:
    """Returns the data that page.js reads."""
    best, validation = results["best_replica"], analysis.validation
    metric, replicas = ShownMetric.of(results["metric"]), results["replicas"]
    rows = row_series(validation.replica(best), analysis.resolver(best), policies[best])
    shown = [
        {name: {k: v for k, v in one.items() if k != "positions"} for name, one in each.items()}
        for each in policies
    ]
    return {
        "policies": shown,
        "metric": metric.name,
        "milliseconds": details.times and details.times.milliseconds.tolist(),
        "best": best,
        "exits": [[_shown_point(row, metric) for row in r["individual"]] for r in replicas],
        "grids": [_shown_points(r["grid"], metric) for r in replicas],
        "bounds": [
            {name: _shown_points(bound, metric) for name, bound in r["bounds"].items()}
            for r in replicas
        ],
        "bound_names": list(BOUNDS),
        "classes": len(validation.identity.classes),
        "classes_at": _AT.format(results["n"]["validation"]),
        "rows": rows,
    }


def _shown_point(row: Mapping[str, Any], metric: ShownMetric) -> dict[str, Any]:
    """Returns a row of results.json with its metric as it is shown."""
    return {**row, "score": metric.value(row["score"])}


def _shown_points(points: Mapping[str, Any], metric: ShownMetric) -> dict[str, Any]:
    """Returns points of results.json with their metrics as they are shown."""
    return {**points, "score": metric.values(points["score"])}


def _describe_target(target: Mapping[str, float], metric: str) -> str:
    """Describes how the recommended threshold was chosen."""
    for name, value in target.items():
        match name:
            case "cost":
                return f"the best {metric} within {value:g} of the layers"
            case "milliseconds":
                return f"the best {metric} within {value:g} ms for a text of median length"
            case "accuracy":
                return f"the cheapest with {metric} of at least {value:g}"
            case "error":
                return f"the cheapest with an error ({metric}) of at most {value:g}"
            case "threshold":
                return "as requested"
    return f"the cheapest that keeps the last exit's {metric}"


def _warnings(analysis: Analysis, results: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """Returns a line for each exit that diverged, collapsed, or is below a baseline.

    Lines are listed under "warnings", or under "remarks" if an exit is below a baseline but the
    recommended operating point is not. "never_predicted" is one line about the classes
    that are never predicted, or empty.
    """
    lines = [describe_divergence(row) for r in results["replicas"] for row in r["diverged"]]
    best, findings = results["best_replica"], worst_shortfalls(results)
    effects: dict[int, Effect] = {}
    remarks: list[str] = []
    never_predicted = ""
    if np.isfinite(analysis.area[best]):
        exits = analysis.exits_taken(best, threshold)
        rows = analysis.validation.replica(best)
        effects = describe_effects(findings, rows, exits)
        if missing := describe_never_predicted(rows, exits):
            never_predicted = f"{missing[:1].upper()}{missing[1:]}."
    for finding in findings:
        line, effect = describe_shortfall(finding, results), effects.get(finding.exit)
        if effect is not None:
            line += f". {effect.text[:1].upper()}{effect.text[1:]}"
        (remarks if effect is not None and effect.harmless else lines).append(f"{line}.")
    return {"warnings": lines, "remarks": remarks, "never_predicted": never_predicted}


def _spread(analysis: Analysis, replica: int, threshold: float, details: ReportDetails) -> str:
    """Describes the time of slow texts at a threshold; "" if unknown."""
    text_times = None if details.times is None else details.times.by_text
    if text_times is None or not np.isfinite(analysis.area[replica]):
        return ""
    words = describe_spread(text_times, analysis.exits_taken(replica, threshold), details.target)
    return f"{words[:1].upper()}{words[1:]}"


def _raised_errors(results: Mapping[str, Any]) -> list[str]:
    """Describes the exits of the best replica whose ECE increases with temperature scaling."""
    descriptions = []
    for row in results["replicas"][results["best_replica"]]["quality"]:
        before, after = row["before"]["ece"], row["after"]["ece"]
        if before is not None and after is not None and after - before >= _RAISED:
            descriptions.append(f"exit {row['layer']} from {before:.4f} to {after:.4f}")
    return descriptions


def _describe_cut(
    analysis: Analysis, replica: int, threshold: float, details: ReportDetails
) -> dict[str, Any] | None:
    """Describes truncated texts: their number, and the metric on them and on the other texts."""
    cut = details.cut
    if cut is None or not cut.any() or not np.isfinite(analysis.area[replica]):
        return None
    rows = analysis.validation.replica(replica)
    exits, labels = analysis.exits_taken(replica, threshold), rows.labels[0]
    predicted = rows.predictions[0][exits, np.arange(len(exits))]  # [N, ...]
    parts, shown = [], ShownMetric.of(rows.metric.name)
    for name, use in (("truncated texts", cut), ("other texts", ~cut)):
        if use.any():
            arguments = rows.metric, predicted[use], labels[use], rows.logits.shape[-1]
            score = shown.value(compute_metric(*arguments))
            interval = shown.interval(score_interval(*arguments))
            parts.append({"name": name, "n": int(use.sum()), "score": score, "interval": interval})
    return {"rows": int(cut.sum()), "max_length": details.max_length, "parts": parts}
