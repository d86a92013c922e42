"""Records of experiments.panel: the scores of each variant of each cell, with bootstrap draws.

A record is a small JSON file with everything that the tables need. Areas on drawn rows are stored
as differences from the area, as float16 in base64: 4 kB for five seeds.

Shape letters: S seed, E exit, N validation rows, D bootstrap draws, M moves of a row from one exit
to the previous one, G groups of moves at one threshold, K statistics of a row, T thresholds.
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
      exits: the task's metric at every exit alone, float64 [S, E].
      area: mean metric under the exact curve, from exit 1's cost to the full model's, float64 [S].
      drawn_area: the same on rows drawn with replacement, float64 [D, S]. The draws are the same
        for all variants of a cell, so that differences are paired. None for baselines and for
        models with one exit.

    """

    exits: np.ndarray
    area: np.ndarray
    drawn_area: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """Holds the stored result of a variant of a cell.

    Attributes:
      config: config of the run as JSON values, without paths.
      n: numbers of rows by kind, and of classes.
      scores: scores by kind: "trained", "refit", or the name of a baseline.
      about: the metric, the learning-rate search, the best steps and the CPU seconds.

    """

    config: Mapping[str, Any]
    n: Mapping[str, int]
    scores: Mapping[str, Scores]
    about: Mapping[str, Any]


def draw_counts(rows: int) -> np.ndarray:
    """Returns how often each row is in each bootstrap draw, int [D, N].

    The draws depend only on the number of rows.
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, rows, (DRAWS, rows))
    return np.stack([np.bincount(each, minlength=rows) for each in drawn])


def score_run(analysis: Analysis) -> Scores:
    """Returns the scores of a run, with the area under the exact curve of its own policy."""
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
    """Returns the areas of some replicas on the drawn rows of each draw, float64 [D, S]."""
    outputs = analysis.validation
    confidences = exit_confidences(outputs, analysis.policy, analysis.calibrators)  # [R, E, N]
    counts = draw_counts(outputs.labels.shape[1])
    drawn = [bootstrap_replica_areas(outputs.replica(r), confidences[r], counts) for r in replicas]
    return np.stack(drawn, axis=1)


def bootstrap_replica_areas(
    outputs: ExitOutputs, confidences: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Returns the area under the exact curve of the drawn rows of each draw, float64 [D].

    The algorithm is that of `sweet_jax.exits.simulation` with rows weighted by how often they are
    drawn, so that breakpoints are sorted only once.

    Args:
      outputs: outputs of one replica.
      confidences: exit confidences, float64 [E, N].
      counts: how often each row is in each draw, int [D, N].

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
    statistics = metric.row_statistics(outputs.predictions[0], outputs.labels[0], classes)
    statistics = np.asarray(statistics, np.float64)  # [E, N, K]
    targets = np.asarray(metric.target_statistics(outputs.labels[0], classes), np.float64)
    gains = statistics[leaving, row] - statistics[leaving + 1, row]  # [M, K]
    saved = outputs.cost[leaving] - outputs.cost[leaving + 1]  # [M]
    steps = np.column_stack([saved, gains])  # [M, 1 + K]
    areas = []
    for drawn in counts:
        sums = np.zeros((1 + len(move), steps.shape[1]))
        np.cumsum(drawn[row, None] * steps, axis=0, out=sums[1:])
        sums = sums[ends][::-1]  # [T, 1 + K], the cheapest first
        cost = outputs.cost[-1] + sums[:, 0] / drawn.sum()
        score = metric.value(drawn @ statistics[-1] + sums[:, 1:], drawn @ targets)
        areas.append(mean_to_full(cost, score))
    return np.asarray(areas)


def score_predictions(
    metric: str, predictions: np.ndarray, labels: np.ndarray, classes: int
) -> Scores:
    """Returns the scores of a baseline, which has one exit, from predictions int [S, N]."""
    exits = [[compute_metric(metric, each, labels, classes)] for each in predictions]
    return Scores(np.asarray(exits), np.asarray(exits)[:, 0])


def record_path(output: Path, name: str, variant: str) -> Path:
    """Returns the path of the record of a variant of a cell."""
    return output / "cells" / name / f"{variant}.json"


def write_record(output: Path, name: str, variant: str, record: Record) -> None:
    """Writes a record atomically, with one line for each of its parts."""
    parts = {
        "config": dict(record.config),
        "n": dict(record.n),
        "about": dict(record.about),
        **{f"scores/{kind}": _packed(scores) for kind, scores in record.scores.items()},
    }
    lines = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in parts.items()]
    write_text(record_path(output, name, variant), "{\n" + ",\n".join(lines) + "\n}\n")


def read_record(output: Path, name: str, variant: str) -> Record | None:
    """Returns a record written by `write_record`, None if it does not exist."""
    path = record_path(output, name, variant)
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    kinds = {k.partition("/")[2]: v for k, v in values.items() if k.startswith("scores/")}
    scores = {kind: _unpacked(packed) for kind, packed in kinds.items()}
    return Record(values["config"], values["n"], scores, values["about"])


def _packed(scores: Scores) -> dict[str, Any]:
    """Returns scores as JSON values, with six digits, enough for a metric of a thousand rows."""
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
