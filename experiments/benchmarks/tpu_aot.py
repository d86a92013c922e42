"""Compiles training steps for TPUs that are not there: their memory, work and communication.

    pip install -e ".[tpu-aot]"                                        # libtpu, beside JAX
    python -m experiments.benchmarks.tpu_aot --shape=minilm            # 2 cores: 5 minutes
    python -m experiments.benchmarks.tpu_aot --shape=bert-base --shape=bert-large \
        --topology=v5e:2x2 --topology=v6e:2x2 --dtype=bfloat16 --length=128 --length=256

A row is a combination of topology, shape, method, dtype and length, 16 rows a chip. The compiler is
the TPU's own, ahead of time, for a described topology (jax.experimental.topologies); nothing runs.
arguments and temporaries are MiB of a chip's memory. FLOPs and bytes are the compiler's estimate
for a chip. The bound is what the chip's published peaks (bfloat16 products, bandwidth of memory)
take for them at least, the larger of both: a bound, and never a measurement. all-reduces are those
over the rows of a batch.
"""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no cloud machine to ask
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to be shared
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import itertools
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies

from experiments.benchmarks.shapes import (
    RATE,
    SHAPES,
    Shape,
    Size,
    head_line,
    parser,
    row,
    table_head,
)
from sweet_jax.config import DTYPES, Config
from sweet_jax.training.fit import step_settings
from sweet_jax.training.parallel import compile_step
from sweet_jax.training.sharding import batch_sharding, make_mesh, replica_sharding
from sweet_jax.training.step import init_state

# A chip's published peaks, bfloat16 FLOP/s and bytes/s: cloud.google.com/tpu/docs.
PEAKS = {
    "v4": (275e12, 1228e9),
    "v5e": (197e12, 819e9),
    "v5p": (459e12, 2765e9),
    "v6e": (918e12, 1640e9),
}
_ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}
METHODS = ("sweet", "early_exit")


class Compiled(NamedTuple):
    """Holds the compiler's estimates of a program, for each chip."""

    seconds: float  # of a core, for tracing and compiling
    arguments: int  # bytes
    temporaries: int  # bytes
    flops: float
    bytes_accessed: float
    reductions: int  # collectives over the rows of a batch
    exchanged: list[int]  # numbers in each collective that joins replicas
    text: str


def devices_of(topology: str) -> list[Any]:
    """Returns the devices of a described topology such as "v5e:2x2"."""
    generation = topology.partition(":")[0]
    os.environ["TPU_ACCELERATOR_TYPE"] = _ACCELERATORS[generation]
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def compile_training_step(
    shape: Shape, method: str, size: Size, dtype: str, devices: Sequence[Any], replicas: int = 1
) -> Compiled:
    """Compiles a training step of `size` rows and tokens for devices that need not exist."""
    graphdef, values = nnx.split(nnx.eval_shape(lambda: shape.model(0, dtype)))
    run = Config(method=method, exits=shape.exits, batch_size=size.batch, epochs=1000, dtype=dtype)
    settings = step_settings(run.resolved(), graphdef, shape.exits, rows=1000)
    mesh = make_mesh(replicas, size.batch, devices)
    state = jax.eval_shape(lambda p: init_state(p, RATE, 0), nnx.to_pure_dict(values))

    def abstract(tree: Any, sharding: Any) -> Any:
        leading = (replicas,) if replicas > 1 else ()
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(leading + x.shape, x.dtype, sharding=sharding), tree
        )

    ids = jax.ShapeDtypeStruct(tuple(size), np.int32)
    batch = {
        "input_ids": ids,
        "token_type_ids": ids,
        "mask": jax.ShapeDtypeStruct(tuple(size), bool),
        "labels": jax.ShapeDtypeStruct((size.batch,), np.int32),
        "row_mask": jax.ShapeDtypeStruct((size.batch,), bool),
    }
    began = time.process_time()
    program = (
        compile_step(settings, replicas, mesh)
        .lower(
            abstract(state, replica_sharding(mesh, replicas)),
            abstract(batch, batch_sharding(mesh, replicas)),
            settings.schedule,
        )
        .compile()
    )
    return describe(program, time.process_time() - began, mesh.devices)


def describe(program: Any, seconds: float, devices: np.ndarray) -> Compiled:
    """Reads what the compiler says of a program on a mesh of devices [replica, data]."""
    memory, cost, text = program.memory_analysis(), program.cost_analysis(), program.as_text()
    rows = set(map(frozenset, np.arange(devices.size).reshape(devices.shape).tolist()))
    found = list(collectives(text))
    return Compiled(
        seconds,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        cost["flops"],
        cost["bytes accessed"],
        sum(groups <= rows for groups, _ in found),
        [count for groups, count in found if not groups <= rows],
        text,
    )


_COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\(.*?(?:replica_groups=mesh\[(.*?)\] \{(.*?)\}|(?:groups|pairs)=(\S+))"
)


def collectives(text: str) -> Iterator[tuple[set[frozenset[int]], int]]:
    """Yields of each collective the groups of devices it joins, and how many numbers it has.

    Devices are numbered along the mesh; groups that are not written as axes of it are one group.
    """
    for shapes, axes, joined, _ in _COLLECTIVE.findall(text):
        sizes = [math.prod(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", shapes)]
        numbers: Any = [[-1]]
        if axes:
            extents = [int(number) for number in re.findall(r"=(\d+)", axes)]
            last = [int(number) for number in re.findall(r"axis_(\d+)", joined)]
            order = [axis for axis in range(len(extents)) if axis not in last] + last
            numbers = np.arange(math.prod(extents)).reshape(extents).transpose(order)
            numbers = numbers.reshape(-1, math.prod(extents[axis] for axis in last)).tolist()
        yield set(map(frozenset, numbers)), sum(sizes)


def bound(found: Compiled, generation: str) -> tuple[float, float]:
    """Returns the seconds that a chip's peaks take at least: for arithmetic, and for memory."""
    arithmetic, bandwidth = PEAKS[generation]
    return found.flops / arithmetic, found.bytes_accessed / bandwidth


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each combination."""
    asked = parser(__doc__)
    asked.add_argument("--shape", action="append", choices=SHAPES, help="default: minilm")
    asked.add_argument("--topology", action="append", help="GENERATION:SHAPE; default: v5e:2x2")
    asked.add_argument("--method", action="append", choices=METHODS, help="default: sweet")
    asked.add_argument("--dtype", action="append", choices=DTYPES, help="default: bfloat16")
    asked.add_argument("--length", action="append", type=int, help="tokens; default: 128")
    asked.add_argument("--rows", type=int, default=16, help="of a batch, for each chip")
    options = asked.parse_args(argv)
    for topology in options.topology or []:
        if topology.partition(":")[0] not in PEAKS:
            sys.exit(f"error: --topology must begin with one of {', '.join(PEAKS)}; got {topology}")
    print(f"{head_line('libtpu')}\n")
    columns = ("topology", "shape", "method", "dtype", "batch", "compile, core s")
    columns += ("arguments MiB", "temporaries MiB", "GFLOP", "GB accessed")
    columns += ("bound ms: arithmetic, memory", "all-reduces")
    print(table_head(*columns), flush=True)
    choices = (
        options.topology or ["v5e:2x2"],
        options.shape or ["minilm"],
        options.method or ["sweet"],
        options.dtype or ["bfloat16"],
        options.length or [128],
    )
    for topology, name, method, dtype, length in itertools.product(*choices):
        devices = devices_of(topology)
        size = Size(options.rows * len(devices), length)
        found = compile_training_step(SHAPES[name], method, size, dtype, devices)
        least = bound(found, topology.partition(":")[0])
        numbers = (found.arguments / 2**20, found.temporaries / 2**20, found.flops / 1e9)
        print(
            row(
                *(topology, name, method, dtype, size, f"{found.seconds:.0f}"),
                *(f"{number:.0f}" for number in numbers),
                f"{found.bytes_accessed / 1e9:.1f}",
                ", ".join(f"{1e3 * seconds:.1f}" for seconds in least),
                found.reductions,
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
