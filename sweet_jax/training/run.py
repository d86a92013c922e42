"""Training of all replicas: the initial state and the compiled step.

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
from tqdm import tqdm

from sweet_jax.config import Config, UserError
from sweet_jax.data.batches import (
    Tokens,
    bucket_lengths,
    padded_length,
    steps_per_epoch,
    training_picks,
)
from sweet_jax.models.attention import check_attention
from sweet_jax.models.early_exit import EarlyExit, owners
from sweet_jax.models.layers import derive
from sweet_jax.models.pretrained import Checkpoint, read_encoder
from sweet_jax.processes import is_first
from sweet_jax.training.checkpoint import Checkpoints, like
from sweet_jax.training.growth import base_of, grown, replicas_of
from sweet_jax.training.loop import take_steps
from sweet_jax.training.metrics import MetricsLog
from sweet_jax.training.sharding import (
    everywhere,
    moved,
    one_of_each_process,
    without_axis,
)
from sweet_jax.training.spread import gathered, spread_segments, spread_whole
from sweet_jax.training.step import (
    Params,
    State,
    StepSettings,
    new_state,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Training:
    """One model to be trained for all replicas: every exit, or one depth of Multi-Model."""

    name: str
    exits: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of a training went, in seconds of the wall clock."""

    seconds: float
    examples: int  # rows of all replicas that this process trained on


def trainings(config: Config) -> tuple[Training, ...]:
    """The models a method trains: Multi-Model one for each depth, the others one in all."""
    if config.method == "multi_model":
        return tuple(Training(f"depth_{e:02d}", (e,)) for e in config.exits)
    return (Training("exits_" + "_".join(map(str, config.exits)), config.exits),)


def make_model(
    config: Config, checkpoint: Checkpoint, exits: tuple[int, ...], classes: int, seed: int
) -> EarlyExit:
    """A model as deep as its last exit with random parameters from `seed`."""
    key = derive(jax.random.key(seed), "parameters")
    encoder = trained_as(config, checkpoint).encoder(key, config.dtype, depth=exits[-1])
    encoder.attend_by(config.attention)
    return EarlyExit(
        encoder,
        exits,
        classes,
        key,
        shared_pooler=config.pooler == "shared",
        shared_relative=config.relative == "shared",
        learning_to_exit=config.learning_to_exit,
        remat=config.remat,
        dtype=config.dtype,
    )


def trained_as(config: Config, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the dropout that a config trains it with; raises UserError where the
    attention that the config asks for does not go with it.
    """
    if config.attention_dropout == "off":
        values = dataclasses.replace(checkpoint.config, attention_probs_dropout_prob=0.0)
        checkpoint = dataclasses.replace(checkpoint, config=values)
    check_attention(
        config.attention,
        config.checkpoint,
        model_type=checkpoint.model_type,
        config=checkpoint.config,
        dtype=config.dtype,
        backend=jax.default_backend(),
    )
    return checkpoint


def initial_state(
    config: Config, checkpoint: Checkpoint, training: Training, classes: int
) -> tuple[nnx.GraphDef, State]:
    """The model's structure and the stacked state [R, ...] on the host: pretrained where the
    checkpoint has it, random by seed where not.
    """
    encoder, pooler = read_encoder(checkpoint, training.exits[-1])
    base = base_of(config)
    trunks = [None] * len(config.replicas())
    if base is not None:
        trunks = base_params(config, base, checkpoint, classes)

    def one(seed: int, rate: float, trunk: Params) -> tuple[nnx.GraphDef, State]:
        graphdef, values = nnx.split(make_model(config, checkpoint, training.exits, classes, seed))
        params = nnx.to_pure_dict(values)
        params["encoder"] = encoder
        if pooler is not None:
            for holder in [params, *params["heads"].values()]:
                if "pooler" in holder:
                    holder["pooler"] = pooler
        trained = None
        if base is not None:
            params = grown(params, trunk)
            owner_of = owners(params, training.exits)
            trained = jax.tree.map(lambda o, x: None if o in base.exits else x, owner_of, params)
        return graphdef, jax.tree.map(np.asarray, new_state(params, rate, seed, trained))

    pairs = zip(config.replicas(), trunks, strict=True)
    stacked = [one(*replica, trunk) for replica, trunk in pairs]
    return stacked[0][0], jax.tree.map(lambda *x: np.stack(x), *(state for _, state in stacked))


def base_params(config: Config, base: Config, checkpoint: Checkpoint, classes: int) -> list[Params]:
    """The trained parameters that each replica grows from, on the host.

    Raises UserError where the run that a config grows from has lost its checkpoints.
    """
    (training,) = trainings(base)
    count = len(base.replicas())
    state = without_axis(initial_state(base, checkpoint, training, classes)[1], count)
    folder = Path(config.grow_from) / "checkpoints" / training.name
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        found = checkpoints.restore(like(state, everywhere(one_of_each_process())))
    if found is None:
        raise UserError(
            f"grow_from {config.grow_from!r} has no sound checkpoint in {str(folder)!r}: run its "
            "command again, in its workdir"
        )
    params = jax.tree.map(np.asarray, found[1].params)
    return [
        jax.tree.map(lambda x, r=r: x[r], params) if count > 1 else params
        for r in replicas_of(config, base)
    ]


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
      StoppedError: SIGTERM came; the same call goes on where this one stopped.

    """
    seeds = [seed for seed, _ in config.replicas()]
    graphdef, state = initial_state(config, checkpoint, training, classes)
    settings = step_settings(config, graphdef, training.exits, len(rows[0]))
    stop = min(settings.total_steps, config.max_steps or settings.total_steps)
    checkpoints = Checkpoints(workdir / "checkpoints" / training.name)
    lengths = bucket_lengths(config.max_length)
    state = without_axis(state, len(seeds))
    spread = spread_segments if config.segment_parallel else spread_whole
    plan = spread(config, settings, state, len(lengths))
    restored = checkpoints.restore(like(state, plan.shardings))
    state = restored[1] if restored else moved(state, plan.shardings)
    start = restored[0] if restored else 0
    if start:
        log.info("%s: going on from step %d of %d", training.name, start, stop)

    def batch(number: int) -> tuple[Any, int]:
        picked = training_picks(rows, seeds, number, config.batch_size)  # [R, B]
        length = padded_length(tokens, picked, lengths)
        return plan.place(tokens, without_axis(picked, len(seeds)), lengths), length

    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(checkpoints))
        metrics = None
        if is_first():
            metrics = MetricsLog(workdir, training.name, start, training.exits)
            stack.enter_context(contextlib.closing(metrics))
        bar = tqdm(
            desc=training.name,
            total=stop * config.batch_size * len(seeds),
            initial=start * config.batch_size * len(seeds),
            unit=" examples",
            disable=not is_first(),
        )
        with bar:
            steps = range(start, stop)
            every = config.checkpoint_every
            epoch = steps_per_epoch(len(rows[0]), config.batch_size)
            parts = take_steps(
                plan.step, plan.parts(state), batch, steps, epoch, every, plan.lag, metrics,
                lambda step, parts: checkpoints.save(step, plan.whole(parts)), bar,
            )  # fmt: skip
    examples = (stop - start) * config.batch_size * len(seeds)
    params = gathered(config, plan.whole(parts).params)
    params = params if len(seeds) > 1 else jax.tree.map(lambda x: x[None], params)
    return graphdef, params, Timing(time.perf_counter() - began, examples)


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
