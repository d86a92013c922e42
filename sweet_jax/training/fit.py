"""Training of all replicas, from the newest checkpoint where there is one.

Shape letters: R replica, E exit, B batch, N examples, M tuning rows, L length, C classes.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from sweet_jax.config import AUTO, Config
from sweet_jax.data.batches import (
    Tokens,
    bucket_lengths,
    padded_length,
    steps_per_epoch,
    training_batch_indices,
)
from sweet_jax.methods import loss_weights
from sweet_jax.models.pretrained import Checkpoint
from sweet_jax.training.checkpoint import Checkpoints, abstract_state
from sweet_jax.training.early_stopping import BestStateTracker, TuningRows
from sweet_jax.training.growth import base_config
from sweet_jax.training.initialization import ModelSpec, initial_state
from sweet_jax.training.loop import StepRange, open_log_and_progress, run_steps
from sweet_jax.training.parallel import (
    ExecutionPlan,
    data_parallel_plan,
    gather_params,
    segment_parallel_plan,
)
from sweet_jax.training.probe import LinearClassifiers, with_classifiers
from sweet_jax.training.schedule import check_interval, search_steps, training_steps
from sweet_jax.training.sharding import add_replica_axis, drop_replica_axis, reshard, to_host
from sweet_jax.training.step import Params, State, StepSettings

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of a training went, in seconds of the wall clock."""

    seconds: float
    examples: int  # rows of all replicas that were trained on
    best_steps: tuple[int, ...] = ()  # of every replica, where the best state was kept


def fit(
    config: Config,
    checkpoint: Checkpoint,
    training: ModelSpec,
    classes: int,
    tokens: Tokens,
    rows: Sequence[np.ndarray],
    workdir: Path,
    *,
    tuning: TuningRows | None = None,
    probe: LinearClassifiers | None = None,
    short: bool = False,
) -> tuple[nnx.GraphDef, Params, Timing]:
    """Trains one model for all replicas, from its newest checkpoint where there is one.

    Args:
      config: resolved.
      checkpoint: of the encoder.
      training: which model.
      classes: number of classes.
      tokens: training rows.
      rows: for each replica the indices it trains on, equally many.
      workdir: checkpoints and metrics go here.
      tuning: rows of `tokens` by which the best state is kept, with `epochs="auto"`.
      probe: what the heads begin with, for all exits of the config; None for random ones.
      short: a run of a share of the steps, to its end (`rate_search`).

    Returns:
      The model's structure, its parameters [R, ...] on the devices, and the time it took.

    Raises:
      UserError: the run that the config grows from will not do.
      StoppedError: SIGTERM came; the same call goes on where this one stopped.

    """
    seeds = [seed for seed, _ in config.replicas()]
    graphdef, state = initial_state(config, checkpoint, training, classes)
    if probe is not None:
        state = state._replace(params=_probed(config, state.params, training, probe))
    settings = step_settings(config, graphdef, training.exits, len(rows[0]), short=short)
    stop = settings.total_steps
    if config.max_steps and not short:
        stop = min(stop, config.max_steps)
    lengths = bucket_lengths(config.max_length)
    state = drop_replica_axis(state, len(seeds))
    spread = segment_parallel_plan if config.segment_parallel else data_parallel_plan
    plan = spread(config, settings, state, len(lengths))
    keeper = None
    if config.epochs == AUTO and not short:
        assert tuning is not None, "epochs=auto needs tuning rows"
        interval = check_interval(config.epochs, stop)
        keeper = BestStateTracker(config, training, graphdef, plan, tokens, tuning, state, interval)
    grouped = tokens.lengths if config.group_by_length else None

    def batch(number: int) -> tuple[Any, int]:
        picked = training_batch_indices(rows, seeds, number, config.batch_size, grouped)  # [R, B]
        length = padded_length(tokens, picked, lengths)
        return plan.place(tokens, drop_replica_axis(picked, len(seeds)), lengths), length

    with contextlib.closing(Checkpoints(workdir / "checkpoints" / training.name)) as checkpoints:
        start, state = _restored(checkpoints, plan, keeper, state)
        if start:
            log.info("%s: going on from step %d of %d", training.name, start, stop)
        began = time.perf_counter()
        epoch = steps_per_epoch(len(rows[0]), config.batch_size)
        check = 0 if keeper is None else keeper.interval
        span = StepRange(start, stop, epoch, config.checkpoint_every, check)
        examples = config.batch_size * len(seeds)

        def save(step: int, parts: Any) -> None:
            whole = plan.from_devices(parts)
            checkpoints.save(step, whole if keeper is None else keeper.saved(whole))

        with open_log_and_progress(workdir, training.name, training.exits, span, examples) as (
            metrics,
            bar,
        ):
            parts = plan.to_devices(state)
            evaluate: Callable[[int, Any], bool] | None = None
            if keeper is not None:
                keeper.log, evaluate = metrics, keeper.evaluate
                if start == 0:
                    evaluate(0, parts)
            if keeper is None or not keeper.has_ended(start):
                exits = training.exits
                parts = run_steps(plan, parts, batch, span, metrics, bar, exits, save, evaluate)
            if stop == 0:
                save(0, parts)
    best = plan.from_devices(parts).params if keeper is None else keeper.best.params
    params = add_replica_axis(gather_params(config, best), len(seeds))
    taken = max(0, _step(plan.from_devices(parts)) - start)
    steps = () if keeper is None else tuple(np.atleast_1d(keeper.best.step).tolist())
    timing = Timing(time.perf_counter() - began, taken * examples, steps)
    return graphdef, params, timing


def _restored(
    checkpoints: Checkpoints, plan: ExecutionPlan, keeper: BestStateTracker | None, state: State
) -> tuple[int, State]:
    """Returns (step, state) of the newest checkpoint, or of the start; fills the keeper."""
    if keeper is None:
        found = checkpoints.restore(abstract_state(state, plan.shardings))
        return found or (0, reshard(state, plan.shardings))
    tree = {"state": state, "best": keeper.first}
    shardings = {"state": plan.shardings, "best": keeper.shardings}
    step, tree = checkpoints.restore(abstract_state(tree, shardings)) or (
        0,
        reshard(tree, shardings),
    )
    best = tree["best"]
    keeper.best = best._replace(area=to_host(best.area), step=to_host(best.step))
    return step, tree["state"]


def _probed(
    config: Config, params: Params, training: ModelSpec, probe: LinearClassifiers
) -> Params:
    """Returns parameters [R, ...] whose heads begin with the probe's; grown exits keep theirs."""
    base = base_config(config)
    kept = base.exits if base is not None else ()
    exits = [e for e in training.exits if e not in kept]
    return with_classifiers(params, exits, probe, [config.exits.index(e) for e in exits])


def _step(state: State) -> int:
    return int(np.max(to_host(state.step)))


def step_settings(
    config: Config,
    graphdef: nnx.GraphDef,
    exits: tuple[int, ...],
    rows: int,
    *,
    short: bool = False,
) -> StepSettings:
    """The constants of the train step for `rows` training rows."""
    total = training_steps(config.epochs, rows, config.batch_size)
    if short:
        total = search_steps(total)
    base = base_config(config)
    weights = loss_weights(config.loss_weights, config.exits)
    of_exit = dict(zip(config.exits, weights, strict=True))
    return StepSettings(
        graphdef=graphdef,
        exits=exits,
        total_steps=total,
        warmup_steps=int(config.warmup_fraction * total),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        clip_by_owner=config.clipping == "owner",
        isolation=config.isolation,
        isolation_schedule=config.isolation_schedule,
        boundary_isolation=config.boundary_isolation,
        loss_weights=tuple(of_exit[e] for e in exits),
        learning_to_exit=config.learning_to_exit,
        shared_relative=config.relative == "shared",
        frozen=len(base.exits) if base else 0,
        head_learning_rate=config.head_learning_rate,
    )
