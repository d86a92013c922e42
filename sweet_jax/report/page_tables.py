"""The curves of every policy and the tables of targets that the page looks up.

Shape letters: T thresholds.
"""

from typing import Any

import numpy as np

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.certificates import CERTIFICATE_KINDS
from sweet_jax.exits.operating_point import ThresholdResolver, deployable_policies
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.resolver import Resolution
from sweet_jax.exits.simulation import Curve, read_curve, simulate
from sweet_jax.exits.targets import TargetTable
from sweet_jax.report.results import thin_curve

_LIMITS = (0.01, 0.02, 0.05, 0.1)  # on the share of harmed examples: what the report certifies
_POINTS, _POINTS_OF_OTHERS = 6000, 400  # of a curve on the page; the saved outputs hold all


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
