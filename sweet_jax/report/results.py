"""Builds results.json, the numbers of a report.

Shape letters: R replica, E exit, N examples, T thresholds.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sweet_jax.config import Config
from sweet_jax.exits.analysis import Analysis, scores_at_costs
from sweet_jax.exits.bounds import (
    ORACLES,
    best_thresholds,
    mean_metrics,
    oracle,
    share_of_gap,
    single_exit_hull,
)
from sweet_jax.exits.intervals import score_interval
from sweet_jax.exits.metrics import compute_metric, mean_interval
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.pareto import ParetoFront
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.reliability import confidence_quality
from sweet_jax.exits.simulation import Curve
from sweet_jax.exits.thresholds import format_threshold
from sweet_jax.files import replace_nonfinite
from sweet_jax.report.baselines import Baseline
from sweet_jax.report.shortfalls import shortfall_results

# Costs at which the SWEET paper reads its speed-accuracy curves. Those above 1 are reached only by
# Multi-Model.
_COSTS = (1 / 4, 1 / 2, 3 / 4, 1.0, 1 + 3 / 8, 1 + 3 / 4)
_CURVE_POINTS = 2000  # maximum number of points in results.json; saved outputs have all thresholds


def individual_exits(outputs: ExitOutputs, replica: int) -> list[dict[str, Any]]:
    """Evaluates every exit alone: layer, cost, score (the metric), n and 95% interval over rows.

    The interval is Wilson's for accuracy, and a percentile bootstrap over rows for other metrics.
    The objective's `measures` are added by name if it has any. Numbers that are not finite, such as
    those of an exit that diverged, become None.
    """
    metric = outputs.metric
    classes, labels = outputs.logits.shape[-1], outputs.labels[replica]
    rows = []
    for e, layer in enumerate(outputs.layers):
        predicted = outputs.predictions[replica, e]
        rows.append(
            {
                "layer": int(layer),
                "cost": float(np.asarray(outputs.cost)[e]),
                "score": compute_metric(metric, predicted, labels, classes),
                "n": len(labels),
                "interval": list(score_interval(metric, predicted, labels, classes)),
            }
        )
        if measures := outputs.objective.measures:
            rows[-1]["measures"] = {name: measure(predicted, labels) for name, measure in measures}
    return replace_nonfinite(rows)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRecord:
    """Holds the facts about a run's training that a report cannot compute from its outputs.

    The last four fields are keys of results.json.
    """

    rows: int  # number of training rows
    tuning_rows: int = 0
    failures: Sequence[Mapping[str, Any]] = ()  # see `find_failures`
    baselines: Sequence[Baseline] = ()  # on the validation rows; the best replica's are reported
    timing: Mapping[str, float] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rate_search: Mapping[str, Any] | None = None
    best_steps: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)


def build_results(config: Config, analysis: Analysis, training: TrainingRecord) -> dict[str, Any]:
    """Returns the contents of results.json for a resolved config; None if not finite."""
    # The cost of one layer, and those of the paper's costs that this model reaches.
    reach = float(np.asarray(analysis.validation.cost)[-1]) + 1e-12
    costs = [c for c in (1 / config.exits[-1], *_COSTS) if c <= reach]
    replicas = [
        _replica_results(analysis, r, costs)
        | {"diverged": [dict(row) for row in training.failures if row["replica"] == r]}
        for r in range(len(analysis.replicas))
    ]
    mean, ci95 = _over_seeds([replicas[r] for r in analysis.chosen])
    metric = analysis.validation.identity.metric
    results = {
        **{key: getattr(config, key) for key in ("task", "method", "checkpoint")},
        "exits": list(config.exits),
        "preset": config.preset,
        "metric": metric,
        "objective": analysis.validation.identity.objective,
        "n": {
            "calibration": analysis.calibration.labels.shape[1],
            "validation": analysis.validation.labels.shape[1],
            "train": training.rows,
            "tuning": training.tuning_rows,
        },
        "fitted_on": config.calibration,
        "policy": analysis.validation.identity.policy,
        "replicas": replicas,
        "best_replica": analysis.best,
        "mean": mean,
        "ci95": ci95,
        **shortfall_results(analysis.validation, analysis.best, training.baselines, metric),
        **{key: getattr(training, key) for key in ("timing", "versions")},
        **{key: getattr(config, key) for key in ("pooling", "head_init", "head_refit", "epochs")},
        **{key: getattr(training, key) for key in ("rate_search", "best_steps")},
    }
    return replace_nonfinite(results)


def _replica_results(analysis: Analysis, replica: int, costs: Sequence[float]) -> dict[str, Any]:
    """Returns the entry of `replicas` for one replica, without its failures."""
    seed, rate = analysis.replicas[replica]
    keep, shown = analysis.operating_point(replica), {}
    if keep.threshold is not None:
        shown = {"text": format_threshold(keep.threshold, analysis.breakpoints(replica))}
    return {
        "seed": seed,
        "learning_rate": rate,
        "individual": individual_exits(analysis.validation, replica),
        "temperatures": analysis.temperatures[replica].tolist(),
        "curve": _curve(thin_curve(analysis.curve, replica, _CURVE_POINTS)),
        "grid": _curve(thin_curve(analysis.grid, replica, 11)),
        "at_cost": scores_at_costs(analysis.curve, replica, costs),
        "grid_at_cost": scores_at_costs(analysis.grid, replica, costs),  # as the SWEET paper reads
        "calibration_area": float(analysis.area[replica]),
        "full_score": None if keep.threshold is None else keep.as_dict() | shown,
        "quality": _quality(analysis, replica),
        **_bounds(analysis, replica),
    }


def _quality(analysis: Analysis, replica: int) -> list[dict[str, Any]]:
    """Measures each exit's confidence on validation rows, before and after temperature scaling."""
    outputs = analysis.validation
    before, after = (
        confidence_quality(outputs.logits[replica], outputs.labels[replica], t, outputs.objective)
        for t in (np.ones(len(outputs.layers)), analysis.temperatures[replica])
    )
    return [
        {"layer": int(layer), "before": b, "after": a}
        for layer, b, a in zip(outputs.layers, before, after, strict=True)
    ]


def _bounds(analysis: Analysis, replica: int) -> dict[str, Any]:
    """Returns the bounds, the share of their gap that the policy closes, and the mean metrics."""
    outputs, metric = analysis.validation, analysis.validation.identity.metric
    scores = exit_confidences(outputs, analysis.policy, analysis.calibrators)[replica]  # [E, N]
    bounds = {kind: bound_curve(analysis, replica, kind) for kind in bound_kinds(outputs)}
    if metric == "accuracy":
        bounds["best_thresholds"] = best_thresholds(outputs, replica, scores)
    curve = (analysis.curve.cost[replica], analysis.curve.score[replica])
    end = float(outputs.cost[-1])
    reached = {}
    for kind, bound in bounds.items():
        cost, values = bound.cost.tolist(), bound.score.tolist()
        if cost[-1] < end:  # extends a bound that ends before the last exit by a constant
            cost, values = [*cost, end], [*values, values[-1]]
        reached[kind] = {"cost": cost, "score": values}
    gap = named = None
    if "stable" in bounds:
        pair = bounds["floor"], bounds["stable"]
        gap, means = share_of_gap(*curve, *pair), mean_metrics(*curve, *pair)
        named = means and dict(zip(("floor", "policy", "stable"), means, strict=True))
    return {"bounds": reached, "gap_closed": gap, "mean_metrics": named}


def bound_kinds(outputs: ExitOutputs) -> tuple[str, ...]:
    """Returns the kinds of `bound_curve` for these outputs; only the floor for regression."""
    return ("floor",) if outputs.objective.agrees is None else ("floor", *ORACLES)


def bound_curve(analysis: Analysis, replica: int, kind: str) -> ParetoFront:
    """Returns the hull of single exits ("floor"), or an oracle in ORACLES, on validation rows."""
    metric = analysis.validation.identity.metric
    if kind == "floor":
        return single_exit_hull(analysis.validation, replica, metric)
    return oracle(analysis.validation, replica, kind, metric)


def thin_curve(curve: Curve, replica: int, points: int) -> dict[str, np.ndarray]:
    """Thins one replica's curve to at most `points` distinct thresholds; both ends are kept."""
    names = [field.name for field in dataclasses.fields(Curve)]
    arrays = {name: getattr(curve, name)[replica] for name in names}
    use = np.flatnonzero(np.append(True, np.diff(arrays["threshold"]) > 0))
    use = use[np.isfinite(arrays["threshold"][use])]
    if len(use) > points:
        use = use[np.unique(np.linspace(0, len(use) - 1, points).round().astype(int))]
    return {name: array[use] for name, array in arrays.items()}


def _over_seeds(replicas: Sequence[Mapping[str, Any]]) -> tuple[dict, dict]:
    """Returns the mean and half width of the 95% interval over seeds, for exits and fixed costs."""
    layers = [row["layer"] for row in replicas[0]["individual"]]
    every = [replica["at_cost"] for replica in replicas]
    keys = [k for k in every[0] if all(costs[k] is not None for costs in every)]
    exits = [[row["score"] for row in replica["individual"]] for replica in replicas]
    costs = [[costs[k] for k in keys] for costs in every]
    tables = []
    intervals = (mean_interval(np.asarray(values, np.float64)) for values in (exits, costs))
    for by_exit, by_cost in zip(*intervals, strict=True):  # the mean, the half width
        scores = [None] * len(layers) if by_exit is None else by_exit.tolist()
        at_cost = [None] * len(keys) if by_cost is None else by_cost.tolist()
        rows = zip(layers, scores, strict=True)
        tables.append(
            {
                "learning_rate": replicas[0]["learning_rate"],
                "seeds": [replica["seed"] for replica in replicas],
                "individual": [{"layer": layer, "score": score} for layer, score in rows],
                "at_cost": dict(zip(keys, at_cost, strict=True)),
            }
        )
    return tables[0], tables[1]


def _curve(arrays: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: arrays[name].tolist() for name in ("threshold", "cost", "score")}
