"""Records of experiments.panel: what each variant of each cell scored, and bootstrap draws of it.

A record is a small JSON file, all that the tables need. Areas on drawn rows are kept as their
differences from the area, float16 in base64: 4 kB for five seeds.

Shape letters: S seed, E exit, N validation rows, D bootstrap draws, M moves of a row from one exit
to the one before, G groups of moves at one threshold, K statistics of a row, T thresholds.
"""

import base64
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison import mean_to_full
from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.files import write_text

DRAWS = 300


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Holds the scores of one variant on the validation rows, as fractions.

    Attributes:
      exits: float64 [S, E], the task's metric of every exit alone.
      area: float64 [S], mean metric from exit 1's cost to the full model's, exact curve.
      drawn_area: float64 [D, S], the same on rows drawn with replacement; the same draws for all
        variants of a cell, so that differences are paired. None of baselines, and of one exit.

    """

    exits: np.ndarray
    area: np.ndarray
    drawn_area: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """Holds the stored result of a variant of a cell.

    Attributes:
      config: of the run, as JSON has it, without paths.
      n: rows of each kind, and classes.
      scores: by kind: "trained", "refit", or the name of a baseline.
      about: the metric, the search for a rate, the best steps, CPU seconds.

    """

    config: Mapping[str, Any]
    n: Mapping[str, int]
    scores: Mapping[str, Scores]
    about: Mapping[str, Any]


def draw_counts(rows: int) -> np.ndarray:
    """Returns how often every draw has each row, int [D, N]: the same for the same number."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, rows, (DRAWS, rows))
    return np.stack([np.bincount(each, minlength=rows) for each in drawn])


def score_run(analysis: Analysis) -> Scores:
    """Scores a run by the exact curve of its own policy."""
    outputs, curve = analysis.validation, analysis.curve
    classes = outputs.logits.shape[-1]
    exits = [
        [compute_metric(outputs.metric, p, labels, classes) for p in predicted]
        for predicted, labels in zip(outputs.predictions, outputs.labels, strict=True)
    ]
    pairs = zip(curve.cost, curve.score, strict=True)
    area = np.asarray([mean_to_full(cost, score) for cost, score in pairs])
    if len(outputs.layers) == 1:
        return Scores(np.asarray(exits), area)
    return Scores(np.asarray(exits), area, bootstrap_areas(analysis, range(len(area))))


def bootstrap_areas(analysis: Analysis, replicas: Iterable[int]) -> np.ndarray:
    """Returns the areas of some replicas on drawn rows, float64 [D, S]."""
    outputs = analysis.validation
    confidences = exit_confidences(outputs, analysis.policy, analysis.calibrators)  # [R, E, N]
    counts = draw_counts(outputs.labels.shape[1])
    drawn = [bootstrap_replica_areas(outputs.replica(r), confidences[r], counts) for r in replicas]
    return np.stack(drawn, axis=1)


def bootstrap_replica_areas(
    outputs: ExitOutputs, confidences: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Returns the area on drawn rows, float64 [D]: of the exact curve, computed anew for each draw.

    As `sweet_jax.exits.simulation` computes it, with every row weighted by how often it is drawn,
    so that breakpoints are sorted once.

    Args:
      outputs: of one replica.
      confidences: float64 [E, N].
      counts: int [D, N].

    """
    metric = outputs.objective.metric(outputs.metric)
    points = np.maximum.accumulate(confidences[:-1], axis=0)  # [E - 1, N]
    move = np.argsort(-points, axis=None, kind="stable")
    move = move[points.ravel()[move] > -np.inf]
    leaving, row = np.unravel_index(move, points.shape)  # [M]
    level = points[leaving, row]
    changes = np.append(level[1:] != level[:-1], True)[: len(level)]
    ends = np.concatenate([[0], np.flatnonzero(changes) + 1])  # [1 + G]
    classes = outputs.logits.shape[-1]
    given = metric.row_statistics(outputs.predictions[0], outputs.labels[0], classes)
    statistics = np.asarray(given, np.float64)  # [E, N, K]
    targets = np.asarray(metric.target_statistics(outputs.labels[0], classes), np.float64)
    gains = statistics[leaving, row] - statistics[leaving + 1, row]  # [M, K]
    saved = outputs.cost[leaving] - outputs.cost[leaving + 1]  # [M]
    steps = np.column_stack([saved, gains])  # [M, 1 + K]
    areas = []
    for drawn in counts:
        sums = np.zeros((1 + len(move), steps.shape[1]))
        np.cumsum(drawn[row, None] * steps, axis=0, out=sums[1:])
        sums = sums[ends][::-1]  # [T, 1 + K], from the cheapest
        cost = outputs.cost[-1] + sums[:, 0] / drawn.sum()
        score = metric.value(drawn @ statistics[-1] + sums[:, 1:], drawn @ targets)
        areas.append(mean_to_full(cost, score))
    return np.asarray(areas)


def score_predictions(
    metric: str, predictions: np.ndarray, labels: np.ndarray, classes: int
) -> Scores:
    """Scores a baseline, which has one exit: predictions int [S, N]."""
    exits = [[compute_metric(metric, each, labels, classes)] for each in predictions]
    return Scores(np.asarray(exits), np.asarray(exits)[:, 0])


def record_path(output: Path, name: str, variant: str) -> Path:
    """Returns where the record of a variant of a cell stands."""
    return output / "cells" / name / f"{variant}.json"


def write_record(output: Path, name: str, variant: str, record: Record) -> None:
    """Writes a record, whole or not at all; a line for each of its parts."""
    parts = {
        "config": dict(record.config),
        "n": dict(record.n),
        "about": dict(record.about),
        **{f"scores/{kind}": _packed(scores) for kind, scores in record.scores.items()},
    }
    lines = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in parts.items()]
    write_text(record_path(output, name, variant), "{\n" + ",\n".join(lines) + "\n}\n")


def read_record(output: Path, name: str, variant: str) -> Record | None:
    """Returns what `write_record` wrote, None where there is none yet."""
    path = record_path(output, name, variant)
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    kinds = {k.partition("/")[2]: v for k, v in values.items() if k.startswith("scores/")}
    scores = {kind: _unpacked(packed) for kind, packed in kinds.items()}
    return Record(values["config"], values["n"], scores, values["about"])


def _packed(scores: Scores) -> dict[str, Any]:
    """Returns scores as JSON: a metric of a thousand rows has no seventh digit."""
    values = {"exits": scores.exits.round(6).tolist(), "area": scores.area.round(6).tolist()}
    if scores.drawn_area is None:
        return values
    gaps = (scores.drawn_area - scores.area).astype("<f2")  # [D, S]
    return values | {"drawn_area": base64.b64encode(gaps.tobytes()).decode()}


def _unpacked(values: Mapping[str, Any]) -> Scores:
    exits, area = np.asarray(values["exits"]), np.asarray(values["area"])
    if "drawn_area" not in values:
        return Scores(exits, area)
    gaps = np.frombuffer(base64.b64decode(values["drawn_area"]), "<f2").reshape(-1, len(area))
    return Scores(exits, area, area + gaps.astype(np.float64))
