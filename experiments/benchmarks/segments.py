"""Compares segment-parallel training with one device and with data parallelism.

    python -m experiments.benchmarks.segments --devices=2

SWEET in float32, on the same batch in every step. On GPUs, all visible ones are used
(CUDA_VISIBLE_DEVICES). "utilisation" is the time that the programs of all devices take alone,
divided by the time for which all devices are occupied: 1 means a pipeline without gaps. "MiB a
device" are those of the busiest device, as the compiler counts them: arguments (parameters,
optimizer state, batch), results and temporaries. Takes about 8 minutes on 2 cores.

Expected: the assignment of whole segments limits the speed-up (exits 1, 4, 6, 12 on two devices: 6
layers each, so at most 2). Devices of a CPU share its cores, all of which a single device keeps
busy: the speed-up is then at most 1 and the utilisation at most 1 / devices, so that only the
memory and the overhead of splitting can be read from the table.

Shape letters: B batch, L length.
"""

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments.benchmarks.shapes import (
    LEARNING_RATE,
    SHAPES,
    Shape,
    Size,
    parse_size,
    program_memory,
    random_rows,
)
from experiments.benchmarks.tables import describe_machine, table_head, table_row
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import Config
from sweet_jax.training.parallel import compile_step
from sweet_jax.training.segment_parallel import (
    compile_group,
    make_device_groups,
    split_state,
    transfer,
)
from sweet_jax.training.settings import StepSettings, step_settings
from sweet_jax.training.sharding import batch_sharding, make_mesh, reshard, state_shardings
from sweet_jax.training.step import State, init_state


class Side(NamedTuple):
    """Describes one way to train on some devices."""

    name: str
    devices: int
    take_steps: Callable[[int], None]  # takes a number of steps, and waits for the last
    # Takes a step of several programs one after the other; returns the sum over programs of seconds
    # times devices. None for a single program.
    time_programs: Callable[[], float] | None
    mebibytes: float  # of the busiest device


def make_settings(shape: Shape, size: Size) -> StepSettings:
    """Returns the constants of SWEET's step."""
    graphdef = nnx.split(nnx.eval_shape(shape.model))[0]
    config = Config(exits=shape.exits, batch_size=size.batch, epochs=1000).resolved()
    return step_settings(config, graphdef, shape.exits, rows=1000)


def make_state(shape: Shape) -> State:
    """Returns the state of one replica before the first step, on the host."""
    params = nnx.to_pure_dict(nnx.split(shape.model())[1])
    return jax.tree.map(np.asarray, init_state(params, LEARNING_RATE, 0))


def make_rows(shape: Shape, size: Size) -> dict[str, np.ndarray]:
    """Returns a random batch of one replica on the host: arrays [B, L] and [B]."""
    return {k: x[0] for k, x in random_rows(shape.config.vocab_size, size, 1).items()}


def make_data_parallel(name: str, shape: Shape, size: Size, devices: list[jax.Device]) -> Side:
    """Returns the side on which all devices take each step together, with some of the rows each."""
    mesh = make_mesh(1, size.batch, devices)
    host = make_state(shape)
    shardings = state_shardings(mesh, host, 1)
    state = reshard(host, shardings)
    batch = jax.device_put(make_rows(shape, size), batch_sharding(mesh, 1))
    settings = make_settings(shape, size)
    schedule = settings.schedule
    step = compile_step(settings, 1, shardings).lower(state, batch, schedule).compile()

    def take_steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = step(state, batch, schedule)
        jax.block_until_ready(state)

    return Side(name, len(devices), take_steps, None, count_mebibytes(step))


def make_segment_parallel(shape: Shape, size: Size) -> Side:
    """Returns the side on which each group of devices trains its own segments."""
    settings = make_settings(shape, size)
    groups = make_device_groups(shape.exits, 1, size.batch)
    parts = split_state(make_state(shape), groups, shape.exits)
    rows = make_rows(shape, size)
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

    def take_step(*, wait: bool) -> float:
        carried, device_seconds = None, 0.0
        for index, group in enumerate(groups):
            carried = jax.tree.map(lambda x, to=group.mesh: transfer(x, to), carried)
            start = time.perf_counter()
            states[index], _, carried = programs[index](states[index], batches[index], carried)
            if wait:
                jax.block_until_ready((states[index], carried))
            device_seconds += (time.perf_counter() - start) * group.mesh.size
        return device_seconds

    def take_steps(count: int) -> None:
        for _ in range(count):
            take_step(wait=False)
        jax.block_until_ready(states)

    name = "segments " + " / ".join(
        ",".join(str(shape.exits[segment]) for segment in group.segments) for group in groups
    )
    return Side(
        name,
        jax.device_count(),
        take_steps,
        lambda: take_step(wait=True),
        max(map(count_mebibytes, programs)),
    )


def count_mebibytes(program: jax.stages.Compiled) -> float:
    """Returns the memory that a program needs on each of its devices, in MiB."""
    memory = program_memory(program)
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return (size - memory.alias_size_in_bytes) / 2**20


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each side."""
    parser = ArgumentParser("experiments.benchmarks.segments", __doc__ or "")
    text = "(default bert-base)"
    parser.add_argument("--shape", default="bert-base", choices=SHAPES, help=text)
    text = "batch x length (default 16x128)"
    parser.add_argument("--size", default=Size(16, 128), type=parse_size, help=text)
    text = "number of devices that a CPU counts as (default 2)"
    parser.add_argument("--devices", type=int, default=2, help=text)
    parser.add_argument("--steps", type=int, default=4, help="timed steps per turn (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    options = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", options.devices)  # before jax makes its devices
    print(describe_machine("flax"))
    print(f"{options.shape}, batch {options.size}, {options.steps} steps a round\n")
    compare(SHAPES[options.shape], options.size, options.steps, options.rounds)


def compare(shape: Shape, size: Size, steps: int, rounds: int) -> None:
    """Prints a row for each side; they are timed in turns of a number of steps."""
    devices = jax.devices()
    sides = [
        make_data_parallel("one device", shape, size, devices[:1]),
        make_data_parallel("data-parallel", shape, size, devices),
        make_segment_parallel(shape, size),
    ]
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}  # of a step
    device_seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for side in sides:
        side.take_steps(2)
    for _ in range(rounds):
        for side in sides:
            if side.time_programs:
                device_seconds[side.name].append(side.time_programs())
            side.take_steps(1)  # fills the pipeline
            start = time.perf_counter()
            side.take_steps(steps)
            seconds[side.name].append((time.perf_counter() - start) / steps)
    columns = ("training", "devices", "ms a step", "speed-up", "utilisation", "MiB a device")
    print(table_head(*columns))
    one_device = np.median(seconds[sides[0].name])
    for side in sides:
        step = np.median(seconds[side.name])
        # With data parallelism, all that the devices spend beyond one device's step is overhead.
        busy = np.median(device_seconds[side.name]) if side.time_programs else one_device
        print(
            table_row(
                side.name,
                side.devices,
                f"{1000 * step:.0f}",
                f"{one_device / step:.2f}",
                f"{busy / (side.devices * step):.2f}",
                f"{side.mebibytes:.0f}",
            )
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
