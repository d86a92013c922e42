"""A deep model with exits against shallower full models, at the same cost in layers and in time.

  python -m experiments.large_at_small_cost --model=minilm-l6 --data_dir=DIR

PCEE's second claim (Mofakhami et al. 2024), carried to text: a larger model that may stop early
beats a smaller one at the cost of the smaller. The shallower full models are Multi-Model's, one
trained for each depth; the deep one is SWEET's or Early-Exit's, with the best threshold
(confidence) on calibration rows whose mean cost there is at most that of the shallower model. Both
costs are given, never as one: layers, counted; and milliseconds a text on this machine, batch 1, 64
tokens, random weights of the same shape, one compiled program for a whole shallow model and one for
each segment of the deep one, whose answer must reach the host before the next may start.

Cost: that of experiments.individual, whose cells it trains where they are missing (--render_only:
none); the clock takes about half a minute. It reads the cells' outputs in --workdir, and writes
OUTPUT/large_at_small_cost.csv and latency.csv, from which it renders. Expected, if the claim
carries over: the deep model ahead at every depth. Seen with minilm-l6 on SST-2: SWEET level at 1
layer, not told apart at 2, behind at 4.
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
from experiments.comparison import Record, Records, chosen_runs, format_interval
from experiments.options import chosen_tasks, config_values, method_cells
from experiments.records import read_table, replace_rows, write_table
from experiments.rendering import Section
from experiments.runner import Script, main
from sweet_jax import ExitOutputs, simulate
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.pretrained import Checkpoint, open_checkpoint

LENGTH, TIMES = 64, 30  # tokens; calls, of which the median is taken
DEEP = ("sweet", "early_exit")
COLUMNS = ("study", "task", "method", "seed", "unit", "depth", "score", "full_model")
LATENCY = (
    *("study", "model", "depth", "milliseconds", "tokens", "calls", "backend", "devices", "jax"),
)
_DEEP_MODEL, _FULL_MODEL = "deep model, leaving there", "full model of that depth"


def clock(checkpoint: Checkpoint, exits: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Measures the milliseconds of a text until each exit's answer is on the host.

    Float64 [E] twice: of the deep model, segment by segment, and of a whole model of each depth.
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
    each = [
        jax.jit(lambda p, carried, i=i: nnx.merge(graphdef, p).segment(i, carried, batch))
        for i in range(len(exits))
    ]
    carried = None
    for i, segment in enumerate(each):
        deep[i] = _median(lambda s=segment, c=carried: s(params, c)[1].logits)
        carried = segment(params, carried)[0]
    whole = np.zeros(len(exits))
    for i, depth in enumerate(exits):
        shallow = nnx.split(EarlyExit(checkpoint.encoder(key, depth=depth), (depth,), 2, key))
        answer = jax.jit(lambda p, g=shallow[0]: nnx.merge(g, p)(batch))
        whole[i] = _median(lambda a=answer, p=shallow[1]: a(p))
    return 1000 * np.cumsum(deep), 1000 * whole


def _median(call: Callable[[], Any]) -> float:
    """Returns the seconds of a call until its result is on the host."""
    np.asarray(call())
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        np.asarray(call())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def at_cost(folder: Path, replica: int, cost: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Returns the score on validation rows of the best threshold within each mean cost, [limits].

    NaN where no threshold is so cheap.

    cost: float [E], of each exit, in the unit of the limits. Chosen on calibration rows.
    """
    calibration, validation = (
        dataclasses.replace(ExitOutputs.load(folder / f"{split}.npz").replica(replica), cost=cost)
        for split in ("calibration", "validation")
    )
    resolver = make_resolver(calibration, ("confidence",))
    chosen = [resolver.resolve("confidence", {"cost": limit}).threshold for limit in limits]
    thresholds = np.asarray([np.inf if t is None else t for t in chosen])
    scores = simulate(validation, calibrators=[resolver.calibrator], thresholds=thresholds).score[0]
    return np.where([t is None for t in chosen], np.nan, scores)


def measurements(options: argparse.Namespace, records: Records) -> None:
    """Writes latency.csv, and large_at_small_cost.csv of the cells with outputs in the workdir."""
    found = []
    for task, method in itertools.product(chosen_tasks(options), DEEP):
        name = f"{task}-{method}"
        record, small = records.get(name), records.get(f"{task}-multi_model")
        if record is not None and small is not None:
            if is_finished(options.workdir, name):
                found.append((outputs_folder(options.workdir, name), record, small))
            else:
                print(f"{name} is not measured: its outputs are not in {str(options.workdir)!r}")
    if not found:
        return
    exits = config_values(options)["exits"]
    deep, full = clock(open_checkpoint(config_values(options)["checkpoint"]), exits)
    write_latency(options.output, exits, deep, full)
    layers = np.asarray(exits) / exits[-1]
    limits = {"layers": (layers, layers[:-1]), "clock": (deep, full[:-1])}
    rows = [row for cell in found for row in measure(*cell, options.output.name, limits)]
    key = operator.itemgetter("task", "method")
    replace_rows(options.output / "large_at_small_cost.csv", COLUMNS, rows, key)


def measure(
    folder: Path,
    record: Record,
    small: Record,
    study: str,
    limits: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> list[dict[str, Any]]:
    """Returns rows of large_at_small_cost.csv for one deep model.

    limits: by unit the cost of each exit [E], and of each full model but the deepest [E - 1].
    """
    models = {run.seed: run.scores for run in chosen_runs(small)}
    rows = []
    for run in chosen_runs(record):
        if run.seed not in models:
            continue
        for unit, (cost, wanted) in limits.items():
            scores = at_cost(folder, record.runs.index(run), cost, wanted)
            for depth, score in zip(record.config["exits"], scores.tolist(), strict=False):
                cell = (study, record.config["task"], record.config["method"])
                values = (*cell, run.seed, unit, depth, score, models[run.seed][depth])
                rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def write_latency(output: Path, exits: Sequence[int], deep: np.ndarray, full: np.ndarray) -> None:
    """Writes what `clock` measured, with the machine's backend."""
    about = (LENGTH, TIMES, jax.default_backend(), jax.device_count(), jax.__version__)
    rows = [
        dict(zip(LATENCY, (output.name, title, depth, ms, *about), strict=True))
        for title, every in ((_DEEP_MODEL, deep), (_FULL_MODEL, full))
        for depth, ms in zip(exits, every.tolist(), strict=True)
    ]
    write_table(output / "latency.csv", LATENCY, rows)


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Returns the tables of differences at equal cost, by depth and unit, and of milliseconds."""
    rows = read_table(options.output / "large_at_small_cost.csv")
    clocked = read_table(options.output / "latency.csv")
    if not rows:
        return []
    exits = list(dict.fromkeys(int(row["depth"]) for row in clocked))
    names = [f"{d} layer{'s' * (d > 1)}" for d in exits]
    by_title: dict[str, list[str]] = {}
    for row in clocked:
        by_title.setdefault(row["model"], []).append(f"{float(row['milliseconds']):.2f}")
    about = clocked[0]
    return [
        Section(
            "large_at_small_cost",
            f"A deep model at a small cost, {options.model}",
            "Points by which the deep model with exits is ahead of a full model of the depth "
            "named, at that model's cost: mean and 95% interval over seeds, in bold where it "
            "leaves out zero; a dash where the deep model cannot be so cheap.",
            ("task", "deep model", "cost by", *names[:-1]),
            _gap_rows(rows),
        ),
        Section(
            "clock",
            f"Milliseconds a text, {options.model}",
            f"Batch 1, {about['tokens']} tokens, float32, median of {about['calls']} calls, "
            f"{about['backend']} ({about['devices']} device(s)), jax {about['jax']}.",
            ("", *names),
            [[title, *values] for title, values in by_title.items()],
        ),
    ]


def _gap_rows(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Returns a row for each task, deep model and unit, and those of the means over tasks."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        of_seed = found.setdefault((row["method"], row["task"], row["unit"]), {})
        gap = float(row["score"]) - float(row["full_model"])
        of_seed.setdefault(row["seed"], []).append(gap)
    gaps = {key: np.asarray(list(of_seed.values())) for key, of_seed in found.items()}  # [S, E - 1]
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
