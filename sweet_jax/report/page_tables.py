"""The curves of every policy, the tables of targets and the rows that page.js reads.

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
from sweet_jax.objectives.objective import ShownMetric

_LIMITS = (0.01, 0.02, 0.05, 0.1)  # limits on the share of harmed examples that are certified
_POINTS, _POINTS_OF_OTHERS = 2000, 200  # points of a curve, for the run's own policy and for others
_ENTRIES = 150_000  # maximum number of exits of rows on the page, over all policies: about 400 kB


def policy_series(
    analysis: Analysis, replica: int, threshold: float, *, every: bool
) -> dict[str, dict[str, Any]]:
    """Returns what the page shows for one replica's policies, by name, the run's own first.

    Args:
      analysis: analysis of the run.
      replica: index of the replica.
      threshold: threshold recommended for the run's own policy. For other policies, the slider
        starts at the cheapest threshold that keeps the last exit's metric on calibration rows.
      every: whether to include every deployable policy. Otherwise only the run's own policy is
        included, with as few points as other policies.

    Returns:
      A dict for each policy. "curve" holds the thresholds (as text), cost, score (the metric as it
      is shown) and shares on the validation rows at each position of the slider: at most 2,000
      distinct thresholds for the run's own policy and 200 for others, and those of the targets.
      "positions" holds these thresholds as numbers, "start" is the initial position of the slider,
      and "targets" has a table for each kind of target, see `_target_series`.

    """
    own, validation = analysis.policy, analysis.validation.replica(replica)
    metric = ShownMetric.of(validation.metric.name)
    others = [name for name in deployable_policies(validation) if name != own] if every else []
    resolver = analysis.resolver(replica, (own, *others))
    series = {}
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
        series[name] = {
            "curve": {
                "threshold": format_thresholds(at, points),
                "cost": _rounded(curve.cost[0]),
                "score": _rounded(metric.value(curve.score[0])),
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
    return series


def _positions(exact: Curve, chosen: np.ndarray, points: int) -> np.ndarray:
    """Returns the thresholds at the positions of the slider, ascending, float64 [T].

    They are at most `points` distinct thresholds of one replica's exact curve, including both ends,
    and the chosen thresholds, so that the page shows the same numbers as the commands.
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
    """Returns the fields of a table of targets that are needed to look up a target."""
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
    """Returns the tables of risk and agreement at 95% confidence; {} without certificates.

    Their thresholds apply to confidences fitted on half of the calibration rows, so the tables have
    their own columns threshold (as text), cost and score.
    """
    half = resolver.half_calibrator
    if half is None or policy not in resolver.losses:
        return {}
    validation = analysis.validation.replica(replica)
    metric = ShownMetric.of(validation.metric.name)
    exact = simulate(validation, policy, calibrators=[half])
    points = row_breakpoints(
        analysis.calibration.replica(replica), validation, policy, half, cross_fitted=False
    )
    series = {}
    for kind in CERTIFICATE_KINDS:
        table = resolver.table(policy, kind)
        curve = read_curve(exact, table.threshold)
        series[kind] = _target_series(table) | {
            "threshold": format_thresholds(table.threshold, points),
            "cost": _rounded(curve.cost[0]),
            "score": _rounded(metric.value(curve.score[0])),
        }
    return series


def row_series(
    validation: ExitOutputs,
    resolver: ThresholdResolver,
    policies: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Returns the validation rows of one replica, for class tables that follow the slider.

    Args:
      validation: outputs of one replica on the validation rows.
      resolver: threshold resolver of the replica.
      policies: result of `policy_series`.

    Returns:
      A dict of "labels", "predictions" (of each exit) and "leaves" (for each policy and exit but
      the last, the number of slider positions at which a row has left), all uint16 in base64. With
      many rows, some policies are left out. None if there are too many rows for a page, or if the
      outputs are not classes.

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
    """Certifies limits on each kind of harm for one replica, at 95% confidence.

    Returns one dict for each kind and threshold, with the certificate's fields, the limits for
    which this threshold is certified, the threshold as text, and the cost and score at it on
    validation rows. If limits cannot be certified, these are None, and the limits are in one dict
    too. The list is empty if the run has no certificates.
    """
    resolver = analysis.resolver(replica)
    if resolver.half_calibrator is None or not resolver.losses:
        return []
    points = analysis.breakpoints(replica, resolver.half_calibrator)
    rows: list[dict[str, Any]] = []
    for kind in CERTIFICATE_KINDS:
        for limit in _LIMITS:
            certificate = resolver.certificate(analysis.policy, kind, limit)
            found = (kind, certificate.threshold)
            if rows and found == (rows[-1]["kind"], rows[-1]["threshold"]):
                rows[-1]["limits"].append(limit)
                continue
            resolution = Resolution(
                certificate.threshold, resolver.half_calibrator, certificate=certificate
            )
            cost, value = analysis.evaluate(replica, resolution).validation or (None, None)
            shown = None
            if certificate.threshold is not None:
                shown = format_threshold(certificate.threshold, points)
            row = dataclasses.asdict(certificate) | {"limits": [limit], "text": shown}
            rows.append(row | {"cost": cost, "score": value})
    return rows
