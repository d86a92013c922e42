"""Measures how close each exit rule comes to the accuracy asked for, and how certificates hold.

For experiments.pcee_control, from the outputs of finished cells.

Shape letters: T target.
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

# Title, policy, and whether the threshold is chosen on calibration rows (else it is the target).
RULES = (
    ("confidence, as it is", "raw_confidence", False),
    ("confidence, after temperature", "confidence", False),
    ("confidence, threshold chosen", "confidence", True),
    ("PCEE, equal width", "pcee", False),
    ("PCEE, equal mass", "pcee_equal_mass", False),
    ("PCEE, isotonic", "pcee_isotonic", False),
    ("PCEE-WS", "pcee_ws", False),
)
TARGETS = np.linspace(0.1, 0.9, 5)  # of the way from the first exit's accuracy to the last one's
LIMITS, LEVEL = (0.02, 0.05, 0.1), 0.95
ROWS = 400  # calibration rows of a certificate
_CELL = ("study", "task", "method", "learning_rate", "seed")
CONTROL = (*_CELL, "rule", "splits", "asked", "achieved", "error", "cost")
CERTIFICATES = (*_CELL, "limit", "level", "rows", "draws", "certified", "broken", "cost")
LEAST_GAIN = 0.01  # of the last exit on the first: below, no target is worth asking for


def load_held_out(folder: Path, replica: int) -> ExitOutputs:
    """Returns all held-out rows of one replica, R = 1: calibration, then validation rows."""
    parts = [
        ExitOutputs.load(folder / f"{split}.npz").replica(replica)
        for split in ("calibration", "validation")
    ]
    if parts[0].identity.fitted_on != "held_out":
        raise UserError(
            f"{str(folder)!r} holds no rows out: its preset fits on the validation rows"
        )
    return join_outputs(*parts)


def join_outputs(one: ExitOutputs, other: ExitOutputs) -> ExitOutputs:
    """Returns the rows of two outputs of one replica, one after the other."""
    logits, labels = (
        np.concatenate([getattr(p, name) for p in (one, other)], axis=axis)
        for name, axis in (("logits", 2), ("labels", 1))
    )
    return ExitOutputs(logits, labels, one.layers, one.cost)


def control(
    rows: ExitOutputs,
    targets: np.ndarray,
    splits: int,
    seed: int = 0,
    more: Sequence[np.ndarray] = (),
    *,
    oracle: bool = False,
) -> np.ndarray:
    """Returns (achieved accuracy, cost) on untouched rows, float64 [rules, T, splits, 2].

    more: confidences [E, N] of further rules, whose threshold is the target.
    oracle: as the last rule, the threshold of confidence whose accuracy on the untouched rows is
      nearest to the target.
    """
    count, rules = rows.labels.shape[1], len(RULES) + len(more) + oracle
    found = np.empty((rules, len(targets), splits, 2))
    for split in range(splits):
        order = np.random.default_rng([seed, split]).permutation(count)
        fitting, untouched = rows.rows(order[: count // 2]), rows.rows(order[count // 2 :])
        resolver = make_resolver(fitting, tuple(policy for _, policy, choose in RULES if choose))
        for number, (_, policy, choose) in enumerate(RULES):
            thresholds = targets
            if choose:
                wanted = [resolver.resolve(policy, {"accuracy": t}).threshold for t in targets]
                # Where the calibration rows do not reach the target.
                best = resolver.fronts[policy].threshold[-1]
                thresholds = np.asarray([best if t is None else t for t in wanted])
            point = simulate(
                untouched, policy, calibrators=[resolver.calibrator], thresholds=thresholds
            )
            found[number, :, split] = np.stack([point.score[0], point.cost[0]], axis=-1)
        for number, confidences in enumerate(more, len(RULES)):
            own = confidences[None, :, order[count // 2 :]]
            point = read_curve(exact_curve(untouched, own), targets)
            found[number, :, split] = np.stack([point.score[0], point.cost[0]], axis=-1)
        if oracle:
            curve = simulate(untouched, "confidence", calibrators=[resolver.calibrator])
            nearest = np.abs(curve.score[0] - targets[:, None]).argmin(axis=1)  # [T]
            found[-1, :, split] = np.stack([curve.score[0], curve.cost[0]], axis=-1)[nearest]
    return found


def count_violations(rows: ExitOutputs, size: int, draws: int, seed: int = 0) -> np.ndarray:
    """Counts how often certificates hold, float64 [limits, 3]: certified, broken, mean cost.

    Calibration rows, `size` of them, are drawn with replacement; the truth is known: it is the
    share harmed of all rows.
    """
    count, harmful = rows.labels.shape[1], exit_losses(rows, 0, "risk")
    found = np.zeros((len(LIMITS), 3))
    for draw in range(draws):
        drawn = np.random.default_rng([seed, draw]).integers(0, count, size)
        resolver = make_resolver(rows.rows(drawn), ("confidence",))
        points = np.maximum.accumulate(
            exit_confidences(rows, "confidence", [resolver.half_calibrator])[0, :-1]
        )
        for number, limit in enumerate(LIMITS):
            threshold = resolver.certificate("confidence", "risk", limit, LEVEL).threshold
            place = np.full(count, len(rows.layers) - 1)
            if threshold is not None:
                place = (points < threshold).sum(axis=0)
            broken = np.take_along_axis(harmful, place[None], axis=0).mean() > limit
            found[number] += (threshold is not None, broken, rows.cost[place].mean())
    found[:, 2] /= draws
    return found


def measurements(options: argparse.Namespace, records: Records) -> None:
    """Writes pcee_control.csv and certificates.csv of the cells with outputs in the workdir."""
    found: list[dict] = []
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
            seed = zlib.crc32(f"{name} {index}".encode())  # draws of cells are independent
            for limit, drawn in zip(
                LIMITS, count_violations(rows, ROWS, options.splits, seed).tolist(), strict=True
            ):
                values = (limit, LEVEL, ROWS, options.splits, *drawn)
                certified.append(cell | dict(zip(CERTIFICATES[5:], values, strict=True)))
            right = (rows.predictions == rows.labels[:, None])[0].mean(axis=-1)
            if right[-1] - right[0] >= LEAST_GAIN:
                targets = right[0] + TARGETS * (right[-1] - right[0])
                points = control(rows, targets, options.splits, seed)
                found += _control_rows(cell, points, targets, options.splits)
    key = operator.itemgetter("task", "method")
    replace_rows(options.output / "pcee_control.csv", CONTROL, found, key)
    replace_rows(options.output / "certificates.csv", CERTIFICATES, certified, key)


def _control_rows(
    cell: dict, points: np.ndarray, targets: np.ndarray, splits: int
) -> list[dict[str, Any]]:
    """Returns rows of pcee_control.csv, means over splits of `control`'s answer for one run."""
    rows = []
    for (rule, _, _), of_rule in zip(RULES, points, strict=True):
        for target, found in zip(targets, of_rule, strict=True):  # [splits, 2]
            achieved, cost = found.mean(axis=0)
            error = np.abs(found[:, 0] - target).mean()
            values = (rule, splits, target, achieved, error, cost)
            rows.append(cell | dict(zip(CONTROL[5:], values, strict=True)))
    return rows
