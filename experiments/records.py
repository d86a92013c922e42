"""Records of a study: the metrics of its finished cells, as CSV files under version control.

OUTPUT/scores.csv has a row for each exit of each run (a seed and a learning rate of a cell),
OUTPUT/runs.csv a row for each run with values read from its whole curve, and OUTPUT/study.json the
command's options and each cell's config, numbers of rows and digest of the data. Numbers are
written with all their digits, so that only the tables round.

Shape letters: R run (replica), T threshold.
"""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison import Record, Run, mean_to_full
from sweet_jax.config import with_current_keys
from sweet_jax.exits.analysis import analyse, curve_area
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.files import atomic_write, write_json

COLUMNS = (
    *("study", "task", "method", "setting", "train_size", "learning_rate", "seed", "exit"),
    *("metric", "value", "n", "area", "diverged"),
)
COSTS = (1 / 4, 1 / 2, 3 / 4, 1.0)  # at which the paper reads its curves, and all methods reach
_AREAS = ("calibration_area", "area_to_full", "grid_area")
_RUN = ("task", "method", "setting", "learning_rate", "seed")
_CELL = ("n", "fitted_on", "learning_rate", "data_sha256")


def exact_costs(exits: Sequence[int]) -> tuple[float, ...]:
    """Returns the costs at which exact curves are read: the first exit's, and COSTS above it."""
    first = exits[0] / exits[-1]
    return (first, *(c for c in COSTS if c > first))


def measure(folder: Path) -> Record:
    """Returns the record of a finished cell.

    Each replica's area is that under its exact curve on validation rows, over its own range of
    costs, at up to 2,000 of its thresholds; scores at fixed costs are read from all thresholds.

    folder: contains the cell's cell.json, results.json and outputs.
    """
    about, results = (json.loads((folder / f"{n}.json").read_text()) for n in ("cell", "results"))
    calibration, validation = (
        ExitOutputs.load(folder / f"{split}.npz") for split in ("calibration", "validation")
    )
    curve = analyse(calibration, validation).curve  # [R, T]
    runs = []
    for cost, score, replica in zip(curve.cost, curve.score, results["replicas"], strict=True):
        costs = exact_costs(results["exits"])
        grid = (np.asarray(replica["grid"][key]) for key in ("cost", "score"))
        thinned = (np.asarray(replica["curve"][key]) for key in ("cost", "score"))
        runs.append(
            Run(
                seed=replica["seed"],
                learning_rate=replica["learning_rate"],
                scores={e["layer"]: e["score"] for e in replica["individual"]},
                diverged={d["exit"]: _failure_text(d) for d in replica["diverged"]},
                area=curve_area(*thinned),
                calibration_area=replica["calibration_area"],
                area_to_full=mean_to_full(cost, score),
                grid_area=mean_to_full(*grid),
                exact={f"{c:.4g}": float(np.interp(c, cost, score)) for c in costs},
                grid={k: v for k, v in replica["grid_at_cost"].items() if v is not None},
            )
        )
    return Record(
        config=about["config"],
        data_sha256=about["data_sha256"],
        metric=results["metric"],
        n=results["n"],
        fitted_on=results["fitted_on"],
        learning_rate=results["mean"]["learning_rate"],
        runs=tuple(runs),
    )


def _failure_text(failure: Mapping[str, Any]) -> str:
    """Describes a failure of an exit; its step is None if only the evaluation shows it."""
    step = failure["step"]
    return failure["what"] if step is None else f"{failure['what']} at step {step}"


def write_study(output: Path, records: Mapping[str, Record], options: Sequence[str]) -> None:
    """Writes scores.csv, runs.csv and, last, study.json with all finished cells.

    options: command-line arguments that the study's cells share.
    """
    scores, runs = [], []
    for name, record in sorted(records.items()):
        task, method = record.config["task"], record.config["method"]
        setting = name.removeprefix(f"{task}-{method}").removeprefix("-")
        for run in record.runs:
            of_run = {
                "study": output.name,
                "task": task,
                "method": method,
                "setting": setting,
                "learning_rate": run.learning_rate,
                "seed": run.seed,
            }
            areas = {key: getattr(run, key) for key in _AREAS}
            exact = {f"exact_at_{cost}": value for cost, value in run.exact.items()}
            grid = {f"grid_at_{cost}": value for cost, value in run.grid.items()}
            runs.append(of_run | areas | exact | grid)
            about = {
                "train_size": record.config["train_size"],
                "metric": record.metric,
                "n": record.n["validation"],
                "area": run.area,
            }
            for layer, value in run.scores.items():
                exit_of_run = {"exit": layer, "value": value}
                diverged = {"diverged": run.diverged.get(layer, "")}
                scores.append(of_run | about | exit_of_run | diverged)
    write_table(output / "scores.csv", COLUMNS, scores)
    write_table(output / "runs.csv", _run_columns(runs), runs)
    configs = {name: record.config for name, record in records.items()}
    shared = _common_items(list(configs.values()))
    cells = {
        name: {key: getattr(record, key) for key in _CELL}
        | {"config": {k: v for k, v in record.config.items() if k not in shared}}
        for name, record in sorted(records.items())
    }
    values = {"options": list(options), "config": shared, "cells": cells}
    write_json(output / "study.json", values)


def read_study(output: Path) -> tuple[dict[str, Record], list[str]]:
    """Returns the records of the finished cells, by name, and the command-line arguments.

    Both are empty if the folder has no study.
    """
    path = output / "study.json"
    if not path.exists():
        return {}, []
    study = json.loads(path.read_text())
    scores = _by_cell(read_table(output / "scores.csv"))
    runs = _by_cell(read_table(output / "runs.csv"))
    records = {}
    for name, cell in study["cells"].items():
        of_run: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in scores[name]:
            of_run.setdefault((row["learning_rate"], row["seed"]), []).append(row)
        records[name] = Record(
            **{key: cell[key] for key in _CELL},
            config=with_current_keys(study["config"] | cell["config"]),
            metric=scores[name][0]["metric"],
            runs=tuple(_run(row, of_run[row["learning_rate"], row["seed"]]) for row in runs[name]),
        )
    return records, study["options"]


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV file; a value that a row lacks, or that is None, is empty."""
    with atomic_write(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file, none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def replace_rows(
    path: Path,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    key: Callable[[Mapping[str, Any]], Any],
) -> None:
    """Replaces the rows of a CSV file that have the keys of `rows`, and keeps the others."""
    replaced = {key(row) for row in rows}
    kept = [row for row in read_table(path) if key(row) not in replaced]
    write_table(path, columns, [*kept, *rows])


def _run(row: Mapping[str, str], exits: Sequence[Mapping[str, str]]) -> Run:
    calibration = row["calibration_area"]
    return Run(
        seed=int(row["seed"]),
        learning_rate=float(row["learning_rate"]),
        scores={int(e["exit"]): float(e["value"]) for e in exits},
        diverged={int(e["exit"]): e["diverged"] for e in exits if e["diverged"]},
        area=float(exits[0]["area"]),
        calibration_area=float(calibration) if calibration else None,
        area_to_full=float(row["area_to_full"]),
        grid_area=float(row["grid_area"]),
        exact=_scores_at_costs(row, "exact_at_"),
        grid=_scores_at_costs(row, "grid_at_"),
    )


def _scores_at_costs(row: Mapping[str, str], prefix: str) -> dict[str, float]:
    """Returns the values in the columns with a prefix, by the cost in the rest of their name."""
    values = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
    return {cost: float(value) for cost, value in values.items() if value}


def _by_cell(rows: Iterable[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Groups rows by the name of their cell."""
    cells: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        name = "-".join(filter(None, (row["task"], row["method"], row["setting"])))
        cells.setdefault(name, []).append(row)
    return cells


def _run_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the columns of runs.csv; those at costs ascend, those of exact curves come first."""
    at_costs = {column for row in rows for column in row if "_at_" in column}
    order = sorted(at_costs, key=lambda c: (c.partition("_")[0], float(c.rpartition("_")[2])))
    return ["study", *_RUN, *_AREAS, *order]


def _common_items(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the items that all the configs have."""
    if not configs:
        return {}
    first, *others = configs
    return {k: v for k, v in first.items() if all(k in o and o[k] == v for o in others)}
