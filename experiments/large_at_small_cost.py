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
none); the clock takes about half a minute. Writes OUTPUT/tables/large_at_small_cost.md. Expected,
if the claim carries over: the deep model ahead at every depth. Seen with minilm-l6 on SST-2: SWEET
level at 1 layer, not told apart at 2, behind at 4.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import grid, paper
from experiments.comparison import Records, chosen, interval
from experiments.curves import COLOURS
from experiments.options import chosen_tasks, method_cells, settings
from experiments.rendering import Section, panels, renderer
from sweet_jax import ExitOutputs, simulate
from sweet_jax.exits.metrics import mean_interval
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.pretrained import Checkpoint, open_checkpoint

LENGTH, TIMES = 64, 30  # tokens; calls, of which the median is taken


def clock(checkpoint: Checkpoint, exits: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of a text until each exit's answer is on the host, float64 [E] twice.

    First of the deep model, segment by segment; then of a whole model of each depth.
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


def _median(call) -> float:
    """Seconds of a call until its result is on the host."""
    np.asarray(call())
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        np.asarray(call())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def at_cost(folder, replica: int, cost: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Score on validation rows of the best threshold within each mean cost, [limits]; NaN if none.

    cost: float [E], of each exit, in the unit of the limits. Chosen on calibration rows.
    """
    calibration, validation = (
        dataclasses.replace(ExitOutputs.load(folder / f"{split}.npz").replica(replica), cost=cost)
        for split in ("calibration", "validation")
    )
    dials = make_resolver(calibration, ("confidence",))
    chosen = [dials.resolve("confidence", {"cost": limit}).threshold for limit in limits]
    thresholds = np.asarray([np.inf if t is None else t for t in chosen])
    scores = simulate(validation, calibrators=[dials.calibrator], thresholds=thresholds).score[0]
    return np.where([t is None for t in chosen], np.nan, scores)


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Differences at equal cost, by depth, in layers and by the clock, and the clock itself."""
    exits = settings(options)["exits"]
    deep, whole = clock(open_checkpoint(settings(options)["checkpoint"]), exits)
    layers, depths = np.asarray(exits) / exits[-1], exits[:-1]
    rows = []
    tasks = chosen_tasks(options)
    figure, axes = panels(len(tasks))
    for method in ("sweet", "early_exit"):
        gaps: dict[str, list[np.ndarray]] = {}
        for task, one in zip(tasks, axes, strict=True):
            record, small = records.get(f"{task}-{method}"), records.get(f"{task}-multi_model")
            if record is None or small is None:
                continue
            folder = options.output / "outputs" / f"{task}-{method}"
            models = {r["seed"]: [e["score"] for e in r["individual"]] for r in chosen(small)}
            found = {}
            for unit, cost, limit in (("layers", layers, layers), ("clock", deep, whole)):
                found[unit] = np.asarray(
                    [
                        at_cost(folder, record["replicas"].index(r), cost, limit[:-1])
                        - models[r["seed"]][:-1]
                        for r in chosen(record)
                        if r["seed"] in models
                    ]
                )  # [S, E - 1]
            _draw(one, task, method, folder, record, small, layers)
            gaps.setdefault("layers", []).append(found["layers"])
            gaps.setdefault("clock", []).append(found["clock"])
            rows += [_row(task, method, unit, values) for unit, values in found.items()]
        for unit, every in gaps.items():
            if len(every) > 1 and len({v.shape for v in every}) == 1:
                mean = np.mean(every, axis=0)
                rows.append(_row(f"mean of {len(every)} tasks", method, unit, mean))
    return [
        Section(
            "large_at_small_cost",
            f"A deep model at a small cost, {options.model}",
            "Points by which the deep model with exits is ahead of a full model of the depth "
            "named, at that model's cost: mean and 95% interval over seeds, in bold where it "
            "leaves out zero; a dash where the deep model cannot be so cheap.",
            ("task", "deep model", "cost by", *(f"{d} layer{'s' * (d > 1)}" for d in depths)),
            rows,
            figure if rows else None,
        ),
        Section(
            "clock",
            f"Milliseconds a text, {options.model}",
            f"Batch 1, {LENGTH} tokens, float32, median of {TIMES} calls, {jax.default_backend()} "
            f"({jax.device_count()} device(s)), jax {jax.__version__}.",
            ("", *(f"{d} layer{'s' * (d > 1)}" for d in exits)),
            [
                ["deep model, leaving there", *(f"{ms:.2f}" for ms in deep)],
                ["full model of that depth", *(f"{ms:.2f}" for ms in whole)],
            ],
        ),
    ]


def _draw(axes, task: str, method: str, folder, record, small, layers: np.ndarray) -> None:
    """A deep model's mean score within each cost, and once the shallow models' own."""
    costs = np.linspace(layers[0], 1, 40)
    deep = [
        at_cost(folder, record["replicas"].index(r), layers, costs) for r in chosen(record)
    ]  # [S, 40]
    axes.plot(costs, 100 * np.mean(deep, axis=0), color=COLOURS[method], label=paper.NAMES[method])
    if method == "early_exit":
        shallow = [[100 * e["score"] for e in r["individual"]] for r in chosen(small)]
        mean, half = mean_interval(np.asarray(shallow))
        axes.errorbar(layers, mean, half, fmt="s", ms=4, color="#e8833a", label="a full model each")
    axes.set_title(task)
    axes.set_xlabel("cost (share of the deep model's layers)")
    axes.set_ylabel(f"{record['metric']} (%)")
    axes.legend(frameon=False, fontsize=7)


def _row(task: str, method: str, unit: str, values: np.ndarray) -> list[str]:
    texts = ["-" if np.isnan(gap).any() else interval(100 * gap, sign=True) for gap in values.T]
    return [task, paper.NAMES[method], unit, *texts]


def run(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return grid.main(
        __doc__, method_cells, renderer("large_at_small_cost", sections, keep=True), argv
    )


if __name__ == "__main__":
    sys.exit(run())
