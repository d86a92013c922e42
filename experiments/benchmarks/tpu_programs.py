"""The programs of this package, compiled for TPUs that are not there, and what the compiler says.

The compiler is the TPU's own (libtpu, extra tpu-aot), ahead of time, for a described topology
(jax.experimental.topologies); nothing runs. Importing this module sets what libtpu reads of the
environment, so it comes before anything else that may load libtpu.

Shape letters: R replica, B batch, L length, H hidden.
"""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no cloud machine to ask
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to be shared
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from experiments.benchmarks.shapes import RATE, Shape, Size
from experiments.benchmarks.tpu_loops import flops_of_repeats, run_counts
from sweet_jax.config import Config
from sweet_jax.training.checkpoint import abstract_state
from sweet_jax.training.evaluation import compile_evaluation
from sweet_jax.training.fit import step_settings
from sweet_jax.training.parallel import compile_step
from sweet_jax.training.segment_parallel import DeviceGroup, compile_group, split_state
from sweet_jax.training.settings import StepSettings
from sweet_jax.training.sharding import (
    batch_sharding,
    make_mesh,
    replica_sharding,
    state_shardings,
)
from sweet_jax.training.step import State, init_state

_ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}
# A device is a chip, as on the machines: unless told, v4's two cores are two devices.
_CHIPS = {"v4": {"chip_config_name": "megacore"}}


class Compiled(NamedTuple):
    """Holds the compiler's estimates of a program, for each chip."""

    seconds: float  # of a core, for tracing and compiling
    arguments: int  # bytes
    temporaries: int  # bytes
    flops: float  # of every run of a loop
    bytes_accessed: float  # with one run of each loop
    collectives: int  # over the rows of a batch
    sent: float  # bytes that these make each chip send, at least
    reduced: list[int]  # numbers in each array that is summed over the rows of a batch
    gathered: list[int]  # in each that is gathered from parts
    transposed: list[int]  # in each that is split along another axis than before
    passed: list[int]  # in each part of a sum that goes from device to device
    exchanged: list[int]  # in each array of a collective that joins replicas
    text: str


class Collective(NamedTuple):
    """Holds one collective operation of a compiled program."""

    kind: str  # as in the text; where a sum is scattered, reduce-scatter
    groups: set[frozenset[int]]  # of devices, numbered along the mesh
    counts: list[int]  # numbers in each array, of which a device then has all or its part
    bytes: int  # of these
    times: int = 1  # that it runs, in a loop

    def sent(self) -> float:
        """Returns the bytes that a device sends at least, to all others of its group in turn."""
        if self.kind == "collective-permute":
            return self.bytes * self.times
        others = max(map(len, self.groups)) - 1
        passes = 2 if self.kind == "all-reduce" else 1
        return self.bytes * self.times * passes * others / (others + 1)


def devices_of(topology: str) -> list[Any]:
    """Returns the devices of a described topology such as "v5e:2x2", one for each chip."""
    generation = topology.partition(":")[0]
    os.environ["TPU_ACCELERATOR_TYPE"] = _ACCELERATORS[generation]
    chips = _CHIPS.get(generation, {})
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **chips)
    return list(described.devices)


class Plan(NamedTuple):
    """Holds a model and the settings of its training, all without arrays."""

    config: Config
    settings: StepSettings
    state: State  # of one replica, shapes
    size: Size


def plan_training(shape: Shape, method: str, size: Size, dtype: str, replicas: int = 1) -> Plan:
    """Returns the plan of a run on batches of `size` rows and tokens."""
    graphdef, values = nnx.split(nnx.eval_shape(lambda: shape.model(0, dtype)))
    config = Config(
        method=method,
        exits=shape.exits,
        batch_size=size.batch,
        epochs=1000,
        dtype=dtype,
        seeds=tuple(range(replicas)),
    ).resolved()
    state = jax.eval_shape(lambda p: init_state(p, RATE, 0), nnx.to_pure_dict(values))
    return Plan(config, step_settings(config, graphdef, shape.exits, rows=1000), state, size)


def compile_training_step(
    shape: Shape, method: str, size: Size, dtype: str, devices: Sequence[Any], replicas: int = 1
) -> Compiled:
    """Compiles a training step of `size` rows and tokens for devices that need not exist."""
    plan = plan_training(shape, method, size, dtype, replicas)
    mesh = make_mesh(replicas, size.batch, devices)
    state, shardings = _abstract_state(plan.state, mesh, replicas)
    batch = _abstract(_batch(size), batch_sharding(mesh, replicas), replicas)
    program = compile_step(plan.settings, replicas, shardings)
    return compile_program(program, mesh.devices, state, batch, plan.settings.schedule)


def compile_evaluation_step(
    shape: Shape, size: Size, dtype: str, devices: Sequence[Any], *, features: bool = False
) -> Compiled:
    """Compiles the evaluation of one replica; with `features`, that of the probe."""
    plan = plan_training(shape, "sweet", size, dtype)
    mesh = make_mesh(1, size.batch, devices)
    program = compile_evaluation(plan.config, plan.settings.graphdef, mesh, features=features)
    params = _abstract(plan.state.params, replica_sharding(mesh), 1, axis=True)
    batch = _abstract(_batch(size), batch_sharding(mesh), 1, axis=True)
    return compile_program(program, mesh.devices, params, batch, np.zeros(1, np.int32))


def compile_segment_groups(
    shape: Shape, size: Size, dtype: str, devices: Sequence[Any]
) -> list[Compiled]:
    """Compiles the programs of segment-parallel training: one group for each exit."""
    plan, count = plan_training(shape, "sweet", size, dtype), len(devices) // len(shape.exits)
    groups = [
        DeviceGroup((index,), make_mesh(1, size.batch, devices[index * count :][:count]))
        for index in range(len(shape.exits))
    ]
    found, carried = [], None
    for group, part in zip(groups, split_state(plan.state, groups, shape.exits), strict=True):
        mesh = group.mesh
        by_state, by_batch = replica_sharding(mesh, 1), batch_sharding(mesh, 1)
        state, shardings = _abstract_state(part, mesh)
        batch = _abstract(_batch(size), by_batch)
        if carried is not None:
            carried = (_abstract(carried[0], by_batch), _abstract(carried[1], by_state))
        program = compile_group(plan.settings, group, 1, shardings)
        found.append(compile_program(program, mesh.devices, state, batch, carried))
        carried = jax.eval_shape(program, state, batch, carried)[2]
    return found


def compile_program(program: Any, devices: np.ndarray, *arguments: Any) -> Compiled:
    """Compiles a jitted function for arguments on a mesh of devices [replica, data]."""
    began = time.process_time()
    compiled = program.lower(*arguments).compile()
    return describe(compiled, time.process_time() - began, devices)


def describe(program: Any, seconds: float, devices: np.ndarray) -> Compiled:
    """Reads what the compiler says of a program on a mesh of devices [replica, data]."""
    memory, text = program.memory_analysis(), program.as_text()
    cost = program.cost_analysis() or {}  # XLA for GPUs gives none
    rows = set(map(frozenset, np.arange(devices.size).reshape(devices.shape).tolist()))
    inside, across = [], []
    for found in collectives(text):
        (inside if all(any(g <= row for row in rows) for g in found.groups) else across).append(
            found
        )

    def counts(*kinds: str) -> list[int]:
        return [count for found in inside if found.kind in kinds for count in found.counts]

    return Compiled(
        seconds,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        cost.get("flops", math.nan) + flops_of_repeats(text),
        cost.get("bytes accessed", math.nan),
        len(inside),
        sum(found.sent() for found in inside),
        counts("all-reduce", "reduce-scatter"),
        counts("all-gather"),
        counts("all-to-all"),
        counts("collective-permute"),
        [count for found in across for count in found.counts],
        text,
    )


_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\(.*?(?:replica_groups=mesh\[(.*?)\] \{(.*?)\}|(?:groups|pairs)=(\S+))"
)
_PART_OF_A_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="')


def collectives(text: str) -> Iterator[Collective]:
    """Yields the collectives of a compiled program.

    Groups that are written neither as axes of the mesh nor one by one are one group of all.
    """
    computation, chains = "", set()
    times = run_counts(text)
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%(\S+) \(", line):
            computation = "" if head[1] else head[2]
        if not (parts := _COLLECTIVE.search(line)):
            continue
        if chain := _PART_OF_A_CHAIN.search(line):  # written once in each fusion that it spans
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        shapes, kind, axes, joined, listed = parts.groups()
        if computation.startswith("all-reduce-scatter"):  # and a slice of the sum
            kind = "reduce-scatter"
        arrays = _arrays(shapes)
        if "-start(" in line and kind != "all-reduce":  # the operands, the results, and flags
            half = len(arrays) // 2
            whole = {"all-gather": arrays[half:], "reduce-scatter": arrays[:half]}
            arrays = whole.get(kind, arrays[1:2])
        yield Collective(
            kind,
            set(map(frozenset, _groups(axes, joined, listed))),
            [count for count, _ in arrays],
            sum(count * bits // 8 for count, bits in arrays),
            max(1, times[computation]),
        )


def _arrays(shapes: str) -> list[tuple[int, int]]:
    """Returns (numbers, bits of each) of each array."""
    found = re.findall(r"([a-z]+)(\d*)\[([\d,]*)\]", shapes)
    return [
        (math.prod(int(size) for size in sizes.split(",") if size), int(bits or 8))
        for _, bits, sizes in found
    ]


def _groups(axes: str, joined: str, listed: str) -> list[list[int]]:
    """Returns the groups of devices, numbered along the mesh."""
    if not axes:
        if counted := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", listed):
            count, size, shape, order = counted.groups()
            grid = np.arange(int(count) * int(size)).reshape([int(n) for n in shape.split(",")])
            grid = grid.transpose([int(axis) for axis in order.split(",")] if order else None)
            return grid.reshape(int(count), int(size)).tolist()
        groups = re.findall(r"\{([\d,]+)\}", listed)
        return [[int(number) for number in group.split(",")] for group in groups] or [[-1]]
    extents = [int(number) for number in re.findall(r"=(\d+)", axes)]
    last = [int(number) for number in re.findall(r"axis_(\d+)", joined)]
    order = [axis for axis in range(len(extents)) if axis not in last] + last
    numbers: Any = np.arange(math.prod(extents)).reshape(extents).transpose(order)
    return numbers.reshape(-1, math.prod(extents[axis] for axis in last)).tolist()


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
    """Returns the shapes of a state on the devices of a mesh, and their shardings."""
    state = _abstract(state, replica_sharding(mesh, replicas), replicas)
    shardings = state_shardings(mesh, state, replicas)
    return abstract_state(state, shardings), shardings


def _abstract(tree: Any, sharding: NamedSharding, replicas: int = 1, *, axis: bool = False) -> Any:
    """Returns the shapes of a tree on devices, with the axis R of several replicas."""
    leading = (replicas,) if axis or replicas > 1 else ()
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(leading + x.shape, x.dtype, sharding=sharding), tree
    )
