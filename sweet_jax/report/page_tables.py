"""The curves of every policy, the tables of targets and the rows that the page looks up.

Shape letters: E exit, N validation rows, T positions of the slider.
"""

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sweet_jax.exits.analysis import Analysis, row_breakpoints
from sweet_jax.exits.certificates import CERTIFICATE_KINDS
from sweet_jax.exits.operating_point import ThresholdResolver, deployable_policies
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.resolver import Resolution, reads_curve
from sweet_jax.exits.simulation import Curve, read_curve, simulate
from sweet_jax.exits.targets import TargetTable
from sweet_jax.exits.thresholds import format_threshold, format_thresholds

_LIMITS = (0.01, 0.02, 0.05, 0.1)  # on the share of harmed examples: what the report certifies
_POINTS, _POINTS_OF_OTHERS = 2000, 200  # of a curve on the page; the saved outputs hold all
_ENTRIES = 150_000  # exits of rows that the page holds, of all policies: some 400 kB


def policy_series(
    analysis: Analysis, replica: int, threshold: float, *, every: bool
) -> dict[str, dict[str, Any]]:
    """Returns what the page shows of one replica's policies, the run's own first.

    curve: of the validation rows at the positions of the slider: thresholds (as text), cost, score
    (the metric) and shares; distinct thresholds, 2,000 of those of the run's own policy, 200 of
    others, and those below. start: the position where the slider starts. targets: a table of each
    kind of target, see `_target_series`.

    Args:
      analysis: of the run.
      replica: its number.
      threshold: that is recommended for the run's own policy; another's slider starts at the
        cheapest that keeps the last exit's metric on calibration rows.
      every: whether to show every policy that can be deployed; else the run's own alone, with as
        few points as the others.

    """
    own, validation = analysis.policy, analysis.validation.replica(replica)
    others = [name for name in deployable_policies(validation) if name != own] if every else []
    resolver = analysis.resolver(replica, (own, *others))
    found = {}
    for name in (own, *others):
        exact = simulate(validation, name, calibrators=[resolver.calibrator])
        tables = {
            "cost": resolver.table(name, "cost"),
            "accuracy": resolver.table(name, "accuracy"),
        }
        if validation.metric.is_error:
            tables["error"] = _error_table(tables.pop("accuracy"), name)
        start = threshold if name == own else resolver.resolve(name).threshold
        if start is None or start > exact.threshold[0, -1]:  # all examples reach the last exit
            start = float(exact.threshold[0, -1])
        chosen = np.concatenate([[start], *(table.threshold for table in tables.values())])
        at = _positions(exact, chosen, _POINTS if every and name == own else _POINTS_OF_OTHERS)
        points = row_breakpoints(
            analysis.calibration.replica(replica), validation, name, resolver.calibrator
        )
        curve = read_curve(exact, at)
        found[name] = {
            "curve": {
                "threshold": format_thresholds(at, points),
                "cost": _rounded(curve.cost[0]),
                "score": _rounded(curve.score[0]),
                "shares": curve.shares[0].round(4).tolist(),
            },
            "positions": at,
            "start": int(np.searchsorted(at, start)),
            "targets": {
                target: _target_series(table)
                | {"at": np.searchsorted(at, table.threshold).tolist()}
                for target, table in tables.items()
            }
            | _certified_series(analysis, replica, name, resolver),
        }
    return found


def _positions(exact: Curve, chosen: np.ndarray, points: int) -> np.ndarray:
    """Returns the thresholds where the slider can stand, ascending, float64 [T].

    Distinct ones of an exact curve of one replica, at most `points`, with both ends; and the chosen
    ones themselves, so that the page and the commands show the same.
    """
    distinct = np.unique(exact.threshold[0])
    distinct = distinct[np.isfinite(distinct)]
    places = np.linspace(0, len(distinct) - 1, min(points, len(distinct))).round().astype(int)
    return np.union1d(distinct[places], chosen)


def _error_table(table: TargetTable, policy: str) -> TargetTable:
    """Returns a policy's table of accuracies, or of a metric that is an error, as one of errors."""
    value = float(reads_curve(policy)) - table.value  # the metric is the negative error
    return dataclasses.replace(table, value=value, at_most=True, tolerance=1e-12)


def _target_series(table: TargetTable) -> dict[str, Any]:
    """Returns the values of a table of targets, and how one is looked up, see `TargetTable`."""
    return {
        "at_most": table.at_most,
        "tolerance": table.tolerance,
        "value": table.value.tolist(),
        "reached": _rounded(table.reached),
        "best": _rounded(table.value[:1]),
    }


def _rounded(values: np.ndarray) -> list[float]:
    """Returns values [T] with the four decimals that the page shows, rounded as commands round."""
    return [round(value, 4) for value in values.tolist()]


def _certified_series(
    analysis: Analysis, replica: int, policy: str, resolver: ThresholdResolver
) -> dict[str, dict[str, Any]]:
    """Returns the tables of risk and agreement at 95% confidence; none where none is certified.

    Their thresholds are of confidences that half of the calibration rows fitted: they have columns
    threshold (as text), cost and score of their own.
    """
    half = resolver.half_calibrator
    if half is None or policy not in resolver.losses:
        return {}
    validation = analysis.validation.replica(replica)
    exact = simulate(validation, policy, calibrators=[half])
    points = row_breakpoints(
        analysis.calibration.replica(replica), validation, policy, half, cross_fitted=False
    )
    found = {}
    for kind in CERTIFICATE_KINDS:
        table = resolver.table(policy, kind)
        curve = read_curve(exact, table.threshold)
        found[kind] = _target_series(table) | {
            "threshold": format_thresholds(table.threshold, points),
            "cost": _rounded(curve.cost[0]),
            "score": _rounded(curve.score[0]),
        }
    return found


def row_series(
    validation: ExitOutputs,
    resolver: ThresholdResolver,
    policies: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Returns the validation rows of one replica, for the tables of classes that follow the slider.

    labels, predictions (of each exit) and, under leaves, for each policy and exit but the last the
    number of positions of the slider at which a row has left: uint16 in base 64. Without the other
    policies, or None, where the rows are too many for a page, or not of classes.

    Args:
      validation: of one replica.
      resolver: of the replica, with its calibrator.
      policies: what `policy_series` returned.

    """
    exits, count = validation.predictions.shape[1:3]
    size = (exits - 1) * count
    if (
        validation.objective.categorical is None
        or validation.labels.ndim != 2
        or not validation.identity.classes
        or size > _ENTRIES
    ):
        return None
    names = list(policies)[: max(1, _ENTRIES // max(1, size))]
    leaves = {}
    for name in names:
        confidences = exit_confidences(validation, name, (resolver.calibrator,))[0]  # [E, N]
        reached = np.maximum.accumulate(confidences[:-1], axis=0)
        leaves[name] = _packed(np.searchsorted(policies[name]["positions"], reached, side="right"))
    return {
        "labels": _packed(validation.labels[0]),
        "predictions": _packed(validation.predictions[0]),
        "leaves": leaves,
    }


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<u2").tobytes()).decode()


def certificate_table(analysis: Analysis, replica: int) -> list[dict[str, Any]]:
    """Certifies limits on either kind of harm for one replica, at 95% confidence.

    Returns one dict for each kind and limit: the certificate's values with the threshold as text,
    and the cost and score of its threshold on validation rows (None where the limit cannot be
    certified). Empty where the run cannot certify anything.
    """
    resolver = analysis.resolver(replica)
    if resolver.half_calibrator is None or not resolver.losses:
        return []
    points = analysis.breakpoints(replica, resolver.half_calibrator)
    rows = []
    for kind in CERTIFICATE_KINDS:
        for limit in _LIMITS:
            found = resolver.certificate(analysis.policy, kind, limit)
            resolution = Resolution(found.threshold, resolver.half_calibrator, certificate=found)
            cost, value = analysis.evaluate(replica, resolution).validation or (None, None)
            shown = None
            if found.threshold is not None:
                shown = format_threshold(found.threshold, points)
            rows.append(found.as_dict() | {"text": shown, "cost": cost, "score": value})
    return rows
