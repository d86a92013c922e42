"""Training of all replicas, from the newest checkpoint where there is one.

Shape letters: R replica, E exit, B batch, N examples, L length, C classes.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from sweet_jax.config import Config
from sweet_jax.data.batches import (
    Tokens,
    bucket_lengths,
    padded_length,
    steps_per_epoch,
    training_picks,
)
from sweet_jax.models.pretrained import Checkpoint
from sweet_jax.training.checkpoint import Checkpoints, like
from sweet_jax.training.growth import base_of
from sweet_jax.training.initial import Training, initial_state
from sweet_jax.training.loop import Span, shown, take_steps
from sweet_jax.training.sharding import resharded, without_axis
from sweet_jax.training.spread import gathered, spread_segments, spread_whole
from sweet_jax.training.step import Params, StepSettings

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of a training went, in seconds of the wall clock."""

    seconds: float
    examples: int  # rows of all replicas that were trained on


def fit(
    config: Config,
    checkpoint: Checkpoint,
    training: Training,
    classes: int,
    tokens: Tokens,
    rows: Sequence[np.ndarray],
    workdir: Path,
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

    Returns:
      The model's structure, its parameters [R, ...] on the devices, and the time it took.

    Raises:
      UserError: the run that the config grows from will not do.
      StoppedError: SIGTERM came; the same call goes on where this one stopped.

    """
    seeds = [seed for seed, _ in config.replicas()]
    graphdef, state = initial_state(config, checkpoint, training, classes)
    settings = step_settings(config, graphdef, training.exits, len(rows[0]))
    stop = min(settings.total_steps, config.max_steps or settings.total_steps)
    lengths = bucket_lengths(config.max_length)
    state = without_axis(state, len(seeds))
    spread = spread_segments if config.segment_parallel else spread_whole
    plan = spread(config, settings, state, len(lengths))

    def batch(number: int) -> tuple[Any, int]:
        picked = training_picks(rows, seeds, number, config.batch_size)  # [R, B]
        length = padded_length(tokens, picked, lengths)
        return plan.place(tokens, without_axis(picked, len(seeds)), lengths), length

    with contextlib.closing(Checkpoints(workdir / "checkpoints" / training.name)) as checkpoints:
        start, state = checkpoints.restore(like(state, plan.shardings)) or (
            0,
            resharded(state, plan.shardings),
        )
        if start:
            log.info("%s: going on from step %d of %d", training.name, start, stop)
        began = time.perf_counter()
        epoch = steps_per_epoch(len(rows[0]), config.batch_size)
        span = Span(start, stop, epoch, config.checkpoint_every)
        examples = config.batch_size * len(seeds)
        with shown(workdir, training.name, training.exits, span, examples) as (metrics, bar):
            parts = take_steps(
                plan,
                plan.parts(state),
                batch,
                span,
                metrics,
                bar,
                training.exits,
                lambda step, parts: checkpoints.save(step, plan.whole(parts)),
            )
    params = gathered(config, plan.whole(parts).params)
    params = params if len(seeds) > 1 else jax.tree.map(lambda x: x[None], params)
    timing = Timing(time.perf_counter() - began, (stop - start) * examples)
    return graphdef, params, timing


def step_settings(
    config: Config, graphdef: nnx.GraphDef, exits: tuple[int, ...], rows: int
) -> StepSettings:
    """The constants of the train step for `rows` training rows."""
    total = steps_per_epoch(rows, config.batch_size) * config.epochs
    base = base_of(config)
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
        learning_to_exit=config.learning_to_exit,
        shared_relative=config.relative == "shared",
        frozen=len(base.exits) if base else 0,
    )
