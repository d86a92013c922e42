"""Refits temperatures, curves and operating points of a saved model, and describes the changes.

They are refitted either on labeled rows, or on the rows of an audit log, which have no labels. In
the latter case, the full model's predictions are the labels, and the metric is the agreement with
them, or the model's own metric if that gives partial credit to rows.

Shape letters: E exit, N texts, C classes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.calibration import TEMPERATURE_RANGE, Calibrator, fit_calibrators
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.operating_point import OperatingPoint, deployable_policies, make_resolver
from sweet_jax.exits.outputs import ExitOutputs, RunIdentity
from sweet_jax.exits.resolver import ThresholdResolver
from sweet_jax.exits.simulation import simulate
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.objectives.objective import ShownMetric

# Operating points to compare; the first is the model's default.
_TARGETS: tuple[dict[str, float], ...] = (
    {},
    *({"cost": share} for share in (0.25, 0.5, 0.75)),
    *({"agreement": share} for share in (0.9, 0.95, 0.99)),
)


class Recalibration(NamedTuple):
    """Holds the result of refitting a model.

    Attributes:
      by: "labels", or "agreement" with the last exit.
      outputs: outputs of the exits for the rows, R = 1.
      resolver: the refitted resolver.

    """

    by: str
    outputs: ExitOutputs
    resolver: ThresholdResolver


def fit_by_labels(
    model: ModelArtifact, logits: np.ndarray, scores: np.ndarray | None, labels: np.ndarray
) -> Recalibration:
    """Fits the resolver of all deployable policies on labeled rows.

    Args:
      model: the model that computed the outputs.
      logits, scores: outputs of all exits, float32 [E, N, C] and, with learning-to-exit, [E, N].
      labels: targets of the objective; for classes, int32 [N].

    """
    outputs = _outputs(model, logits, scores, labels, model.metric)
    return Recalibration("labels", outputs, make_resolver(outputs, deployable_policies(outputs)))


def fit_by_agreement(
    model: ModelArtifact, logits: np.ndarray, scores: np.ndarray | None
) -> Recalibration:
    """Fits the resolver on unlabeled rows: an exit is right where it agrees with the last exit.

    The last exit keeps its temperature, which cannot be fitted on such rows, also for certified
    targets, whose loss counts do not depend on it. The default operating point, which keeps the
    last exit's metric, now keeps the agreement that it had on the original calibration rows; an
    agreement of 1 would be stricter than the default was.

    Args:
      model: the model that computed the outputs.
      logits, scores: outputs of all exits, float32 [E, N, C] and, with learning-to-exit, [E, N].

    Raises UserError for a regression.

    """
    objective = model.objective
    if objective.agrees is None:
        raise UserError(
            f"{model.task} is a regression, whose exits hardly ever predict the same number as the "
            "last one: pass --labelled instead of --audit_log"
        )
    metric = objective.metric(model.metric)
    # With a metric that gives partial credit, agreement is partial too, as for certificates.
    if metric.credit is None:
        shares = [candidate for candidate in objective.metrics if candidate.is_share]
        if not shares:
            raise UserError(
                f"objective={objective.name} has no metric that is a share of the rows, as the "
                "agreement with the last exit is: pass --labelled instead of --audit_log"
            )
        metric = shares[0]
    outputs = _outputs(model, logits, scores, objective.predict(logits[-1]), metric.name)
    (fitted,) = fit_calibrators(outputs)
    last = float(model.resolver.calibrator.temperatures[-1])
    calibrator = _with_last_temperature(fitted, last)
    resolver = make_resolver(outputs, deployable_policies(outputs), calibrator=calibrator)
    half = resolver.half_calibrator and _with_last_temperature(resolver.half_calibrator, last)
    full = _agreement_before(model)
    full = full - 1 if metric.is_error else full  # the metric of an error is its negative
    resolver = dataclasses.replace(resolver, full=full, half_calibrator=half)
    return Recalibration("agreement", outputs, resolver)


def _with_last_temperature(calibrator: Calibrator, temperature: float) -> Calibrator:
    temperatures = calibrator.temperatures.copy()
    temperatures[-1] = temperature
    return dataclasses.replace(calibrator, temperatures=temperatures)


def _outputs(
    model: ModelArtifact,
    logits: np.ndarray,
    scores: np.ndarray | None,
    labels: np.ndarray,
    metric: str,
) -> ExitOutputs:
    return ExitOutputs(
        logits[None],
        labels,
        np.asarray(model.layers),
        model.cost,
        None if scores is None else scores[None],
        identity=RunIdentity(
            split="calibration",
            policy=model.policy,
            metric=metric,
            classes=model.classes,
            objective=model.objective.name,
        ),
    )


def _agreement_before(model: ModelArtifact) -> float:
    """Returns the agreement with the last exit on calibration rows, without a target.

    This is a share of the rows, or of their credit if the metric gives partial credit to rows.
    """
    threshold = model.resolver.resolve(model.policy).threshold
    losses = model.resolver.losses.get(model.policy)
    return losses["agreement"].share_kept(threshold) if losses and threshold is not None else 1.0


def updated_exits(values: Mapping[str, Any], refit: Recalibration) -> dict[str, Any]:
    """Returns the contents of exits.json, `values`, with the refitted values."""
    temperatures = refit.resolver.calibrator.temperatures.tolist()
    policy = refit.outputs.identity.policy
    threshold = refit.resolver.resolve(policy).threshold
    point = None
    if threshold is not None:
        pair = _read(refit.outputs, policy, refit.resolver.calibrator, threshold)
        point = OperatingPoint(threshold, calibration=pair, validation=pair).as_dict()
    return {
        **values,
        "temperatures": [t if np.isfinite(t) else None for t in temperatures],
        "dials": refit.resolver.as_dict() | {"full_score": point},
        "recalibrated_on": refit.outputs.labels.shape[1],
        "recalibrated_by": refit.by,
    }


def describe_changes(model: ModelArtifact, refit: Recalibration) -> dict[str, Any]:
    """Returns the changes, as recalibration.json holds them.

    They include each operating point before and now, with its cost and metric on these rows; None
    if the target cannot be met.
    """
    outputs, labels, name = refit.outputs, refit.outputs.labels[0], refit.outputs.metric.name
    before, now = (r.calibrator.temperatures.tolist() for r in (model.resolver, refit.resolver))
    exits = [
        {
            "layer": layer,
            "metric": compute_metric(outputs.metric, pred, labels, len(model.classes)),
            "temperature": [t if np.isfinite(t) else None for t in (before[e], now[e])],
        }
        for e, (layer, pred) in enumerate(zip(model.layers, outputs.predictions[0], strict=True))
    ]
    return {
        "model": str(model.folder),
        "by": refit.by,
        "metric": "agreement" if refit.by == "agreement" and outputs.metric.is_share else name,
        "rows": len(labels),
        "policy": model.policy,
        "exits": exits,
        "operating_points": [
            {
                "target": target,
                "before": _point(outputs, model.policy, model.resolver, target),
                "now": _point(outputs, model.policy, refit.resolver, target),
            }
            for target in _TARGETS
        ],
    }


def _point(
    outputs: ExitOutputs, policy: str, resolver: ThresholdResolver, target: Mapping[str, float]
) -> dict[str, float] | None:
    """Returns a resolver's threshold for a target, with its cost and metric on these rows."""
    try:
        chosen = resolver.resolve(policy, target)
    except UserError:  # there are no rows to test a certificate on
        return None
    if chosen.threshold is None:
        return None
    cost, metric = _read(outputs, policy, chosen.calibrator, chosen.threshold)
    return {"threshold": chosen.threshold, "cost": cost, "metric": metric}


def _read(
    outputs: ExitOutputs, policy: str, calibrator: Calibrator, threshold: float
) -> tuple[float, float]:
    """Returns the cost and the metric at a threshold."""
    curve = simulate(outputs, policy, calibrators=[calibrator], thresholds=np.asarray([threshold]))
    return float(curve.cost[0, 0]), float(curve.score[0, 0])


def change_lines(changes: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines that report the result of `describe_changes`."""
    metric = ShownMetric.of(changes["metric"])
    width = max(9, len(metric.name))
    yield f"{'exit':>6} {metric.name:>{width}}  temperature, on {changes['rows']} rows"
    for exit in changes["exits"]:
        before, now = ("none" if t is None else f"{t:.3f}" for t in exit["temperature"])
        value = metric.value(exit["metric"])
        yield f"{exit['layer']:6d} {value:{width}.4f}  {before} -> {now}"
    for point in changes["operating_points"]:
        target = ", ".join(f"{name}={value:g}" for name, value in point["target"].items())
        yield f"{target or 'without a target'}:"
        for when in ("before", "now"):
            values = point[when]
            yield f"  {when:>6}: " + (
                "no threshold meets it"
                if values is None
                else f"threshold {values['threshold']:.4f}, on these rows "
                f"{metric.describe(values['metric'])} at cost {values['cost']:.3f}"
            )


def bound_warning(changes: Mapping[str, Any]) -> str | None:
    """Returns a warning about temperatures that reached a bound, see TEMPERATURE_RANGE, or None.

    changes: result of `describe_changes`.
    """
    reached = [
        exit
        for exit in changes["exits"]
        if (now := exit["temperature"][1]) is not None
        and np.isclose(now, TEMPERATURE_RANGE, rtol=1e-3).any()  # not exact if it is minimized
    ]
    if not reached:
        return None
    each = ", ".join(
        f"{exit['temperature'][1]:g} at layer {exit['layer']} ({changes['metric']} "
        f"{exit['metric']:.4f})"
        for exit in reached
    )
    cure = "labels are right and mean what they do in training"
    if changes["by"] == "agreement":
        cure = "texts are like those that the model was trained on"
    return (
        f"warning: temperatures reached the bound of their range, {each}: the model's "
        f"probabilities do not fit these rows; check that their {cure}"
    )
