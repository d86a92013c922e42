"""Execution of training steps on devices: the pure step with vmap, shardings and jit.

Shape letters: R replica, E exit, B batch.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sweet_jax.config import Config
from sweet_jax.data.batches import Tokens
from sweet_jax.training.conflict import conflict_step
from sweet_jax.training.losses import StepMetrics
from sweet_jax.training.segment_parallel import (
    compile_groups,
    join_state,
    make_device_groups,
    split_state,
)
from sweet_jax.training.settings import Schedule, StepSettings
from sweet_jax.training.sharding import (
    batch_sharding,
    make_mesh,
    mesh_of_shardings,
    put_batch,
    replica_sharding,
    replicated_sharding,
    reshard,
    spread_update,
    state_shardings,
    warn_on_retrace,
)
from sweet_jax.training.step import Params, State, train_step

log = logging.getLogger(__name__)


class ExecutionPlan(NamedTuple):
    """Holds the compiled step of a training and how its arrays are spread over the devices.

    The step may take the state in parts that are on different devices. Everywhere else, the state
    is a single tree, and checkpoints hold this tree however the model is trained.
    """

    shardings: State  # shardings of the whole state
    to_devices: Callable[[State], Any]  # splits a state into the parts that `step` takes
    from_devices: Callable[[Any], State]  # joins the parts into a state
    # (tokens, rows, lengths) → the batch on the devices: see `put_batch`.
    place: Callable[[Tokens, np.ndarray, tuple[int, ...]], Any]
    # (step number, parts, batch) → (parts, metrics)
    step: Callable[[int, Any, Any], tuple[Any, list[StepMetrics]]]
    lag: int = 1  # number of steps that run at the same time


def check_layout(config: Config) -> None:
    """Warns about idle devices; raises UserError if a whole process would be idle."""
    for replicas in _replica_counts(config):  # the warnings are about the last, the training
        meshes = _meshes(config, replicas)
    if config.segment_parallel and len(meshes) == 1:
        log.warning(
            "segment_parallel has no effect with this number of exits and devices per process"
        )
    used = sum(mesh.size for mesh in meshes)
    if used < jax.device_count():
        log.warning(
            "%d of %d devices are used: make batch_size (%d) or the number of replicas (%d) a "
            "multiple of the number of devices to use all of them",
            used,
            jax.device_count(),
            config.batch_size,
            replicas,
        )


def devices_used(config: Config) -> int:
    """Returns the number of devices that the training uses; the others stay idle."""
    return sum(mesh.size for mesh in _meshes(config, _replica_counts(config)[-1]))


def _meshes(config: Config, replicas: int) -> list[Mesh]:
    """Returns the mesh of each group of devices that trains a number of replicas."""
    if not config.segment_parallel:
        return [make_mesh(replicas, config.batch_size)]
    groups = make_device_groups(config.exits, replicas, config.batch_size)
    return [group.mesh for group in groups]


def _replica_counts(config: Config) -> tuple[int, ...]:
    """Returns the numbers of replicas that a run places on the devices one after the other.

    A learning-rate search places all rates of one seed, and the training after it all seeds.
    """
    seeds, rates = len(config.seeds), len(config.learning_rates)
    if config.epochs == 0:  # nothing is trained, so the rates do not matter
        return (seeds,)
    return (rates, seeds) if config.searches_rate else (seeds * rates,)


def data_parallel_plan(config: Config, settings: StepSettings, state: State) -> ExecutionPlan:
    """Returns a plan whose steps spread replicas and rows over all devices."""
    replicas = len(config.replicas())
    mesh = make_mesh(replicas, config.batch_size)
    shardings = state_shardings(mesh, state, replicas)
    compiled, schedule = compile_step(settings, replicas, shardings), settings.schedule
    measured = compile_conflict(settings, replicas, shardings)

    def step(number: int, state: State, inputs: dict) -> tuple[State, list[StepMetrics]]:
        every, conflict = config.conflict_every, None
        if every and number % every == 0:  # before the step, which donates the state
            conflict = measured(state, inputs)
        state, values = compiled(state, inputs, schedule)
        return state, [values._replace(conflict=conflict)]

    return ExecutionPlan(
        shardings,
        lambda state: state,
        lambda state: state,
        lambda tokens, rows, sizes: put_batch(tokens, rows, sizes, batch_sharding(mesh, replicas)),
        step,
    )


def segment_parallel_plan(config: Config, settings: StepSettings, state: State) -> ExecutionPlan:
    """Returns a plan whose device groups each train their own segments; see segment_parallel.py."""
    replicas = len(config.replicas())
    groups = make_device_groups(settings.exits, replicas, config.batch_size)

    def split(state: State) -> list[State]:
        return split_state(state, groups, settings.exits, settings.owners)

    parts = [
        state_shardings(group.mesh, part, replicas)
        for group, part in zip(groups, split(state), strict=True)
    ]
    compiled = compile_groups(settings, groups, replicas, parts)
    return ExecutionPlan(
        join_state(parts),
        lambda state: reshard(split(state), parts),
        join_state,
        lambda tokens, rows, sizes: [
            put_batch(tokens, rows, sizes, batch_sharding(group.mesh, replicas)) for group in groups
        ],
        lambda _, states, batches: compiled(states, batches),
        lag=len(groups),
    )


def gather_params(config: Config, params: Params) -> Params:
    """Moves parameters from the devices of the groups to where `data_parallel_plan` has them."""
    if not config.segment_parallel:
        return params
    replicas = len(config.replicas())
    sharding = replica_sharding(make_mesh(replicas, config.batch_size), replicas)
    return reshard(params, jax.tree.map(lambda _: sharding, params))


def compile_step(settings: StepSettings, replicas: int, shardings: State) -> jax.stages.Wrapped:
    """Returns a compiled function (state, batch, schedule) → (state, metrics) that donates `state`.

    All arrays except the schedule's have the leading axis R. A single replica has no such axis
    because an axis of size 1 makes a step slower on a CPU. The function is traced once for each
    batch size and length. Settings that differ only in their schedule share the same function.

    Args:
      settings: constants of the step.
      replicas: number of replicas, R.
      shardings: shardings of the state, from `state_shardings`.

    """
    settings = dataclasses.replace(settings, total_steps=0, warmup_steps=0)
    leaves, structure = jax.tree.flatten(shardings)
    return _compiled_step(settings, replicas, tuple(leaves), structure)


@functools.lru_cache(maxsize=4)
def _compiled_step(
    settings: StepSettings,
    replicas: int,
    leaves: tuple[NamedSharding, ...],
    structure: jax.tree_util.PyTreeDef,
) -> jax.stages.Wrapped:
    shardings = jax.tree.unflatten(structure, leaves)
    mesh = mesh_of_shardings(shardings)

    def one(
        state: State, batch: dict[str, jax.Array], schedule: Schedule
    ) -> tuple[State, StepMetrics]:
        return train_step(dataclasses.replace(settings, traced=schedule), state, batch)

    every = jax.vmap(one, (0, 0, None)) if replicas > 1 else one

    def step(
        state: State, batch: dict[str, jax.Array], schedule: Schedule
    ) -> tuple[State, StepMetrics]:
        state, metrics = every(state, batch, schedule)
        return spread_update(state, shardings), metrics

    return jax.jit(
        warn_on_retrace(step),
        in_shardings=(shardings, batch_sharding(mesh, replicas), replicated_sharding(mesh)),
        out_shardings=(shardings, replicated_sharding(mesh)),
        donate_argnums=0,
    )


def compile_conflict(settings: StepSettings, replicas: int, shardings: State) -> Callable:
    """Returns a compiled function (state, batch) → conflict of the gradients, [R, E, E, E] float32.

    It does not change the state. It is a separate program, so that the program of the training step
    stays the same.
    """
    mesh = mesh_of_shardings(shardings)

    def one(state: State, batch: dict[str, jax.Array]) -> jax.Array:
        return conflict_step(settings, state, batch)

    return jax.jit(
        warn_on_retrace(jax.vmap(one) if replicas > 1 else one),
        in_shardings=(shardings, batch_sharding(mesh, replicas)),
        out_shardings=replicated_sharding(mesh),
    )
