"""Segment-parallel training of SWEET: each group of devices trains its own segments.

No gradient crosses a segment boundary: a group passes its hidden states to the next group, updates
its parameters at once, and receives nothing back. While one group is at step t, the group before it
is already at step t + 1. After the first steps, no group waits for another, and the results match
those of a single device. Within a group, rows and replicas are spread over the devices as in data-
parallel training.

Shape letters: R replica, B batch, L length, H hidden.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sweet_jax.errors import UserError
from sweet_jax.models.early_exit import SegmentState
from sweet_jax.models.ownership import Owners, parameter_owners
from sweet_jax.training.losses import StepMetrics
from sweet_jax.training.optimizer import map_moments
from sweet_jax.training.settings import StepSettings
from sweet_jax.training.sharding import (
    batch_sharding,
    make_mesh,
    replica_sharding,
    replicated_sharding,
    spread_update,
    warn_on_retrace,
)
from sweet_jax.training.step import State, train_step_segments


class DeviceGroup(NamedTuple):
    """Describes a group of devices and the segments that they train, numbered from 0."""

    segments: tuple[int, ...]
    mesh: Mesh


def make_device_groups(exits: Sequence[int], replicas: int, batch_size: int) -> list[DeviceGroup]:
    """Divides the devices into groups of equal size, so that the busiest device gets fewest layers.

    With several processes, every group has the same number of devices in each process, so that
    hidden states never move between processes.
    """
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    local = len(devices) // jax.process_count()
    counts = [n for n in range(2, min(len(exits), local) + 1) if local % n == 0]
    # The layers of a group are spread over local / n devices of each process.
    count = min(
        counts, key=lambda n: (n * most_layers(exits, assign_segments(exits, n)), -n), default=1
    )
    grid = np.array(devices).reshape(jax.process_count(), count, -1).swapaxes(0, 1)
    return [
        DeviceGroup(segments, make_mesh(replicas, batch_size, list(group_devices.flat)))
        for segments, group_devices in zip(assign_segments(exits, count), grid, strict=True)
    ]


def assign_segments(exits: Sequence[int], groups: int) -> tuple[tuple[int, ...], ...]:
    """Returns consecutive segments for each group, so that the busiest group has fewest layers."""
    cuts = itertools.combinations(range(1, len(exits)), groups - 1)
    ways = (
        tuple(tuple(range(a, b)) for a, b in itertools.pairwise((0, *cut, len(exits))))
        for cut in cuts
    )
    return min(ways, key=lambda way: most_layers(exits, way))


def most_layers(exits: Sequence[int], way: Sequence[Sequence[int]]) -> int:
    """Returns the number of layers of the group with the most layers."""
    bounds = (0, *exits)
    return max(bounds[segments[-1] + 1] - bounds[segments[0]] for segments in way)


def split_state(
    state: State, groups: Sequence[DeviceGroup], exits: Sequence[int], owners: Owners = ()
) -> list[State]:
    """Splits a state into one part for each group: the parameters and moments that it trains.

    All other parameters and moments are None. Every part has the scalars (step, learning rate,
    seed).

    Args:
      state: the state of all parameters, none of which every exit trains.
      groups: the groups of devices.
      exits: layer numbers of the exits.
      owners: see `StepSettings`.

    Raises:
      UserError: if the state of the optimizer cannot be split.

    """
    owner_of = parameter_owners(state.params, exits, owners=owners)
    rest = map_moments(lambda _: None, state.params, state.opt_state)
    if any(leaf.ndim > np.ndim(state.step) for leaf in jax.tree.leaves(rest)):
        raise UserError(
            "the state of this optimizer cannot be split among groups of devices, because parts of "
            "it are not like the parameters: set --config.segment_parallel=False"
        )

    def of(group: DeviceGroup) -> State:
        owners = {exits[index] for index in group.segments}

        def pick(tree: Any) -> Any:
            return jax.tree.map(lambda o, x: x if o in owners else None, owner_of, tree)

        opt_state = map_moments(pick, state.params, state.opt_state)
        return state._replace(params=pick(state.params), opt_state=opt_state)

    return [of(group) for group in groups]


def join_state(states: Sequence[State]) -> State:
    """Joins the parts that `split_state` returned; the scalars come from the first one."""

    def whole(*trees: Any) -> Any:
        def present(*leaves: Any) -> Any:
            return next((x for x in leaves if x is not None), None)

        return jax.tree.map(present, *trees, is_leaf=lambda x: x is None)

    first = states[0]
    opt_state = map_moments(whole, first.params, *(s.opt_state for s in states))
    return first._replace(params=whole(*(s.params for s in states)), opt_state=opt_state)


def compile_groups(
    settings: StepSettings,
    groups: Sequence[DeviceGroup],
    replicas: int,
    group_shardings: Sequence[State],
) -> Callable[[list[State], list[dict]], tuple[list[State], list[StepMetrics]]]:
    """Returns a step of all groups (states, batches) → (states, metrics), one program per group.

    The step does not block: the programs of one group run in order, and those of different groups
    run concurrently as soon as their inputs are available.

    Args:
      settings: constants of the step.
      groups: groups of devices.
      replicas: number of replicas, R.
      group_shardings: shardings of each group's state, from `state_shardings`.

    """
    programs = [
        compile_group(settings, group, replicas, shardings)
        for group, shardings in zip(groups, group_shardings, strict=True)
    ]

    def step(states: list[State], batches: list[dict]) -> tuple[list[State], list[StepMetrics]]:
        carried, after, metrics = None, [], []
        for group, program, state, batch in zip(groups, programs, states, batches, strict=True):
            carried = jax.tree.map(lambda x, to=group.mesh: transfer(x, to), carried)
            state, values, carried = program(state, batch, carried)
            after.append(state)
            metrics.append(values)
        return after, metrics

    return step


def compile_group(
    settings: StepSettings, group: DeviceGroup, replicas: int, shardings: State
) -> jax.stages.Wrapped:
    """Returns a compiled function (state, batch, carried) → (state, metrics, carried) of one group.

    Args:
      settings: constants of the step.
      group: group of devices and its segments.
      replicas: number of replicas, R.
      shardings: shardings of the group's state, from `state_shardings`.

    """

    def one(state: State, batch: dict, carried: SegmentState | None) -> tuple:
        return train_step_segments(settings, group.segments, state, batch, carried)

    mesh, last = group.mesh, group.segments[-1] == len(settings.exits) - 1
    every = jax.vmap(one) if replicas > 1 else one

    def step(state: State, batch: dict, carried: SegmentState | None) -> tuple:
        state, metrics, carried = every(state, batch, carried)
        return spread_update(state, shardings), metrics, carried

    by_batch, by_replica = batch_sharding(mesh, replicas), replica_sharding(mesh, replicas)
    handed_on = None if last else (by_batch, by_replica)
    return jax.jit(
        warn_on_retrace(step),
        out_shardings=(shardings, replicated_sharding(mesh), handed_on),
        donate_argnums=0,
    )


def transfer(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Moves an array to another group's mesh of the same shape, with the same partition."""
    assert isinstance(x.sharding, NamedSharding)
    to = NamedSharding(mesh, x.sharding.spec)
    if x.is_fully_addressable:
        return jax.device_put(x, to)
    # Devices at the same place in two meshes belong to the same process: see make_device_groups.
    beside = dict(zip(x.sharding.mesh.devices.flat, mesh.devices.flat, strict=True))
    shards = [jax.device_put(s.data, beside[s.device]) for s in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, to, shards)
