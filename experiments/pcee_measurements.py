"""Measures how close exit rules come to a target accuracy, and how often certificates hold.

It does so for experiments.pcee_control and laplace_control, from outputs of all exits.

Shape letters: T target, E exit, N rows.
"""

import argparse
import operator
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cells import is_finished, outputs_folder
from experiments.comparison import Records, chosen_runs
from experiments.records import replace_rows
from sweet_jax import ExitOutputs, simulate
from sweet_jax.errors import UserError
from sweet_jax.exits.certificates import exit_losses
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.simulation import exact_curve, read_curve

# Title, policy, and whether the threshold is chosen on calibration rows; else it is the target.
RULES = (
    ("confidence, as it is", "raw_confidence", False),
    ("confidence, after temperature", "confidence", False),
    ("confidence, threshold chosen", "confidence", True),
    ("PCEE, equal width", "pcee", False),
    ("PCEE, equal mass", "pcee_equal_mass", False),
    ("PCEE, isotonic", "pcee_isotonic", False),
    ("PCEE-WS", "pcee_ws", False),
)
TARGETS = np.linspace(0.1, 0.9, 5)  # between the first (0) and the last exit's accuracy (1)
LIMITS, LEVEL = (0.02, 0.05, 0.1), 0.95
ROWS = 400  # calibration rows for a certificate
_CELL = ("study", "task", "method", "learning_rate", "seed")
CONTROL = (*_CELL, "rule", "splits", "asked", "achieved", "error", "cost")
CERTIFICATES = (*_CELL, "limit", "level", "rows", "draws", "certified", "broken", "cost")
MIN_GAIN = 0.01  # of the last exit over the first; with less, targets are not worth setting


def load_held_out(folder: Path, replica: int) -> ExitOutputs:
    """Returns the outputs of a replica, R = 1, on its calibration and then its validation rows.

    Raises UserError if the calibration rows are validation rows.
    """
    parts = [
        ExitOutputs.load(folder / f"{split}.npz").replica(replica)
        for split in ("calibration", "validation")
    ]
    if parts[0].identity.fitted_on != "held_out":
        raise UserError(
            f"{str(folder)!r} holds out no calibration rows: train without a preset that "
            "calibrates on the validation rows"
        )
    return join_outputs(*parts)


def join_outputs(first: ExitOutputs, second: ExitOutputs) -> ExitOutputs:
    """Returns the concatenated rows of two outputs of one replica."""
    logits, labels = (
        np.concatenate([getattr(p, name) for p in (first, second)], axis=axis)
        for name, axis in (("logits", 2), ("labels", 1))
    )
    return ExitOutputs(logits, labels, first.layers, first.cost)


def reachable_targets(rows: ExitOutputs) -> np.ndarray | None:
    """Returns target accuracies [T] between those of the first and the last exit of a replica.

    Returns None if the last exit gains less than MIN_GAIN over the first.
    """
    accuracy = (rows.predictions == rows.labels[:, None])[0].mean(axis=-1)  # [E]
    gain = accuracy[-1] - accuracy[0]
    return accuracy[0] + TARGETS * gain if gain >= MIN_GAIN else None


def control(
    rows: ExitOutputs,
    targets: np.ndarray,
    splits: int,
    seed: int = 0,
    more: Sequence[np.ndarray] = (),
    *,
    oracle: bool = False,
) -> np.ndarray:
    """Returns the achieved accuracies and costs of RULES, float64 [rules, T, splits, 2].

    For each split of the rows, one half fits what a rule needs, and the other is reported on.

    Args:
      rows: outputs of one replica.
      targets: target accuracies, float64 [T].
      splits: number of splits.
      seed: seed of the splits.
      more: exit confidences [E, N] of further rules, whose threshold is the target.
      oracle: whether to add a last rule: the confidence threshold whose accuracy on the reported
        rows is nearest to the target.

    """
    count, rules = rows.labels.shape[1], len(RULES) + len(more) + oracle
    points = np.empty((rules, len(targets), splits, 2))
    for split in range(splits):
        order = np.random.default_rng([seed, split]).permutation(count)
        fitting, reported = rows.rows(order[: count // 2]), rows.rows(order[count // 2 :])
        resolver = make_resolver(fitting, tuple(policy for _, policy, choose in RULES if choose))
        for number, (_, policy, choose) in enumerate(RULES):
            thresholds = targets
            if choose:
                chosen = [resolver.resolve(policy, {"accuracy": t}).threshold for t in targets]
                best = resolver.fronts[policy].threshold[-1]  # if calibration rows miss the target
                thresholds = np.asarray([best if t is None else t for t in chosen])
            curve = simulate(
                reported, policy, calibrators=[resolver.calibrator], thresholds=thresholds
            )
            points[number, :, split] = np.stack([curve.score[0], curve.cost[0]], axis=-1)
        for number, confidences in enumerate(more, len(RULES)):
            own = confidences[None, :, order[count // 2 :]]
            curve = read_curve(exact_curve(reported, own), targets)
            points[number, :, split] = np.stack([curve.score[0], curve.cost[0]], axis=-1)
        if oracle:
            curve = simulate(reported, "confidence", calibrators=[resolver.calibrator])
            nearest = np.abs(curve.score[0] - targets[:, None]).argmin(axis=1)  # [T]
            points[-1, :, split] = np.stack([curve.score[0], curve.cost[0]], axis=-1)[nearest]
    return points


def count_violations(rows: ExitOutputs, size: int, draws: int, seed: int = 0) -> np.ndarray:
    """Counts how often certificates are broken.

    Calibration rows are drawn with replacement from all rows, which are the population: a
    certificate is broken if the share of all rows that its threshold harms is above its limit.

    Args:
      rows: outputs of one replica.
      size: number of calibration rows.
      draws: number of draws.
      seed: seed of the draws.

    Returns:
      The number of draws that certify a threshold, the number of these whose certificate is broken,
      and the mean cost, float64 [limits, 3].

    """
    count, harmful = rows.labels.shape[1], exit_losses(rows, 0, "risk")
    counts = np.zeros((len(LIMITS), 3))
    for draw in range(draws):
        drawn = np.random.default_rng([seed, draw]).integers(0, count, size)
        resolver = make_resolver(rows.rows(drawn), ("confidence",))
        assert resolver.half_calibrator is not None, "certificates need two rows"
        points = np.maximum.accumulate(
            exit_confidences(rows, "confidence", [resolver.half_calibrator])[0, :-1]
        )
        for number, limit in enumerate(LIMITS):
            threshold = resolver.certificate("confidence", "risk", limit, LEVEL).threshold
            place = np.full(count, len(rows.layers) - 1)
            if threshold is not None:
                place = (points < threshold).sum(axis=0)
            broken = np.take_along_axis(harmful, place[None], axis=0).mean() > limit
            counts[number] += (threshold is not None, broken, rows.cost[place].mean())
    counts[:, 2] /= draws
    return counts


def measurements(options: argparse.Namespace, records: Records) -> None:
    """Writes pcee_control.csv and certificates.csv for the cells with outputs in --workdir."""
    controlled: list[dict] = []
    certified: list[dict] = []
    for name, record in records.items():
        folder = outputs_folder(options.workdir, name)
        if not is_finished(options.workdir, name):
            print(f"{name} is not measured: its outputs are not in {str(options.workdir)!r}")
            continue
        for run in chosen_runs(record):
            index = record.runs.index(run)
            cell = {
                "study": options.output.name,
                "task": record.config["task"],
                "method": record.config["method"],
                "learning_rate": run.learning_rate,
                "seed": run.seed,
            }
            rows = load_held_out(folder, index)
            seed = zlib.crc32(f"{name} {index}".encode())  # independent draws for each cell
            for limit, drawn in zip(
                LIMITS, count_violations(rows, ROWS, options.splits, seed).tolist(), strict=True
            ):
                values = (limit, LEVEL, ROWS, options.splits, *drawn)
                certified.append(cell | dict(zip(CERTIFICATES[5:], values, strict=True)))
            targets = reachable_targets(rows)
            if targets is not None:
                points = control(rows, targets, options.splits, seed)
                controlled += _control_rows(cell, points, targets, options.splits)
    key = operator.itemgetter("task", "method")
    replace_rows(options.output / "pcee_control.csv", CONTROL, controlled, key)
    replace_rows(options.output / "certificates.csv", CERTIFICATES, certified, key)


def _control_rows(
    cell: dict, points: np.ndarray, targets: np.ndarray, splits: int
) -> list[dict[str, Any]]:
    """Returns the rows of pcee_control.csv for one run.

    points: result of `control`, of which they have the means over splits.
    """
    rows = []
    for (rule, _, _), of_rule in zip(RULES, points, strict=True):
        for target, of_target in zip(targets, of_rule, strict=True):  # [splits, 2]
            achieved, cost = of_target.mean(axis=0)
            error = np.abs(of_target[:, 0] - target).mean()
            values = (rule, splits, target, achieved, error, cost)
            rows.append(cell | dict(zip(CONTROL[5:], values, strict=True)))
    return rows
