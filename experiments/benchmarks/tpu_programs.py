"""Compiles programs of this package for TPUs that are not present, and reads their costs.

The TPU's own compiler (libtpu, extra tpu-aot) compiles them ahead of time for a described topology
(jax.experimental.topologies); nothing runs. This module sets environment variables that libtpu
reads, so import it before any module that may load libtpu.

Shape letters: R replica, B batch, L length, H hidden.
"""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this is no cloud machine
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is shared
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from experiments.benchmarks.shapes import LEARNING_RATE, Shape, Size
from experiments.benchmarks.tpu_collectives import Collective, collectives
from experiments.benchmarks.tpu_loops import repeated_flops
from sweet_jax.config import Config
from sweet_jax.training.checkpoint import abstract_state
from sweet_jax.training.evaluation import compile_evaluation
from sweet_jax.training.parallel import compile_step
from sweet_jax.training.segment_parallel import DeviceGroup, compile_group, split_state
from sweet_jax.training.settings import StepSettings, step_settings
from sweet_jax.training.sharding import (
    batch_sharding,
    make_mesh,
    replica_sharding,
    state_shardings,
)
from sweet_jax.training.step import State, init_state

_ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}
# With this, a device is a chip, as on real machines; else each of the two cores of a v4 is one.
_CHIPS = {"v4": {"chip_config_name": "megacore"}}


class Compiled(NamedTuple):
    """Holds the compiler's estimates of a program, per chip.

    The collectives, except for those in `exchanged`, are between chips that share a replica, and so
    over the rows of a batch. Lists have the number of elements of each array.

    Attributes:
      seconds: processor seconds of tracing and compiling.
      arguments, temporaries: bytes.
      flops: FLOPs, with all iterations of loops.
      bytes_accessed: bytes read and written, with one iteration of each loop.
      collectives: number of collectives.
      sent: least bytes that a chip sends for them.
      reduced: arrays that are summed.
      gathered: arrays that are gathered from parts.
      transposed: arrays that are split along another axis.
      passed: parts of sums that are passed from device to device.
      exchanged: arrays of collectives between replicas.
      text: the compiled program.

    """

    seconds: float
    arguments: int
    temporaries: int
    flops: float
    bytes_accessed: float
    collectives: int
    sent: float
    reduced: list[int]
    gathered: list[int]
    transposed: list[int]
    passed: list[int]
    exchanged: list[int]
    text: str


def describe_devices(topology: str) -> list[Any]:
    """Returns descriptions of the chips of a topology such as "v5e:2x2"."""
    generation = topology.partition(":")[0]
    os.environ["TPU_ACCELERATOR_TYPE"] = _ACCELERATORS[generation]
    chips = _CHIPS.get(generation, {})
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **chips)
    return list(described.devices)


class Plan(NamedTuple):
    """Holds a model and the settings of its training, without arrays."""

    config: Config
    settings: StepSettings
    state: State  # of one replica, as shapes and dtypes
    size: Size


def plan_training(shape: Shape, method: str, size: Size, dtype: str, replicas: int = 1) -> Plan:
    """Returns the plan of a run on batches of a size."""
    graphdef, values = nnx.split(nnx.eval_shape(lambda: shape.model(0, dtype)))
    config = Config(
        method=method,
        exits=shape.exits,
        batch_size=size.batch,
        epochs=1000,
        dtype=dtype,
        seeds=tuple(range(replicas)),
    ).resolved()
    state = jax.eval_shape(lambda p: init_state(p, LEARNING_RATE, 0), nnx.to_pure_dict(values))
    return Plan(config, step_settings(config, graphdef, shape.exits, rows=1000), state, size)


def compile_training_step(
    shape: Shape, method: str, size: Size, dtype: str, devices: Sequence[Any], replicas: int = 1
) -> Compiled:
    """Compiles a training step of all replicas for devices that need not exist."""
    plan = plan_training(shape, method, size, dtype, replicas)
    mesh = make_mesh(replicas, size.batch, devices)
    state, shardings = _abstract_state(plan.state, mesh, replicas)
    batch = _abstract(_batch(size), batch_sharding(mesh, replicas), replicas)
    program = compile_step(plan.settings, replicas, shardings)
    return compile_program(program, mesh.devices, state, batch, plan.settings.schedule)


def compile_evaluation_step(
    shape: Shape, size: Size, dtype: str, devices: Sequence[Any], *, features: bool = False
) -> Compiled:
    """Compiles the evaluation of one replica; with `features`, as for the probe."""
    plan = plan_training(shape, "sweet", size, dtype)
    mesh = make_mesh(1, size.batch, devices)
    program = compile_evaluation(plan.config, plan.settings.graphdef, mesh, features=features)
    params = _abstract(plan.state.params, replica_sharding(mesh), 1, axis=True)
    batch = _abstract(_batch(size), batch_sharding(mesh), 1, axis=True)
    return compile_program(program, mesh.devices, params, batch, np.zeros(1, np.int32))


def compile_segment_groups(
    shape: Shape, size: Size, dtype: str, devices: Sequence[Any]
) -> list[Compiled]:
    """Compiles the programs of segment-parallel training, with a group of devices per exit."""
    plan, count = plan_training(shape, "sweet", size, dtype), len(devices) // len(shape.exits)
    groups = [
        DeviceGroup((index,), make_mesh(1, size.batch, devices[index * count :][:count]))
        for index in range(len(shape.exits))
    ]
    compiled, carried = [], None
    for group, part in zip(groups, split_state(plan.state, groups, shape.exits), strict=True):
        mesh = group.mesh
        by_state, by_batch = replica_sharding(mesh, 1), batch_sharding(mesh, 1)
        state, shardings = _abstract_state(part, mesh)
        batch = _abstract(_batch(size), by_batch)
        if carried is not None:
            carried = (_abstract(carried[0], by_batch), _abstract(carried[1], by_state))
        program = compile_group(plan.settings, group, 1, shardings)
        compiled.append(compile_program(program, mesh.devices, state, batch, carried))
        carried = jax.eval_shape(program, state, batch, carried)[2]
    return compiled


def compile_program(program: Any, devices: np.ndarray, *arguments: Any) -> Compiled:
    """Compiles a jitted function for arguments on a mesh of devices [replica, data]."""
    start = time.process_time()
    compiled = program.lower(*arguments).compile()
    return read_estimates(compiled, time.process_time() - start, devices)


def read_estimates(program: Any, seconds: float, devices: np.ndarray) -> Compiled:
    """Returns the compiler's estimates of a program on a mesh of devices [replica, data].

    seconds: processor seconds of tracing and compiling.
    """
    memory, text = program.memory_analysis(), program.as_text()
    cost = program.cost_analysis() or {}  # XLA for GPUs has none
    rows = {frozenset(row.tolist()) for row in np.arange(devices.size).reshape(devices.shape)}
    inside: list[Collective] = []
    across: list[Collective] = []
    for each in collectives(text):
        shares_replica = all(any(group <= row for row in rows) for group in each.groups)
        (inside if shares_replica else across).append(each)

    def counts(*kinds: str) -> list[int]:
        return [count for each in inside if each.kind in kinds for count in each.counts]

    return Compiled(
        seconds,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        cost.get("flops", math.nan) + repeated_flops(text),
        cost.get("bytes accessed", math.nan),
        len(inside),
        sum(each.sent() for each in inside),
        counts("all-reduce", "reduce-scatter"),
        counts("all-gather"),
        counts("all-to-all"),
        counts("collective-permute"),
        [count for each in across for count in each.counts],
        text,
    )


def _batch(size: Size) -> dict[str, jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct(tuple(size), np.int32)
    return {
        "input_ids": ids,
        "token_type_ids": ids,
        "mask": jax.ShapeDtypeStruct(tuple(size), bool),
        "labels": jax.ShapeDtypeStruct((size.batch,), np.int32),
        "row_mask": jax.ShapeDtypeStruct((size.batch,), bool),
    }


def _abstract_state(state: State, mesh: Mesh, replicas: int = 1) -> tuple[State, State]:
    """Returns the shapes of a state on a mesh, and its shardings."""
    state = _abstract(state, replica_sharding(mesh, replicas), replicas)
    shardings = state_shardings(mesh, state, replicas)
    return abstract_state(state, shardings), shardings


def _abstract(tree: Any, sharding: NamedSharding, replicas: int = 1, *, axis: bool = False) -> Any:
    """Returns the shapes of a tree with a sharding.

    axis: whether there is an axis R even for one replica.
    """
    leading = (replicas,) if axis or replicas > 1 else ()
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(leading + x.shape, x.dtype, sharding=sharding), tree
    )
