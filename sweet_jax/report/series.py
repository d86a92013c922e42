"""The series that figures and the page show, whichever library draws them.

Shape letters: R replica, E exit, N examples, T thresholds or steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.calibration import outcome_probabilities
from sweet_jax.exits.certificates import CERTIFICATE_KINDS
from sweet_jax.exits.operating_point import ThresholdResolver, deployable_policies
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.reliability import expected_calibration_error, reliability_diagram
from sweet_jax.exits.simulation import Curve, read_curve, simulate
from sweet_jax.exits.targets import TargetTable
from sweet_jax.report.baselines import baseline_title
from sweet_jax.report.results import thin_curve

# Viridis from dark to light: exits in order of depth, told apart without colour vision too.
_COLOURS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#b5a90f", "#e8833a", "#c0392b", "#7f7f7f")
_FAR = 0.15  # of a baseline below the lowest exit
_SMOOTHED = 20  # steps
_POINTS, _POINTS_OF_OTHERS = 6000, 400  # of a curve on the page; the saved outputs hold all


# What a figure calls each bound of results.json, its colour and plotly's dash, in order.
BOUNDS = {
    "floor": ("floor: exits at random", "#7f7f7f", "dot"),
    "stable": ("stable oracle", "#3b528b", "dash"),
    "agreement": ("agreement oracle", "#b5a90f", "dash"),
    "any_correct": ("any-correct oracle (inflated by luck)", "#c0392b", "dash"),
    "best_thresholds": ("a threshold for each exit, fitted on these rows", "#5ec962", "dashdot"),
}

# Marks of the baselines, by plotly's names: all probes share one, other names the last.
_MARKS = {
    "majority": "x",
    "tfidf": "diamond",
    "probe": "triangle-up",
    "fine_tuned": "star",
    "": "cross",
}


def baseline_series(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the baselines of results.json as points of metric against cost; [] without any.

    One dict for each entry of the legend: title, symbol (plotly's name), the text, cost and score
    of its points, and whether it is far below all exits: drawn, it would flatten the curve. The
    probes of all layers are one entry.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name, row in results.get("baselines", {}).items():
        group = "probe" if name.startswith("probe_") else name
        shown = "frozen encoder + probe" if group == "probe" else baseline_title(name)
        start: dict[str, Any] = {"title": shown, "symbol": _MARKS.get(group, _MARKS[""])}
        entry = entries.setdefault(group, start | {"text": [], "cost": [], "score": []})
        for key, value in (
            ("text", baseline_title(name)),
            ("cost", row["cost"]),
            ("score", row["score"]),
        ):
            entry[key].append(value)
    if entries:
        exits = results["replicas"][results["best_replica"]]["individual"]
        low = min(row["score"] for row in exits) - _FAR
        for entry in entries.values():
            entry["far"] = max(entry["score"]) < low
    return list(entries.values())


def exit_color(exit_index: int) -> str:
    """Returns the colour of an exit, the same in every figure."""
    return _COLOURS[exit_index % len(_COLOURS)]


def reliability_series(analysis: Analysis, replica: int) -> list[dict[str, Any]]:
    """Returns the reliability of each exit on validation rows, before and after temperature.

    One dict for each exit: layer, and for "before" and "after" the mean confidence, share correct
    and count of ten bins (empty ones left out), with the expected calibration error.
    """
    logits, labels = analysis.validation.logits[replica], analysis.validation.labels[replica]
    objective = analysis.validation.objective
    correct = objective.is_correct(logits, labels)  # [E, N]
    pairs = (("before", np.ones(len(logits))), ("after", analysis.temperatures[replica]))
    largest = {  # [E, N] each
        name: outcome_probabilities(logits, t, objective).max(axis=-1).mean(axis=-1)
        for name, t in pairs
    }
    series = []
    for e, layer in enumerate(analysis.validation.layers):
        row: dict[str, Any] = {"layer": int(layer)}
        for name, confidences in largest.items():
            if np.isnan(confidences[e]).any():
                continue
            mean, share, count = reliability_diagram(confidences[e], correct[e])
            used = count > 0
            row[name] = {
                "confidence": mean[used].tolist(),
                "correct": share[used].tolist(),
                "count": count[used].tolist(),
                "error": expected_calibration_error(confidences[e], correct[e]),
            }
        series.append(row)
    return series


def policy_series(analysis: Analysis, replica: int) -> dict[str, dict[str, Any]]:
    """Returns what the page shows of every policy of one replica, the run's own first.

    curve: of the validation rows, thinned to 6,000 points (the run's own policy) or 400, and the
    points of the thresholds below. start: the threshold, cost and score (the metric) where the
    slider starts, the cheapest that keeps the last exit's metric on calibration rows. targets: a
    table of each kind of target, see `_target_series`. `at` is an index of the curve.
    """
    own, validation = analysis.policy, analysis.validation.replica(replica)
    names = (own, *(name for name in deployable_policies(validation) if name != own))
    resolver = analysis.resolver(replica, names)
    found = {}
    for name in names:
        exact = simulate(validation, name, calibrators=[resolver.calibrator])
        tables = {target: resolver.table(name, target) for target in ("cost", "accuracy")}
        keep = resolver.resolve(name).threshold
        # Without one, the last point: all examples reach the last exit.
        start = np.asarray([exact.threshold[0, -1] if keep is None else keep])
        shown = np.concatenate([start, *(table.threshold for table in tables.values())])
        points = _POINTS if name == own else _POINTS_OF_OTHERS
        arrays = thin_curve(exact, 0, points, shown)
        found[name] = {
            "curve": {k: a.round(7).tolist() for k, a in arrays.items()},
            "start": {k: v[0] for k, v in _thresholds(start, exact, arrays["threshold"]).items()},
            "targets": {
                target: _target_series(table)
                | _thresholds(table.threshold, exact, arrays["threshold"])
                for target, table in tables.items()
            }
            | _certified_series(validation, name, resolver),
        }
    return found


def _target_series(table: TargetTable) -> dict[str, Any]:
    """Returns the values of a table of targets, and how one is looked up, see `TargetTable`."""
    return {
        "at_most": table.at_most,
        "tolerance": table.tolerance,
        "value": table.value.tolist(),
        "reached": table.reached.tolist(),
    }


def _thresholds(
    thresholds: np.ndarray, exact: Curve, points: np.ndarray | None = None
) -> dict[str, list[float]]:
    """Returns columns threshold, cost, score (the metric), and at, the index among points [T]."""
    curve = read_curve(exact, thresholds)
    columns = {name: getattr(curve, name)[0].tolist() for name in ("threshold", "cost", "score")}
    if points is not None:
        at = np.minimum(np.searchsorted(points, thresholds), len(points) - 1)
        columns["at"] = at.tolist()
    return columns


def _certified_series(
    validation: ExitOutputs, policy: str, resolver: ThresholdResolver
) -> dict[str, dict[str, Any]]:
    """Returns the tables of risk and agreement at 95% confidence; none where none is certified."""
    if resolver.half_calibrator is None or policy not in resolver.losses:
        return {}
    exact = simulate(validation, policy, calibrators=[resolver.half_calibrator])
    tables = {kind: resolver.table(policy, kind) for kind in CERTIFICATE_KINDS}
    return {
        kind: _target_series(table) | _thresholds(table.threshold, exact)
        for kind, table in tables.items()
    }


def loss_series(
    metrics: Sequence[Mapping[str, Any]], replica: int, trainings: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """Returns the training loss of each exit, a mean over 20 steps: layer, step [T], loss [T].

    trainings gives the layer numbers of the exits of each training in the log.
    """
    series: list[dict[str, Any]] = []
    for name, layers in trainings.items():
        rows = [row for row in metrics if row["training"] == name]
        for e, layer in enumerate(layers):
            values = np.asarray([row["loss"][replica][e] for row in rows], np.float64)
            total = np.cumsum(np.concatenate([[0.0], values]))
            width = np.minimum(np.arange(1, len(values) + 1), _SMOOTHED)
            smooth = (total[1:] - total[np.arange(1, len(values) + 1) - width]) / width
            finite = np.isfinite(smooth)
            steps = np.asarray([row["step"] for row in rows])
            series.append(
                {
                    "layer": int(layer),
                    "step": steps[finite].tolist(),
                    "loss": smooth[finite].tolist(),
                }
            )
    return series
