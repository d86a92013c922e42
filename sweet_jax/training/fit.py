"""Training of all replicas, starting from the newest checkpoint if there is one.

Shape letters: R replica, E exit, B batch, N examples, M tuning rows, L length, C classes.
"""

import contextlib
import dataclasses
import logging
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.config import AUTO, Config
from sweet_jax.data.batches import rows_of_steps, steps_per_epoch
from sweet_jax.training.best_state import BestStateTracker
from sweet_jax.training.checkpoint import Checkpoints
from sweet_jax.training.initialization import initial_state
from sweet_jax.training.input_pipeline import training_batches
from sweet_jax.training.job import TrainingJob
from sweet_jax.training.loop import StepRange, open_step_log, run_steps
from sweet_jax.training.optimizer import learning_rate_share
from sweet_jax.training.parallel import (
    ExecutionPlan,
    data_parallel_plan,
    gather_params,
    segment_parallel_plan,
)
from sweet_jax.training.probe import with_classifiers
from sweet_jax.training.resumption import restore_state
from sweet_jax.training.schedule import check_interval
from sweet_jax.training.settings import StepSettings, step_settings
from sweet_jax.training.sharding import add_replica_axis, drop_replica_axis
from sweet_jax.training.step import Params, State

log = logging.getLogger(__name__)


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
        start, state = restore_state(checkpoints, plan, tracker, state)
        if start:
            log.info("%s: resuming at step %d of %d", model.name, start, stop)
        began = time.perf_counter()
        epoch = steps_per_epoch(job.rows.shape[1], config.batch_size)
        check = check_interval(stop) if tracker else 0
        rates = _learning_rates(config, settings)
        rows = replicas * rows_of_steps(
            job.rows.shape[1], stop, config.batch_size, grouped=config.group_by_length
        )
        steps = StepRange(start, stop, epoch, config.checkpoint_every, rows, check, rates)
        state = _train(job, plan, tracker, checkpoints, state, steps)
    if tracker is not None and (message := tracker.describe_kept(stop)):
        log.info(message)
    best = state.params if tracker is None else tracker.best.params
    params = add_replica_axis(gather_params(config, best), replicas)
    kept = () if tracker is None else tuple(np.atleast_1d(tracker.best.step).tolist())
    seconds = time.perf_counter() - began
    timing = Timing(seconds, int(rows[start:].sum()), kept)
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
        parts = run_steps(plan, parts, training_batches(job, plan), step_log, save, evaluate)
        if steps.stop == 0:
            save(0, parts)
    return plan.from_devices(parts)
