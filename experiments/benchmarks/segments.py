"""Segment-parallel training against one device and against data parallelism on the same devices.

    python -m experiments.benchmarks.segments --devices=2

SWEET, float32, one batch over and over. On GPUs all visible ones are used (CUDA_VISIBLE_DEVICES).
Utilisation is the time that the devices' programs take alone over the time that all devices are
held: 1 is a pipeline without gaps. Bytes are those of one device, of the busiest: arguments
(parameters, optimizer state, batch), results and temporaries, as the compiler counts them. About 8
minutes on 2 cores.

Expected: the assignment of whole segments bounds the gain (exits 1, 4, 6, 12 on two devices: 6
layers each, at most 2). The devices of a CPU share its cores, which one of them fills already:
there the speed-up is at most 1 and the utilisation at most 1 / devices, and only what the
splitting itself costs, and the bytes, are to be read.

Shape letters: B batch, L length.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments.benchmarks import shapes
from experiments.benchmarks.shapes import RATE, SHAPES, Shape, Size, random_rows
from sweet_jax.config import Config
from sweet_jax.training.fit import step_settings
from sweet_jax.training.parallel import compile_step
from sweet_jax.training.segment_parallel import (
    compile_group,
    make_device_groups,
    split_state,
    transfer,
)
from sweet_jax.training.settings import StepSettings
from sweet_jax.training.sharding import batch_sharding, make_mesh, reshard, state_shardings
from sweet_jax.training.step import State, init_state


class Way(NamedTuple):
    """One way to train on some devices."""

    name: str
    devices: int
    steps: Callable[[int], None]  # takes so many, and waits for the last
    # Seconds that its programs take in a step, one after the other, if they are several.
    alone: Callable[[], float] | None
    mebibytes: float  # of the busiest device


def settings_of(shape: Shape, size: Size) -> StepSettings:
    """SWEET's step."""
    graphdef = nnx.split(nnx.eval_shape(shape.model))[0]
    config = Config(exits=shape.exits, batch_size=size.batch, epochs=1000).resolved()
    return step_settings(config, graphdef, shape.exits, rows=1000)


def initial(shape: Shape) -> State:
    """Returns a state on the host."""
    params = nnx.to_pure_dict(nnx.split(shape.model())[1])
    return jax.tree.map(np.asarray, init_state(params, RATE, 0))


def together(name: str, shape: Shape, size: Size, devices: list[jax.Device]) -> Way:
    """Times steps that all devices take together, the rows spread over them."""
    mesh = make_mesh(1, size.batch, devices)
    host = initial(shape)
    shardings = state_shardings(mesh, host, 1)
    state = reshard(host, shardings)
    rows = {k: x[0] for k, x in random_rows(shape.config.vocab_size, size, 1).items()}
    batch = jax.device_put(rows, batch_sharding(mesh, 1))
    settings = settings_of(shape, size)
    schedule = settings.schedule
    step = compile_step(settings, 1, shardings).lower(state, batch, schedule).compile()

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = step(state, batch, schedule)
        jax.block_until_ready(state)

    return Way(name, len(devices), steps, None, mebibytes(step))


def in_segments(shape: Shape, size: Size) -> Way:
    """Times steps where each group of devices trains its own segments."""
    settings = settings_of(shape, size)
    groups = make_device_groups(shape.exits, 1, size.batch)
    parts = split_state(initial(shape), groups, shape.exits)
    rows = {k: x[0] for k, x in random_rows(shape.config.vocab_size, size, 1).items()}
    states, batches, programs, carried = [], [], [], None
    for group, part in zip(groups, parts, strict=True):
        shardings = state_shardings(group.mesh, part, 1)
        states.append(reshard(part, shardings))
        batches.append(jax.device_put(rows, batch_sharding(group.mesh, 1)))
        carried = jax.tree.map(lambda x, to=group.mesh: transfer(x, to), carried)
        program = compile_group(settings, group, 1, shardings).lower(
            states[-1], batches[-1], carried
        )
        programs.append(program.compile())
        states[-1], _, carried = programs[-1](states[-1], batches[-1], carried)

    def step(*, wait: bool) -> float:
        carried, seconds = None, 0.0
        for index, group in enumerate(groups):
            carried = jax.tree.map(lambda x, to=group.mesh: transfer(x, to), carried)
            began = time.perf_counter()
            states[index], _, carried = programs[index](states[index], batches[index], carried)
            if wait:
                jax.block_until_ready((states[index], carried))
            seconds += (time.perf_counter() - began) * group.mesh.size
        return seconds

    def steps(count: int) -> None:
        for _ in range(count):
            step(wait=False)
        jax.block_until_ready(states)

    name = "segments " + " / ".join(
        ",".join(str(shape.exits[segment]) for segment in group.segments) for group in groups
    )
    return Way(
        name,
        jax.device_count(),
        steps,
        lambda: step(wait=True),
        max(map(mebibytes, programs)),
    )


def mebibytes(program: jax.stages.Compiled) -> float:
    """Returns what a program needs on each of its devices."""
    found = program.memory_analysis()
    size = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
    return (size - found.alias_size_in_bytes) / 2**20


def timed(steps: Callable[[int], None], count: int = 1) -> float:
    """Seconds of a step."""
    began = time.perf_counter()
    steps(count)
    return (time.perf_counter() - began) / count


def main(argv: list[str] | None = None) -> None:
    """Makes devices of a CPU, and compares."""
    parser = shapes.parser(__doc__)
    parser.add_argument("--shape", default="bert-base", choices=SHAPES)
    parser.add_argument("--size", default="16x128", type=shapes.size, help="batch x length")
    parser.add_argument("--devices", type=int, default=2, help="of a CPU; default: 2")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3, help="the median is printed")
    options = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", options.devices)  # before the first is touched
    print(shapes.head_line("flax"))
    print(f"{options.shape}, batch {options.size}, {options.steps} steps a round\n")
    compare(SHAPES[options.shape], options.size, options.steps, options.rounds)


def compare(shape: Shape, size: Size, count: int, rounds: int) -> None:
    """Prints a row for each way, measured one after the other in every round of `count` steps."""
    devices = jax.devices()
    ways = [
        together("one device", shape, size, devices[:1]),
        together("data-parallel", shape, size, devices),
        in_segments(shape, size),
    ]
    seconds = {way.name: [] for way in ways}
    alone = {way.name: [] for way in ways}
    for way in ways:
        way.steps(2)
    for _ in range(rounds):
        for way in ways:
            if way.alone:
                alone[way.name].append(way.alone())
            way.steps(1)  # fills the pipeline
            seconds[way.name].append(timed(way.steps, count))
    columns = ("training", "devices", "ms a step", "speed-up", "utilisation", "MiB a device")
    print(shapes.table_head(*columns))
    first = np.median(seconds[ways[0].name])
    # Of all devices that take each step together, what they spend beyond one's step is overhead.
    busy = {way.name: np.median(alone[way.name]) if way.alone else first for way in ways}
    for way in ways:
        step = np.median(seconds[way.name])
        print(
            shapes.row(
                way.name,
                way.devices,
                f"{1000 * step:.0f}",
                f"{first / step:.2f}",
                f"{busy[way.name] / (way.devices * step):.2f}",
                f"{way.mebibytes:.0f}",
            )
        )


if __name__ == "__main__":
    main()
