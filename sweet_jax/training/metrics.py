"""The training log (metrics.jsonl and a tracker), and the training failures it shows.

Shape letters: R replica, E exit, N examples, C classes.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.files import replace_nonfinite, write_text
from sweet_jax.trackers import Tracker
from sweet_jax.training.losses import StepMetrics

Row = dict[str, Any]


def read_metrics(workdir: Path) -> list[Row]:
    """Returns the training steps in metrics.jsonl, in order, without the tuning-row evaluations."""
    return [row for row in _read(workdir) if "loss" in row]


def _read(workdir: Path) -> list[Row]:
    """Returns the rows of metrics.jsonl, up to a line that is incomplete because a process died."""
    path = workdir / "metrics.jsonl"
    rows: list[Row] = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricsLog:
    """Appends the steps of one training to metrics.jsonl.

    Each row is in the file as soon as it is logged. Rows that a killed run left behind, of steps
    that will now be repeated, are dropped first, by replacing the file.

    Args:
      workdir: directory that holds metrics.jsonl.
      training: name of the training.
      step: number of the first step to log.
      exits: layer numbers of the exits [E].
      tracker: tracker that receives all values too.

    """

    def __init__(
        self, workdir: Path, training: str, step: int, exits: Sequence[int], tracker: Tracker
    ):
        rows = [
            row
            for row in _read(workdir)
            if row["training"] != training
            # An evaluation belongs to the state after `step` steps. A training that starts from the
            # beginning repeats all of them.
            or (step > 0 and row["step"] + ("area" not in row) <= step)
        ]
        write_text(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        # Line-buffered, so that a program that follows the file sees every row as it is written.
        self._file = (workdir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._training = training
        self._exits = exits
        self._tracker = tracker

    def add_rates(self, step: int, rates: Sequence[float]) -> None:
        """Passes the learning rates [R] of a step to the tracker; metrics.jsonl has none."""
        for replica, rate in enumerate(rates):
            self._event(f"learning_rate/replica_{replica}", rate, step)

    def add(self, step: int, epoch: int, length: int, values: StepMetrics) -> None:
        """Logs the metrics of a step, NumPy arrays [R, ...]; nonfinite values become null."""
        arrays = {k: v for k, v in values._asdict().items() if v is not None}
        logged = {name: replace_nonfinite(array.tolist()) for name, array in arrays.items()}
        self._write({"step": step, "epoch": epoch, "length": length, **logged})
        for name in ("loss", "exit_loss", "distillation"):
            for replica, losses in enumerate(arrays.get(name, ())):
                for layer, value in zip(self._exits, losses, strict=True):
                    self._event(f"{name}/exit_{layer}/replica_{replica}", value, step)
        for replica, cosines in enumerate(arrays.get("conflict", ())):
            for i, j, k in itertools.combinations_with_replacement(range(len(self._exits)), 3):
                if j < k:
                    layer, *pair = (self._exits[e] for e in (i, j, k))
                    name = f"conflict/layer_{layer}/exits_{pair[0]}_{pair[1]}/replica_{replica}"
                    self._event(name, cosines[i, j, k], step)

    def add_tuning(self, step: int, area: np.ndarray, metric: np.ndarray) -> None:
        """Logs an evaluation on the tuning rows after `step` steps: area [R], metric [R, E]."""
        logged = {"area": area.tolist(), "metric": metric.tolist()}
        self._write({"step": step, **replace_nonfinite(logged)})
        for replica, (value, by_exit) in enumerate(zip(area, metric, strict=True)):
            self._event(f"tuning_area/replica_{replica}", value, step)
            for layer, of_exit in zip(self._exits, by_exit, strict=True):
                self._event(f"tuning_metric/exit_{layer}/replica_{replica}", of_exit, step)

    def _write(self, row: Row) -> None:
        self._file.write(json.dumps({"training": self._training, **row}) + "\n")

    def _event(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value):
            self._tracker.add(name, float(value), step)

    def flush(self) -> None:
        """Flushes the tracker, and the file; called before each checkpoint."""
        self._file.flush()
        self._tracker.flush()

    def close(self) -> None:
        """Flushes and closes the file and the tracker."""
        self._file.close()
        self._tracker.close()


def find_failures(
    rows: Iterable[Row],
    trainings: Mapping[str, Sequence[int]],
    outputs: ExitOutputs,
) -> list[Row]:
    """Finds failures of training; returns one row for each replica and exit that failed.

    An exit whose loss stopped being finite has diverged, and is reported with the first such step.
    An exit that predicts the same for all evaluated rows has collapsed, and is reported with that
    prediction and with the training step from which on it was the only prediction for every batch.

    Args:
      rows: rows of metrics.jsonl.
      trainings: layer numbers of the exits of each training, by its name.
      outputs: outputs for the evaluated rows; its identity names the replicas and classes.

    """
    first_bad: dict[tuple[int, int], int] = {}
    since: dict[tuple[int, int], tuple[int, int]] = {}  # (prediction, first step it holds since)
    for row in rows:
        for r in range(len(outputs.logits)):
            for e, layer in enumerate(trainings[row["training"]]):
                key, only = (r, layer), row["predicted"][r][e]
                if any(row[k][r][e] is None for k in ("loss", "exit_loss") if k in row):
                    first_bad.setdefault(key, row["step"])
                if since.get(key, (-2, 0))[0] != only:
                    since[key] = (only, row["step"])
    objective, failures = outputs.objective, []
    for r, (seed, rate) in enumerate(outputs.identity.replicas):
        for e, layer in enumerate(outputs.layers.tolist()):
            who = {"replica": r, "seed": seed, "learning_rate": rate, "exit": layer}
            logits = outputs.logits[r, e]  # [N, C]
            pred = int(objective.constant_prediction(logits, np.ones(len(logits), bool)))
            if (r, layer) in first_bad or not np.isfinite(logits).all():
                step = first_bad.get((r, layer))
                failures.append(who | {"what": "loss is not finite", "step": step})
            elif len(logits) > 1 and pred >= 0:
                only, step = since.get((r, layer), (-1, 0))
                first = objective.describe(objective.predict(logits)[0], outputs.identity.classes)
                failures.append(
                    who | {"what": f"collapsed to {first}", "step": step if only == pred else None}
                )
    return failures
