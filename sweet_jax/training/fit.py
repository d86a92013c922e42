"""Training of all replicas, starting from the newest checkpoint if there is one.

Shape letters: R replica, E exit, B batch, N examples, M tuning rows, L length, C classes.
"""

import contextlib
import dataclasses
import logging
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.config import AUTO, Config
from sweet_jax.data.batches import append_unlabeled, steps_per_epoch, training_batch_indices
from sweet_jax.data.padding import (
    bucket_lengths,
    longest_row,
    padded_length,
    with_short,
    worth_compiling,
)
from sweet_jax.methods import loss_weights
from sweet_jax.models.ownership import Owners
from sweet_jax.optimizers import LEARNING_RATE_SCHEDULES, OPTIMIZERS
from sweet_jax.training.best_state import BestStateTracker
from sweet_jax.training.checkpoint import CheckpointMismatchError, Checkpoints, abstract_state
from sweet_jax.training.initialization import initial_state
from sweet_jax.training.job import TrainingJob
from sweet_jax.training.loop import StepRange, open_step_log, run_steps
from sweet_jax.training.losses import Distillation
from sweet_jax.training.optimizer import learning_rate_share
from sweet_jax.training.parallel import (
    ExecutionPlan,
    data_parallel_plan,
    gather_params,
    segment_parallel_plan,
)
from sweet_jax.training.probe import with_classifiers
from sweet_jax.training.schedule import check_interval, search_steps, training_steps
from sweet_jax.training.settings import StepSettings
from sweet_jax.training.sharding import add_replica_axis, drop_replica_axis, reshard, to_host
from sweet_jax.training.step import Params, State

log = logging.getLogger(__name__)

_UNLABELED = zlib.crc32(b"unlabeled")
_LOOKED_AT = 400  # maximum number of batches of the first epoch whose lengths are examined


@dataclasses.dataclass(frozen=True)
class Timing:
    """Holds the wall-clock time of a training, and the steps of the kept states."""

    seconds: float
    examples: int  # number of training rows processed, over all replicas
    best_steps: tuple[int, ...] = ()  # step of each replica's best state, if that is kept


def fit(job: TrainingJob) -> tuple[nnx.GraphDef, Params, Timing]:
    """Trains one model for all replicas, starting from its newest checkpoint if there is one.

    Returns:
      The structure of the model, its parameters [R, ...] on the devices, and the training time.

    Raises:
      UserError: if the run that the config grows from is not suitable.
      PreemptedError: if SIGTERM was received; the same call resumes where this one stopped.

    """
    config, model, replicas = job.config, job.model, len(job.rows)
    settings, state = _start(job)
    stop = settings.total_steps
    if config.max_steps and not job.short:
        stop = min(stop, config.max_steps)
    state = drop_replica_axis(state, replicas)
    make_plan = segment_parallel_plan if config.segment_parallel else data_parallel_plan
    plan = make_plan(config, settings, state)
    tracker = None
    if config.epochs == AUTO and not job.short:
        tracker = BestStateTracker(job, settings.graphdef, plan, state)
    with contextlib.closing(Checkpoints(job.workdir / "checkpoints" / model.name)) as checkpoints:
        start, state = _restore(checkpoints, plan, tracker, state)
        if start:
            log.info("%s: resuming at step %d of %d", model.name, start, stop)
        began = time.perf_counter()
        epoch = steps_per_epoch(job.rows.shape[1], config.batch_size)
        check = check_interval(stop) if tracker else 0
        rates = _learning_rates(config, settings)
        steps = StepRange(start, stop, epoch, config.checkpoint_every, check, rates)
        state = _train(job, plan, tracker, checkpoints, state, steps)
    if tracker is not None and (message := tracker.describe_kept(stop)):
        log.info(message)
    best = state.params if tracker is None else tracker.best.params
    params = add_replica_axis(gather_params(config, best), replicas)
    taken = max(0, stop - start)
    kept = () if tracker is None else tuple(np.atleast_1d(tracker.best.step).tolist())
    seconds = time.perf_counter() - began
    timing = Timing(seconds, taken * config.batch_size * replicas, kept)
    return settings.graphdef, params, timing


def _start(job: TrainingJob) -> tuple[StepSettings, State]:
    """Returns the constants of the training step, and the state [R, ...] before the first step."""
    config, exits = job.config, job.model.exits
    graphdef, state = initial_state(config, job.checkpoint, job.model, job.classes, job.base)
    grown = job.base.exits if job.base is not None else ()
    if job.probe is not None:
        new = [e for e in exits if e not in grown]
        columns = [config.exits.index(e) for e in new]
        params = with_classifiers(state.params, new, job.probe, columns)
        state = state._replace(params=params)
    rows, frozen = job.rows.shape[1], len(grown)
    settings = step_settings(
        config,
        graphdef,
        exits,
        rows,
        short=job.short,
        frozen=frozen,
        owners=tuple(job.checkpoint.family.owners.items()),
    )
    return dataclasses.replace(settings, objective=job.objective), state


def _learning_rates(config: Config, settings: StepSettings) -> np.ndarray:
    """Returns the learning rate of every step, float32 [steps, R]."""
    shares = np.asarray(learning_rate_share(jnp.arange(settings.total_steps), settings))
    return np.outer(shares, np.asarray([rate for _, rate in config.replicas()], np.float32))


def _train(
    job: TrainingJob,
    plan: ExecutionPlan,
    tracker: BestStateTracker | None,
    checkpoints: Checkpoints,
    state: State,
    steps: StepRange,
) -> State:
    """Trains; returns the last state, which is saved and, if there is a tracker, evaluated."""

    def save(step: int, parts: Any) -> None:
        whole = plan.from_devices(parts)
        checkpoints.save(step, whole if tracker is None else tracker.saved(whole))

    with open_step_log(job, steps) as step_log:
        parts = plan.to_devices(state)
        evaluate = None
        if tracker is not None:
            tracker.log, evaluate = step_log.metrics, tracker.evaluate
            if steps.start == 0:
                evaluate(0, parts)
        parts = run_steps(plan, parts, _batches(job, plan), step_log, save, evaluate)
        if steps.stop == 0:
            save(0, parts)
    return plan.from_devices(parts)


def _batches(job: TrainingJob, plan: ExecutionPlan) -> Callable[[int], tuple[Any, int]]:
    """Returns a function of a step's number that returns (batch on the devices, its length).

    If the job has unlabeled rows, a batch has as many of them as labeled ones.
    """
    config, tokens = job.config, job.tokens
    seeds = [seed for seed, _ in config.replicas()]
    sources = [(list(job.rows), seeds)]
    if job.unlabeled is not None:
        others = len(tokens) + np.arange(len(job.unlabeled))
        tokens = append_unlabeled(tokens, job.unlabeled)
        # The other seeds give another order than the labeled rows have, even if there are as many.
        sources.append(([others] * len(seeds), [seed ^ _UNLABELED for seed in seeds]))
    grouped = tokens.lengths if config.group_by_length else None

    def draw(number: int) -> np.ndarray:
        indices = [
            training_batch_indices(rows, orders, number, config.batch_size, grouped)
            for rows, orders in sources
        ]
        return np.concatenate(indices, axis=1)  # [R, B], or twice as many

    lengths = _lengths(config, job.rows.shape[1], lambda step: longest_row(tokens, draw(step)))

    def batch(number: int) -> tuple[Any, int]:
        rows = draw(number)
        length = padded_length(tokens, rows, lengths)
        return plan.place(tokens, drop_replica_axis(rows, len(seeds)), lengths), length

    return batch


def _lengths(config: Config, rows: int, longest: Callable[[int], int]) -> tuple[int, ...]:
    """Returns the lengths that batches are padded to.

    Args:
      config: config of the run.
      rows: number of training rows of a replica.
      longest: function of a step's number that returns the number of tokens in the longest row of
        its batch.

    """
    lengths = bucket_lengths(config.max_length)
    # Short runs of the learning-rate search count the steps of the whole training too, so that they
    # share its compiled programs.
    steps = training_steps(config.epochs, rows, config.batch_size)
    if config.max_steps:
        steps = min(steps, config.max_steps)
    epoch = range(steps_per_epoch(rows, config.batch_size))[:_LOOKED_AT]
    tokens = np.asarray([longest(step) for step in epoch])
    if jax.default_backend() == "cpu":
        return with_short(lengths, tokens, steps)
    return worth_compiling(lengths, tokens, steps * config.batch_size * len(config.replicas()))


def _restore(
    checkpoints: Checkpoints, plan: ExecutionPlan, tracker: BestStateTracker | None, state: State
) -> tuple[int, State]:
    """Returns the step and state to start from: the newest checkpoint's, or the initial ones.

    Also sets the best state of the tracker.
    """
    if tracker is None:
        restored = _restore_newest(checkpoints, abstract_state(state, plan.shardings))
        return restored or (0, reshard(state, plan.shardings))
    tree = {"state": state, "best": tracker.best}
    shardings = {"state": plan.shardings, "best": tracker.shardings}
    restored = _restore_newest(checkpoints, abstract_state(tree, shardings))
    step, tree = restored or (0, reshard(tree, shardings))
    best = tree["best"]
    tracker.best = best._replace(area=to_host(best.area), step=to_host(best.step))
    return step, tree["state"]


def _restore_newest(checkpoints: Checkpoints, like: Any) -> tuple[int, Any] | None:
    """Returns `checkpoints.restore(like)`, also for checkpoints of earlier versions.

    These call the optimizer state "adam", since they had no other optimizer.

    like: a state, or a dict with the state under "state".

    Raises CheckpointMismatchError if the checkpoint has another structure than either.
    """
    try:
        return checkpoints.restore(like)
    except CheckpointMismatchError:
        alone = isinstance(like, State)
        own = like if alone else like["state"]
        older = {"adam" if k == "opt_state" else k: v for k, v in own._asdict().items()}
        restored = checkpoints.restore(older if alone else like | {"state": older})
        assert restored is not None, "there is a checkpoint, which did not match"
        step, tree = restored
        values = tree if alone else tree["state"]
        state = State(**{"opt_state" if k == "adam" else k: v for k, v in values.items()})
        return step, state if alone else tree | {"state": state}


def step_settings(
    config: Config,
    graphdef: nnx.GraphDef,
    exits: tuple[int, ...],
    rows: int,
    *,
    short: bool = False,
    frozen: int = 0,
    owners: Owners = (),
) -> StepSettings:
    """Returns the constants of the training step.

    Args:
      config: resolved config.
      graphdef: structure of the model.
      exits: layer numbers of the exits.
      rows: number of training rows.
      short: see `TrainingJob`.
      frozen, owners: see `StepSettings`.

    """
    total = training_steps(config.epochs, rows, config.batch_size)
    if short:
        total = search_steps(total)
    weights = loss_weights(config.loss_weights, config.exits)
    of_exit = dict(zip(config.exits, weights, strict=True))
    distillation = None
    if config.distillation_weight:
        distillation = Distillation(config.distillation_weight, config.distillation_temperature)
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
        last_exit_first=config.last_exit_first,
        distillation=distillation,
        learning_to_exit=config.learning_to_exit,
        shared_relative=config.relative == "shared",
        owners=owners,
        frozen=frozen,
        head_learning_rate=config.head_learning_rate,
        layer_decay=config.layer_decay,
        optimizer=OPTIMIZERS[config.optimizer],
        learning_rate_schedule=LEARNING_RATE_SCHEDULES[config.learning_rate_schedule],
    )
