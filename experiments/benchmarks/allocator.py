"""A CPU training step under other memory allocators: the system's, glibc's kept, jemalloc.

    apt-get install libjemalloc2
    python -m experiments.benchmarks.allocator --shape=minilm --shape=bert-base

XLA takes the temporaries of a program from the allocator at every call. glibc gives blocks that
large back to the system each time, which clears every page of them again before the next call. Told
to keep them (its environment variables) or replaced by jemalloc (LD_PRELOAD), it does not; what is
kept counts in the process's memory.

An allocator is chosen before a process starts: each side is a process of its own, and they take
turns, a few steps each. Peak MiB is the largest resident memory of that process, imports included.
Linux; about 4 minutes on 2 cores for minilm. Expected there: no gain for SWEET, up to a third for
Early-Exit, whose temporaries are twice as large.

This is one program. A run has one for each padded length, and an allocator that never gives back
keeps some of every one's: 6 replicas of MiniLM then grew to 12 to 14 GiB instead of 5 to 9.
"""

import contextlib
import ctypes.util
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from experiments.benchmarks.shapes import (
    SHAPES,
    Size,
    head_line,
    parser,
    row,
    size,
    table_head,
    training_steps,
)

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_ARENA_MAX": "1"}
NAMES = (*KEEP, "LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES")


def sides() -> dict[str, dict[str, str]]:
    """Returns what each allocator that this machine has needs in the environment."""
    found: dict[str, dict[str, str]] = {"system": {}, "glibc, kept": KEEP}
    jemalloc = ctypes.util.find_library("jemalloc")
    if jemalloc:
        found["jemalloc"] = {"LD_PRELOAD": jemalloc}
        found["jemalloc, huge pages"] = found["jemalloc"] | {"MALLOC_CONF": "thp:always"}
    return found


@contextlib.contextmanager
def side(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """Yields a process that answers each line with the seconds of its steps and its peak memory."""
    clean = {k: v for k, v in os.environ.items() if k not in NAMES}
    command = [sys.executable, "-m", "experiments.benchmarks.allocator", "--serve", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=clean | dict(environment), **pipes) as process:
        yield process
        process.communicate()


def ask(process: subprocess.Popen) -> tuple[list[float], float]:
    """Seconds of each step of one round, and peak MiB."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError("a side ended before its last round; what it said is above")
    *seconds, peak = map(float, answer.split())
    return seconds, peak


def serve(shape: str, method: str, at: Size, steps: int) -> None:
    """Answers `ask` from the other end."""
    take = training_steps(SHAPES[shape], method, at).take
    for _ in sys.stdin:
        take()  # the first after another side's is not counted
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            take()
            seconds.append(time.perf_counter() - began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(*seconds, peak, flush=True)


def compare(
    shape: str, method: str, at: Size, rounds: int, steps: int
) -> dict[str, tuple[float, float]]:
    """Returns the median seconds of a step under each allocator, and peak MiB."""
    arguments = (f"--shape={shape}", f"--method={method}", f"--size={at}", f"--steps={steps}")
    times: dict[str, list[float]] = {name: [] for name in sides()}
    peaks: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        opened = {
            name: stack.enter_context(side(arguments, environment))
            for name, environment in sides().items()
        }
        for _ in range(rounds):
            for name, process in opened.items():
                seconds, peaks[name] = ask(process)
                times[name] += seconds
    return {name: (statistics.median(times[name]), peaks[name]) for name in times}


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each shape, method and allocator."""
    options = parser(__doc__)
    options.add_argument("--shape", action="append", choices=SHAPES, help="default: minilm")
    options.add_argument("--size", type=size, default=Size(16, 128), help="default: 16x128")
    options.add_argument("--method", action="append", choices=("sweet", "early_exit"))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=3, help="of each side in a round")
    options.add_argument("--serve", action="store_true", help="be one of the sides")
    chosen = options.parse_args(argv)
    shapes, methods = chosen.shape or ["minilm"], chosen.method or ["sweet", "early_exit"]
    if chosen.serve:
        serve(shapes[0], methods[0], chosen.size, chosen.steps)
        return
    print(f"{head_line()}\nbatch {chosen.size}, float32\n")
    print(table_head("shape", "method", "allocator", "examples/s", "x system", "peak MiB"))
    for shape in shapes:
        for method in methods:
            found = compare(shape, method, chosen.size, chosen.rounds, chosen.steps)
            for name, (seconds, peak) in found.items():
                ratio = found["system"][0] / seconds
                cells = (f"{chosen.size.batch / seconds:.2f}", f"{ratio:.2f}", f"{peak:.0f}")
                print(row(shape, method, name, *cells), flush=True)


if __name__ == "__main__":
    main()
