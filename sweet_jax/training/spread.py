"""How the steps of a training are spread over devices: vmap, shardings and jit of the pure step.

Shape letters: R replica, E exit, B batch.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sweet_jax.config import Config
from sweet_jax.data.batches import Tokens
from sweet_jax.training.conflict import conflict_step
from sweet_jax.training.losses import Metrics
from sweet_jax.training.segments import compile_groups, join, make_groups, split
from sweet_jax.training.sharding import (
    by_replica,
    by_row,
    make_mesh,
    placed,
    replicated,
    resharded,
    traced_at_most,
    traced_once,
)
from sweet_jax.training.step import Params, Schedule, State, StepSettings, train_step

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """How the steps of a training are spread over the devices.

    A program may take the state in parts, each on devices of its own; outside of it the state is
    one tree, which is what checkpoints hold whichever way it is trained.
    """

    shardings: State  # of the arrays of the whole state
    parts: Callable[[State], Any]  # what `step` takes of a state
    whole: Callable[[Any], State]  # the other way
    # (tokens, rows, lengths) → the batch on the devices: see `placed`.
    place: Callable[[Tokens, np.ndarray, tuple[int, ...]], Any]
    step: Callable[[int, Any, Any], tuple[Any, list[Metrics]]]  # of (number, parts, batch)
    lag: int = 1  # steps that are under way at the same time


def check_devices(config: Config) -> None:
    """Warns of devices that stay idle; raises UserError where a process would."""
    replicas, rows = len(config.replicas()), config.batch_size
    meshes = [make_mesh(replicas, rows)]
    if config.segment_parallel:
        meshes = [group.mesh for group in make_groups(config.exits, replicas, rows)]
        if len(meshes) == 1:
            log.warning("segment_parallel has no effect with so few devices a process, or exits")
    used = sum(mesh.size for mesh in meshes)
    if used < jax.device_count():
        log.warning(
            "%d of %d devices are used: make batch_size (%d) or the number of replicas (%d) a "
            "multiple of the devices to use all",
            used,
            jax.device_count(),
            rows,
            replicas,
        )


def spread_whole(config: Config, settings: StepSettings, state: State, lengths: int) -> Plan:
    """All devices take each step together: replicas and rows are spread over them."""
    replicas = len(config.replicas())
    mesh = make_mesh(replicas, config.batch_size)
    compiled, schedule = compile_step(settings, replicas, mesh), settings.schedule
    measured = compile_conflict(settings, replicas, mesh, lengths)

    def step(number: int, state: State, inputs: dict) -> tuple[State, list[Metrics]]:
        every, conflict = config.conflict_every, None
        if every and number % every == 0:  # first: the step takes the state's memory
            conflict = measured(state, inputs)
        state, values = compiled(state, inputs, schedule)
        return state, [values._replace(conflict=conflict)]

    return Plan(
        jax.tree.map(lambda _: by_replica(mesh, replicas), state),
        lambda state: state,
        lambda state: state,
        lambda tokens, rows, sizes: placed(tokens, rows, sizes, by_row(mesh, replicas)),
        step,
    )


def spread_segments(config: Config, settings: StepSettings, state: State, lengths: int) -> Plan:
    """Each group of devices steps its own segments, see segments.py."""
    replicas = len(config.replicas())
    groups = make_groups(settings.exits, replicas, config.batch_size)
    compiled = compile_groups(settings, groups, replicas, lengths)
    parts = [
        jax.tree.map(lambda _, g=group: by_replica(g.mesh, replicas), part)
        for group, part in zip(groups, split(state, groups, settings.exits), strict=True)
    ]
    return Plan(
        join(parts),
        lambda state: resharded(split(state, groups, settings.exits), parts),
        join,
        lambda tokens, rows, sizes: [
            placed(tokens, rows, sizes, by_row(group.mesh, replicas)) for group in groups
        ],
        lambda _, states, batches: compiled(states, batches),
        lag=len(groups),
    )


def gathered(config: Config, params: Params) -> Params:
    """The parameters where `spread_whole` has them, from the devices of groups."""
    if not config.segment_parallel:
        return params
    replicas = len(config.replicas())
    sharding = by_replica(make_mesh(replicas, config.batch_size), replicas)
    return resharded(params, jax.tree.map(lambda _: sharding, params))


def compile_step(settings: StepSettings, replicas: int, mesh: Mesh) -> Callable:
    """(state, batch, schedule) → (state, metrics), jitted, sharded, the old state donated.

    All arrays but the schedule's have the leading axis R, but a single replica's have none: on a
    CPU an axis of size 1 makes a step slower. Traced once for each size and length of a batch. The
    same function is returned for settings that differ in their schedule only.
    """
    settings = dataclasses.replace(settings, total_steps=0, warmup_steps=0)
    return _compiled_step(settings, replicas, mesh)


@functools.lru_cache(maxsize=4)
def _compiled_step(settings: StepSettings, replicas: int, mesh: Mesh) -> Callable:
    def one(state: State, batch: dict[str, jax.Array], schedule: Schedule) -> tuple[State, Metrics]:
        return train_step(dataclasses.replace(settings, traced=schedule), state, batch)

    by_state, by_batch = by_replica(mesh, replicas), by_row(mesh, replicas)
    return jax.jit(
        traced_once(jax.vmap(one, (0, 0, None)) if replicas > 1 else one),
        in_shardings=(by_state, by_batch, replicated(mesh)),
        out_shardings=(by_state, replicated(mesh)),
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
        out_shardings=replicated(mesh),
    )
