"""Builds results.json: the numbers of a report.

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
    oracle,
    share_of_gap,
    single_exit_hull,
)
from sweet_jax.exits.certificates import CERTIFICATE_KINDS
from sweet_jax.exits.intervals import score_interval
from sweet_jax.exits.metrics import compute_metric, mean_interval
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.pareto import ParetoFront
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.reliability import confidence_quality
from sweet_jax.exits.resolver import Resolution
from sweet_jax.exits.simulation import Curve
from sweet_jax.report.baselines import Baseline
from sweet_jax.report.shortfalls import shortfall_results

# Where the SWEET paper reads its speed-accuracy curves; Multi-Model's reach beyond the full model.
_COSTS = (1 / 4, 1 / 2, 3 / 4, 1.0, 1 + 3 / 8, 1 + 3 / 4)
_LIMITS = (0.01, 0.02, 0.05, 0.1)  # on the share of harmed examples: what the report certifies
_CURVE_POINTS = 2000  # in results.json; the saved outputs have all thresholds


def individual_exits(outputs: ExitOutputs, replica: int) -> list[dict[str, Any]]:
    """Evaluates every exit alone: layer, cost, score (the metric), n and 95% interval over rows.

    Wilson's interval for accuracy, a percentile bootstrap over rows for the other metrics.
    """
    metric = outputs.metric
    classes, labels = outputs.logits.shape[-1], outputs.labels[replica]
    rows = []
    for e, layer in enumerate(outputs.layers):
        given = outputs.predictions[replica, e]
        rows.append(
            {
                "layer": int(layer),
                "cost": float(np.asarray(outputs.cost)[e]),
                "score": compute_metric(metric, given, labels, classes),
                "n": len(labels),
                "interval": list(score_interval(metric, given, labels, classes)),
            }
        )
    return rows


def build_results(
    config: Config,
    analysis: Analysis,
    diverged: Sequence[Mapping[str, Any]],
    rows: int,
    *,
    baselines: Sequence[Baseline] = (),
    **more: Any,
) -> dict[str, Any]:
    """Returns the contents of results.json.

    Args:
      config: resolved.
      analysis: of the run's outputs.
      diverged: a row for each replica and exit that diverged or collapsed, see `find_failures`.
      rows: number of training rows.
      baselines: predictions on the validation rows; those of the best replica are reported.
      more: further keys, which do not follow from the outputs.

    """
    # The first exit of a model of this depth, and the paper's other costs within reach.
    reach = float(np.asarray(analysis.validation.cost)[-1]) + 1e-12
    costs = [c for c in (1 / config.exits[-1], *_COSTS) if c <= reach]
    replicas = [
        _replica_results(analysis, r, costs, [dict(d) for d in diverged if d["replica"] == r])
        for r in range(len(analysis.replicas))
    ]
    mean, ci95 = _over_seeds([replicas[r] for r in analysis.chosen])
    metric = analysis.validation.identity.metric
    return {
        "task": config.task,
        "method": config.method,
        "checkpoint": config.checkpoint,
        "exits": list(config.exits),
        "preset": config.preset,
        "metric": metric,
        "n": {
            "calibration": analysis.calibration.labels.shape[1],
            "validation": analysis.validation.labels.shape[1],
            "train": rows,
        },
        "fitted_on": config.calibration,
        "policy": analysis.validation.identity.policy,
        "replicas": replicas,
        "best_replica": analysis.best,
        "mean": mean,
        "ci95": ci95,
        **shortfall_results(analysis.validation, analysis.best, baselines, metric),
        **more,
    }


def _replica_results(
    analysis: Analysis, replica: int, costs: Sequence[float], diverged: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the entry of `replicas` for one replica."""
    seed, rate = analysis.replicas[replica]
    keep = analysis.operating_point(replica)
    return {
        "seed": seed,
        "learning_rate": rate,
        "individual": individual_exits(analysis.validation, replica),
        "temperatures": _finite(analysis.temperatures[replica]),
        "curve": _curve(thin_curve(analysis.curve, replica, _CURVE_POINTS)),
        "grid": _curve(thin_curve(analysis.grid, replica, 11)),
        "at_cost": scores_at_costs(analysis.curve, replica, costs),
        "grid_at_cost": scores_at_costs(analysis.grid, replica, costs),  # as the SWEET paper reads
        "calibration_area": _finite(analysis.area[replica]),
        "full_score": None if keep.threshold is None else keep.as_dict(),
        "quality": _quality(analysis, replica),
        **_bounds(analysis, replica),
        "diverged": diverged,
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
    """Returns the hull of single exits, the oracles, and the share of the gap the policy closes."""
    outputs, metric = analysis.validation, analysis.validation.identity.metric
    scores = exit_confidences(outputs, analysis.policy, analysis.calibrators)[replica]  # [E, N]
    bounds = {kind: bound_curve(analysis, replica, kind) for kind in ("floor", *ORACLES)}
    if metric == "accuracy":
        bounds["best_thresholds"] = best_thresholds(outputs, replica, scores)
    curve = (analysis.curve.cost[replica], analysis.curve.score[replica])
    end = float(outputs.cost[-1])
    return {
        "bounds": {
            k: {
                # A bound that ends before the last exit is constant from there on.
                "cost": [*b.cost.tolist(), *([end] if b.cost[-1] < end else [])],
                "score": [*b.score.tolist(), *([float(b.score[-1])] if b.cost[-1] < end else [])],
            }
            for k, b in bounds.items()
        },
        "gap_closed": share_of_gap(*curve, bounds["floor"], bounds["stable"]),
    }


def bound_curve(analysis: Analysis, replica: int, kind: str) -> ParetoFront:
    """Returns the hull of single exits ("floor") or one of ORACLES on the validation rows."""
    metric = analysis.validation.identity.metric
    if kind == "floor":
        return single_exit_hull(analysis.validation, replica, metric)
    return oracle(analysis.validation, replica, kind, metric)


def thin_curve(
    curve: Curve, replica: int, points: int, keep: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Thins one replica's curve to at most `points` distinct thresholds and those of `keep`.

    Both ends are kept. keep: float64 [K], thresholds.
    """
    names = [field.name for field in dataclasses.fields(Curve)]
    arrays = {name: getattr(curve, name)[replica] for name in names}
    use = np.flatnonzero(np.append(True, np.diff(arrays["threshold"]) > 0))
    use = use[np.isfinite(arrays["threshold"][use])]
    if len(use) > points:
        places = np.linspace(0, len(use) - 1, points).round().astype(int)
        if keep is not None:
            at = np.searchsorted(arrays["threshold"][use], keep)
            places = np.append(places, np.minimum(at, len(use) - 1))
        use = use[np.unique(places)]
    return {name: array[use] for name, array in arrays.items()}


def certificate_table(analysis: Analysis, replica: int) -> list[dict[str, Any]]:
    """Certifies limits on either kind of harm for one replica, at 95% confidence.

    Returns one dict for each kind and limit: the certificate's values, and the cost and score of
    its threshold on validation rows (None where the limit cannot be certified). Empty where the run
    cannot certify anything.
    """
    resolver = analysis.resolver(replica)
    if resolver.half_calibrator is None or not resolver.losses:
        return []
    rows = []
    for kind in CERTIFICATE_KINDS:
        for limit in _LIMITS:
            found = resolver.certificate(analysis.policy, kind, limit)
            resolution = Resolution(found.threshold, resolver.half_calibrator, certificate=found)
            cost, value = analysis.evaluate(replica, resolution).validation or (None, None)
            rows.append(found.as_dict() | {"cost": cost, "score": value})
    return rows


def _over_seeds(replicas: Sequence[Mapping[str, Any]]) -> tuple[dict, dict]:
    """Returns mean and half width of the 95% interval over seeds, for exits and for set costs."""
    exits = [[row["score"] for row in replica["individual"]] for replica in replicas]
    every = [replica["at_cost"] for replica in replicas]
    keys = [k for k in every[0] if all(costs[k] is not None for costs in every)]
    costs = [[replica["at_cost"][k] for k in keys] for replica in replicas]
    tables = []
    for which in (0, 1):
        by_exit = mean_interval(np.asarray(exits))[which]
        by_cost = mean_interval(np.asarray(costs))[which]
        layers = [row["layer"] for row in replicas[0]["individual"]]
        tables.append(
            {
                "learning_rate": replicas[0]["learning_rate"],
                "seeds": [replica["seed"] for replica in replicas],
                "individual": [
                    {"layer": layer, "score": None if by_exit is None else float(by_exit[e])}
                    for e, layer in enumerate(layers)
                ],
                "at_cost": {
                    k: None if by_cost is None else float(by_cost[i]) for i, k in enumerate(keys)
                },
            }
        )
    return tables[0], tables[1]


def _finite(values: np.ndarray | float) -> Any:
    if isinstance(values, np.ndarray):
        return [_finite(v) for v in values.tolist()]
    return float(values) if np.isfinite(values) else None


def _curve(arrays: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: arrays[name].tolist() for name in ("threshold", "cost", "score")}
