"""Compares a deep model with exits with shallower full models, at equal cost in layers and in time.

  python -m experiments.large_at_small_cost --model=minilm-l6 --data_dir=DIR

It tests PCEE's second claim (Mofakhami et al. 2024) on texts: a larger model with early exits is
better than a smaller model, at the cost of the smaller one. The shallower full models are those of
Multi-Model, one trained for each depth. The deep model is SWEET's or Early-Exit's, with the
confidence threshold that is best on calibration rows among those whose mean cost there is at most
that of the shallower model. There are two kinds of cost: layers; and milliseconds for a text on
this machine, with batch size 1, 64 tokens and random weights of the same shape. For the latter, a
shallow model is one compiled program, and the deep model is one for each segment, whose answer must
reach the host before the next one starts.

Cost: that of experiments.individual, whose missing cells it trains (with --render_only, none); the
timing takes half a minute. It reads the cells' outputs in --workdir, and writes
OUTPUT/large_at_small_cost.csv and latency.csv, from which it renders. Expected, if the claim holds:
the deep model is ahead at every depth. Found with minilm-l6 on SST-2: SWEET is level at 1 layer,
cannot be distinguished at 2, and is behind at 4.

Shape letters: S seed, E exit.
"""

import argparse
import dataclasses
import functools
import itertools
import operator
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import paper
from experiments.cells import is_finished, outputs_folder
from experiments.comparison import Record, Records, chosen_runs
from experiments.comparison_tables import format_interval
from experiments.options import chosen_tasks, config_values, method_cells
from experiments.records import read_table, replace_rows, write_table
from experiments.rendering import Section
from experiments.runner import Script, main
from sweet_jax import ExitOutputs, simulate
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.pretrained import Checkpoint, open_checkpoint

LENGTH, CALLS = 64, 30  # tokens; timed calls, whose median is taken
DEEP = ("sweet", "early_exit")
COLUMNS = ("study", "task", "method", "seed", "unit", "depth", "score", "full_model")
LATENCY = (
    *("study", "model", "depth", "milliseconds", "tokens", "calls", "backend", "devices", "jax"),
)
_DEEP_MODEL, _FULL_MODEL = "deep model, leaving there", "full model of that depth"


def measure_latency(checkpoint: Checkpoint, exits: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the milliseconds until the answer to a text is on the host, two float64 [E].

    The first are those of each exit of the deep model, segment by segment; the second are those of
    a full model of each depth.
    """
    key = jax.random.key(0)
    ids = jnp.asarray(np.random.default_rng(0).integers(1, 1000, (1, LENGTH)), jnp.int32)
    batch = {
        "input_ids": ids,
        "token_type_ids": jnp.zeros_like(ids),
        "mask": jnp.ones(ids.shape, bool),
    }
    deep = np.zeros(len(exits))
    graphdef, params = nnx.split(EarlyExit(checkpoint.encoder(key), exits, 2, key))
    segments = [
        jax.jit(lambda p, carried, i=i: nnx.merge(graphdef, p).segment(i, carried, batch))
        for i in range(len(exits))
    ]
    carried = None
    for i, segment in enumerate(segments):
        deep[i] = _median_seconds(functools.partial(_logits, segment, params, carried))
        carried = segment(params, carried)[0]
    full = np.zeros(len(exits))
    for i, depth in enumerate(exits):
        shallow = nnx.split(EarlyExit(checkpoint.encoder(key, depth=depth), (depth,), 2, key))
        forward = jax.jit(lambda p, g=shallow[0]: nnx.merge(g, p)(batch))
        full[i] = _median_seconds(functools.partial(forward, shallow[1]))
    return 1000 * np.cumsum(deep), 1000 * full


def _logits(segment: Callable[..., Any], params: Any, carried: Any) -> Any:
    return segment(params, carried)[1].logits


def _median_seconds(call: Callable[[], Any]) -> float:
    """Returns the median seconds of a call until its result is on the host."""
    np.asarray(call())
    seconds = []
    for _ in range(CALLS):
        began = time.perf_counter()
        np.asarray(call())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def at_cost(folder: Path, replica: int, cost: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Returns the validation scores of the best thresholds within limits of the mean cost.

    The thresholds are chosen on calibration rows. The score is NaN if none is so cheap.

    Args:
      folder: outputs of a cell.
      replica: index of the replica.
      cost: cost of each exit, float [E], in the unit of the limits.
      limits: maximum mean costs, float [limits].

    """
    calibration, validation = (
        dataclasses.replace(ExitOutputs.load(folder / f"{split}.npz").replica(replica), cost=cost)
        for split in ("calibration", "validation")
    )
    resolver = make_resolver(calibration, ("confidence",))
    resolved = [resolver.resolve("confidence", {"cost": limit}).threshold for limit in limits]
    thresholds = np.asarray([np.inf if t is None else t for t in resolved])
    scores = simulate(validation, calibrators=[resolver.calibrator], thresholds=thresholds).score[0]
    return np.where([t is None for t in resolved], np.nan, scores)


def measurements(options: argparse.Namespace, records: Records) -> None:
    """Writes latency.csv, and large_at_small_cost.csv for the cells with outputs in --workdir."""
    cells = []  # outputs of a deep model, its record, and that of the full models
    for task, method in itertools.product(chosen_tasks(options), DEEP):
        name = f"{task}-{method}"
        record, small = records.get(name), records.get(f"{task}-multi_model")
        if record is not None and small is not None:
            if is_finished(options.workdir, name):
                cells.append((outputs_folder(options.workdir, name), record, small))
            else:
                print(f"{name} is not measured: its outputs are not in {str(options.workdir)!r}")
    if not cells:
        return
    exits = config_values(options)["exits"]
    deep, full = measure_latency(open_checkpoint(config_values(options)["checkpoint"]), exits)
    write_latency(options.output, exits, deep, full)
    layers = np.asarray(exits) / exits[-1]
    limits = {"layers": (layers, layers[:-1]), "clock": (deep, full[:-1])}
    rows = [row for cell in cells for row in measure(*cell, options.output.name, limits)]
    key = operator.itemgetter("task", "method")
    replace_rows(options.output / "large_at_small_cost.csv", COLUMNS, rows, key)


def measure(
    folder: Path,
    record: Record,
    small: Record,
    study: str,
    limits: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> list[dict[str, Any]]:
    """Returns the rows of large_at_small_cost.csv for one deep model.

    Args:
      folder: outputs of the deep model's cell.
      record: record of the deep model.
      small: record of the full models.
      study: name of the study.
      limits: by unit of cost, the cost of each exit [E] and of each full model except the deepest
        [E - 1].

    """
    models = {run.seed: run.scores for run in chosen_runs(small)}
    rows = []
    for run in chosen_runs(record):
        if run.seed not in models:
            continue
        for unit, (cost, maxima) in limits.items():
            scores = at_cost(folder, record.runs.index(run), cost, maxima)
            for depth, score in zip(record.config["exits"], scores.tolist(), strict=False):
                cell = (study, record.config["task"], record.config["method"])
                values = (*cell, run.seed, unit, depth, score, models[run.seed][depth])
                rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def write_latency(output: Path, exits: Sequence[int], deep: np.ndarray, full: np.ndarray) -> None:
    """Writes the milliseconds of `measure_latency` to latency.csv, with the machine's backend."""
    about = (LENGTH, CALLS, jax.default_backend(), jax.device_count(), jax.__version__)
    rows = [
        dict(zip(LATENCY, (output.name, title, depth, ms, *about), strict=True))
        for title, times in ((_DEEP_MODEL, deep), (_FULL_MODEL, full))
        for depth, ms in zip(exits, times.tolist(), strict=True)
    ]
    write_table(output / "latency.csv", LATENCY, rows)


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the tables of differences at equal cost, by depth and unit, and of milliseconds."""
    rows = read_table(options.output / "large_at_small_cost.csv")
    latency = read_table(options.output / "latency.csv")
    if not rows:
        return []
    exits = list(dict.fromkeys(int(row["depth"]) for row in latency))
    names = [f"{d} layer{'s' * (d > 1)}" for d in exits]
    by_title: dict[str, list[str]] = {}
    for row in latency:
        by_title.setdefault(row["model"], []).append(f"{float(row['milliseconds']):.2f}")
    about = latency[0]
    return [
        Section(
            "large_at_small_cost",
            f"A deep model at a small cost, {options.model}",
            "Points by which the deep model with exits is ahead of a full model with the given "
            "number of layers, at that model's cost: mean and 95% interval over seeds, bold if it "
            "excludes zero; a dash if the deep model cannot be so cheap.",
            ("task", "deep model", "unit of cost", *names[:-1]),
            _gap_rows(rows),
        ),
        Section(
            "clock",
            f"Milliseconds per text, {options.model}",
            f"Batch 1, {about['tokens']} tokens, float32, median of {about['calls']} calls, "
            f"{about['backend']} ({about['devices']} device(s)), jax {about['jax']}.",
            ("", *names),
            [[title, *values] for title, values in by_title.items()],
        ),
    ]


def _gap_rows(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Returns a row for each task, deep model and unit of cost, and for the means over tasks."""
    by_seed: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        of_seed = by_seed.setdefault((row["method"], row["task"], row["unit"]), {})
        gap = float(row["score"]) - float(row["full_model"])
        of_seed.setdefault(row["seed"], []).append(gap)
    gaps = {key: np.asarray(list(s.values())) for key, s in by_seed.items()}  # [S, E - 1]
    table = []
    for method in DEEP:
        table += [_row(t, m, unit, g) for (m, t, unit), g in gaps.items() if m == method]
        for unit in ("layers", "clock"):
            every = [g for (m, _, u), g in gaps.items() if (m, u) == (method, unit)]
            if len(every) > 1 and len({g.shape for g in every}) == 1:
                mean = np.mean(every, axis=0)
                table.append(_row(f"mean of {len(every)} tasks", method, unit, mean))
    return table


def _row(task: str, method: str, unit: str, values: np.ndarray) -> list[str]:
    texts = [
        "-" if np.isnan(gap).any() else format_interval(100 * gap, sign=True) for gap in values.T
    ]
    return [task, paper.NAMES[method], unit, *texts]


SCRIPT = Script("large_at_small_cost", __doc__, method_cells, sections, measurements)
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
