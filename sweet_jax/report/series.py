"""The series that figures draw, whichever library draws them.

Shape letters: R replica, E exit, N examples, T thresholds or steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.calibration import (
    expected_calibration_error,
    probabilities,
    reliability_diagram,
)
from sweet_jax.exits.certificates import upper_bound
from sweet_jax.exits.operating_point import ThresholdResolver, deployable_policies
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import POLICIES
from sweet_jax.exits.simulation import simulate
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
    """The baselines of results.json as points of score against cost; [] where it has none.

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
    """The colour of an exit, in every figure the same."""
    return _COLOURS[exit_index % len(_COLOURS)]


def reliability_series(analysis: Analysis, replica: int) -> list[dict[str, Any]]:
    """Reliability of each exit on validation rows, before and after temperature scaling.

    One dict for each exit: layer, and for "before" and "after" the mean confidence, share correct
    and count of ten bins (empty ones left out), with the expected calibration error.
    """
    outputs = analysis.validation.replica(replica)
    correct = outputs.predictions[0] == outputs.labels[0]  # [E, N]
    ones = np.ones((1, len(outputs.layers)))
    fitted = analysis.temperatures[replica : replica + 1]
    series = []
    for e, layer in enumerate(outputs.layers):
        row: dict[str, Any] = {"layer": int(layer)}
        for name, temperatures in (("before", ones), ("after", fitted)):
            confidence = probabilities(outputs, temperatures)[0, e].max(axis=-1)
            if np.isnan(confidence).any():
                continue
            mean, share, count = reliability_diagram(confidence, correct[e])
            used = count > 0
            row[name] = {
                "confidence": mean[used].tolist(),
                "correct": share[used].tolist(),
                "count": count[used].tolist(),
                "error": expected_calibration_error(confidence, correct[e]),
            }
        series.append(row)
    return series


def policy_series(analysis: Analysis, replica: int) -> dict[str, dict[str, Any]]:
    """What the page shows of every policy of one replica, the run's own first.

    Of each: the validation curve, thinned to 6,000 points (the run's own policy) or 400; the trade
    (thresholds worth having on calibration rows); the threshold that keeps the last exit's score
    there; and the certificates.
    """
    own, validation = analysis.policy, analysis.validation.replica(replica)
    names = (own, *(name for name in deployable_policies(validation) if name != own))
    dials = analysis.resolver(replica, names)
    found = {}
    for name in names:
        trade = dials.trades[name]
        keep = trade.with_score(dials.full)
        curve = simulate(validation, name, fitted=dials.fitted)
        arrays = thin_curve(curve, 0, _POINTS if name == own else _POINTS_OF_OTHERS, keep)
        found[name] = {
            "curve": {k: a.round(7).tolist() for k, a in arrays.items()},
            "trade": {k: a.tolist() for k, a in vars(trade).items()},
            "keep": keep,
            "accurate": POLICIES[name].curve != "",
            "certificates": _certificate_series(validation, name, dials),
        }
    return found


def _certificate_series(
    validation: ExitOutputs, policy: str, dials: ThresholdResolver
) -> dict[str, dict[str, list[float]]]:
    """By kind, every candidate: its bound at 95% confidence, and what it does on validation rows.

    A limit is certified up to the last candidate before the first whose bound lies above it.
    """
    found = {}
    for kind, trials in dials.trials.get(policy, {}).items():
        if not len(trials.thresholds):
            continue
        alpha = 0.05 / dials.compared
        at = simulate(validation, policy, fitted=dials.halved, thresholds=trials.thresholds)
        found[kind] = {
            "threshold": trials.thresholds.tolist(),
            "bound": [upper_bound(int(h), trials.rows, 1 - alpha) for h in trials.harmed],
            "cost": at.cost[0].round(6).tolist(),
            "score": at.score[0].round(6).tolist(),
        }
    return found


def loss_series(
    metrics: Sequence[Mapping[str, Any]], replica: int, trainings: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """Training loss of each exit, a running mean over 20 steps: layer, step [T], loss [T].

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
