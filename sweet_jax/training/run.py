"""Training of all replicas: the initial state and the compiled step.

Shape letters: R replica, E exit, B batch, N examples, L length, C classes.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from sweet_jax.config import Config
from sweet_jax.data.batches import (
    Tokens,
    bucket_lengths,
    steps_per_epoch,
    training_batch,
)
from sweet_jax.models.attention import check_attention
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.layers import derive
from sweet_jax.models.pretrained import Checkpoint, read_encoder
from sweet_jax.training.checkpoint import Checkpoints, like
from sweet_jax.training.conflict import conflict_step
from sweet_jax.training.loop import take_steps
from sweet_jax.training.losses import Metrics
from sweet_jax.training.metrics import MetricsLog
from sweet_jax.training.sharding import (
    by_replica,
    by_row,
    make_mesh,
    traced_at_most,
    without_axis,
)
from sweet_jax.training.step import (
    Params,
    State,
    StepSettings,
    new_state,
    train_step,
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

    def one(seed: int, rate: float) -> tuple[nnx.GraphDef, State]:
        graphdef, values = nnx.split(make_model(config, checkpoint, training.exits, classes, seed))
        params = nnx.to_pure_dict(values)
        params["encoder"] = encoder
        if pooler is not None:
            for holder in [params, *params["heads"].values()]:
                if "pooler" in holder:
                    holder["pooler"] = pooler
        return graphdef, jax.tree.map(np.asarray, new_state(params, rate, seed))

    stacked = [one(seed, rate) for seed, rate in config.replicas()]
    return stacked[0][0], jax.tree.map(lambda *x: np.stack(x), *(state for _, state in stacked))


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
    mesh = make_mesh(len(seeds), config.batch_size)
    graphdef, state = initial_state(config, checkpoint, training, classes)
    settings = step_settings(config, graphdef, training.exits, len(rows[0]))
    stop = min(settings.total_steps, config.max_steps or settings.total_steps)
    checkpoints = Checkpoints(workdir / "checkpoints" / training.name)
    state = without_axis(state, len(seeds))
    placed = by_replica(mesh, len(seeds))
    restored = checkpoints.restore(like(state, placed))
    state = restored[1] if restored else jax.device_put(state, placed)
    start = restored[0] if restored else 0
    if start:
        log.info("%s: going on from step %d of %d", training.name, start, stop)
    lengths = bucket_lengths(config.max_length)
    compiled = compile_step(settings, len(seeds), mesh, len(lengths))
    measured = compile_conflict(settings, len(seeds), mesh, len(lengths))

    def step(number: int, state: State, inputs: dict) -> tuple[State, Metrics]:
        every, conflict = config.conflict_every, None
        if every and number % every == 0:  # first: the step takes the state's memory
            conflict = measured(state, inputs)
        state, values = compiled(state, inputs)
        return state, values._replace(conflict=conflict)

    def batch(number: int) -> dict[str, jax.Array]:
        host = training_batch(tokens, rows, seeds, number, config.batch_size, lengths)
        return jax.device_put(without_axis(host, len(seeds)), by_row(mesh, len(seeds)))

    metrics = MetricsLog(workdir, training.name, start, training.exits)
    began = time.perf_counter()
    with contextlib.closing(metrics), contextlib.closing(checkpoints):
        bar = tqdm(
            desc=training.name,
            total=stop * config.batch_size * len(seeds),
            initial=start * config.batch_size * len(seeds),
            unit=" examples",
        )
        with bar:
            steps = range(start, stop)
            every = config.checkpoint_every
            epoch = steps_per_epoch(len(rows[0]), config.batch_size)
            state = take_steps(step, state, batch, steps, epoch, every, metrics, checkpoints, bar)
    examples = (stop - start) * config.batch_size * len(seeds)
    params = state.params if len(seeds) > 1 else jax.tree.map(lambda x: x[None], state.params)
    return graphdef, params, Timing(time.perf_counter() - began, examples)


def step_settings(
    config: Config, graphdef: nnx.GraphDef, exits: tuple[int, ...], rows: int
) -> StepSettings:
    """The constants of the train step for `rows` training rows."""
    total = steps_per_epoch(rows, config.batch_size) * config.epochs
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
    )


def compile_step(settings: StepSettings, replicas: int, mesh: Mesh, lengths: int) -> Callable:
    """(state, batch) → (state, metrics), jitted, sharded, the old state donated.

    All arrays have the leading axis R, but a single replica's have none: on a CPU an axis of size 1
    makes a step slower. Traced at most once per batch length, which is asserted.
    """

    def one(state: State, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        return train_step(settings, state, batch)

    by_state, by_batch = by_replica(mesh, replicas), by_row(mesh, replicas)
    return jax.jit(
        traced_at_most(jax.vmap(one) if replicas > 1 else one, lengths),
        in_shardings=(by_state, by_batch),
        out_shardings=(by_state, by_state),
        donate_argnums=0,
    )


def compile_conflict(settings: StepSettings, replicas: int, mesh: Mesh, lengths: int) -> Callable:
    """(state, batch) → the conflict of the step's gradients, [R, E, E, E], placed as the step is.

    The state is left as it is. A program of its own: the training step's does not change by it.
    """

    def one(state: State, batch: dict[str, jax.Array]) -> jax.Array:
        return conflict_step(settings, state, batch)

    by_state, by_batch = by_replica(mesh, replicas), by_row(mesh, replicas)
    return jax.jit(
        traced_at_most(jax.vmap(one) if replicas > 1 else one, lengths),
        in_shardings=(by_state, by_batch),
        out_shardings=by_state,
    )
