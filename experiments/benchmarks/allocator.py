"""Times a training step on a CPU under several memory allocators.

    apt-get install libjemalloc2
    python -m experiments.benchmarks.allocator --shape=minilm --shape=bert-base

XLA allocates the temporaries of a program at every call. By default, glibc returns blocks of that
size to the system each time, and the system clears their pages before the next call. glibc with
other settings (environment variables), and jemalloc (LD_PRELOAD), keep them instead, which counts
as memory of the process.

The allocator of a process is chosen before it starts, so each side is a process, and they are
timed in turns of a few steps. "peak MiB" is the largest resident memory of that process, including
imports. Needs Linux. Takes about 4 minutes on 2 cores for minilm. Expected there: no gain for
SWEET, and up to a third for Early-Exit, whose temporaries are twice as large.

This benchmark has one program. A run has one for each padded length, and an allocator that returns
no memory keeps some for each of them: 6 replicas of MiniLM then needed 12 to 14 GiB instead of 5
to 9.
"""

import contextlib
import ctypes.util
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from experiments.benchmarks.shapes import SHAPES, Size, make_training_step, parse_size
from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.benchmarks.timing import time_in_turns
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.methods import METHODS

_KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_ARENA_MAX": "1"}
_VARIABLES = (*_KEEP, "LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES")  # removed for every side


def allocators() -> dict[str, dict[str, str]]:
    """Returns the environment variables of each allocator that this machine has."""
    variables: dict[str, dict[str, str]] = {"system": {}, "glibc, kept": _KEEP}
    jemalloc = ctypes.util.find_library("jemalloc")
    if jemalloc:
        variables["jemalloc"] = {"LD_PRELOAD": jemalloc}
        variables["jemalloc, huge pages"] = {"LD_PRELOAD": jemalloc, "MALLOC_CONF": "thp:always"}
    return variables


@contextlib.contextmanager
def start_worker(
    arguments: Sequence[str], variables: Mapping[str, str]
) -> Iterator[subprocess.Popen]:
    """Yields a process that runs `answer_turns` with environment variables."""
    clean = {k: v for k, v in os.environ.items() if k not in _VARIABLES}
    command = [sys.executable, "-m", "experiments.benchmarks.allocator", "--worker", *arguments]
    with subprocess.Popen(
        command,
        env=clean | dict(variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.communicate()


def ask_for_turn(process: subprocess.Popen) -> tuple[list[float], float]:
    """Returns the seconds of the steps of a worker's next turn, and its peak MiB.

    Raises RuntimeError if the worker has ended.
    """
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError("a process ended before its last turn; its error is above")
    *seconds, peak = map(float, answer.split())
    return seconds, peak


def answer_turns(shape: str, method: str, size: Size, steps: int) -> None:
    """Takes `steps` steps for each line of stdin, and prints their seconds and the peak MiB."""
    take = make_training_step(SHAPES[shape], method, size).take
    for _ in sys.stdin:
        (seconds,) = time_in_turns([take], 1, steps, skipped=1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(*seconds, peak, flush=True)


def compare(
    shape: str, method: str, size: Size, rounds: int, steps: int
) -> dict[str, tuple[float, float]]:
    """Returns the median seconds of a step and the peak MiB under each allocator."""
    arguments = (f"--shape={shape}", f"--method={method}", f"--size={size}", f"--steps={steps}")
    times: dict[str, list[float]] = {name: [] for name in allocators()}
    peaks: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(start_worker(arguments, variables))
            for name, variables in allocators().items()
        }
        for _ in range(rounds):
            for name, process in workers.items():
                seconds, peaks[name] = ask_for_turn(process)
                times[name] += seconds
    return {name: (statistics.median(times[name]), peaks[name]) for name in times}


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each shape, method and allocator."""
    parser = ArgumentParser("experiments.benchmarks.allocator", __doc__ or "")
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, help="repeatable (default minilm)"
    )
    parser.add_argument(
        "--size", type=parse_size, default=Size(16, 128), help="batch x length (default 16x128)"
    )
    methods = [name for name, method in METHODS.items() if not method.model_per_exit]
    parser.add_argument("--method", action="append", choices=methods, help="(default both)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn (default 3)")
    parser.add_argument("--worker", action="store_true", help="for internal use: be one side")
    options = parser.parse_args(argv)
    shapes, chosen = options.shape or ["minilm"], options.method or methods
    if options.worker:
        answer_turns(shapes[0], chosen[0], options.size, options.steps)
        return
    print(f"{describe_machine()}\nbatch {options.size}, float32\n")
    print(table_head("shape", "method", "allocator", "examples/s", "x system", "peak MiB"))
    for shape in shapes:
        for method in chosen:
            measured = compare(shape, method, options.size, options.rounds, options.steps)
            for name, (seconds, peak) in measured.items():
                ratio = measured["system"][0] / seconds
                cells = (f"{options.size.batch / seconds:.2f}", f"{ratio:.2f}", f"{peak:.0f}")
                print(table_row(shape, method, name, *cells), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
