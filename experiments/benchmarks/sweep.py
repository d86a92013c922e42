"""Examples per second of a sweep: all replicas in one program against one run after another.

    python -m experiments.benchmarks.sweep --shape=minilm                  # 2 cores: 10 minutes
    python -m experiments.benchmarks.sweep --shape=bert-base --dtype=bfloat16 --size=16x128  # a GPU

Replicas are 5 learning rates x 3 seeds by default, each with its own parameters, optimizer state
and rows, SWEET, random weights and rows. Of the runs one after another one is timed, steadily: the
others are the same program on other numbers. The two sides take turns; the median step counts.

The second ratio is of whole sweeps of --of_steps steps a run (676: 5,400 rows, 2 epochs, batches of
16), time to compile included, computed from what was measured: the runs one after another compile
each (as processes without a compilation cache do), or all but the first find the program in one.
Leave JAX_COMPILATION_CACHE_DIR unset.

Expected: about 1 on a CPU, whose cores one replica fills; on a GPU at least 3.
"""

import statistics
import time

from experiments.benchmarks.shapes import (
    SHAPES,
    Size,
    Steps,
    head_line,
    parser,
    row,
    size,
    table_head,
    training_steps,
)
from sweet_jax.config import DTYPES

RATES = (1e-5, 2e-5, 3e-5, 4e-5, 5e-5)  # the SWEET paper's, appendix A


def replicas(count: int) -> list[tuple[int, float]]:
    """Returns `count` pairs of seed and rate, every rate for a seed before the next seed."""
    return [(i // len(RATES), RATES[i % len(RATES)]) for i in range(count)]


def timed(sides: list[Steps], rounds: int, steps: int) -> list[float]:
    """Returns the median seconds of a step of each side, the sides taking turns."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, seconds in zip(sides, times, strict=True):
            side.take()  # the first after the other side's is not counted
            for _ in range(steps):
                began = time.perf_counter()
                side.take()
                seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in times]


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each shape and size."""
    options = parser(__doc__)
    options.add_argument("--shape", action="append", choices=SHAPES, help="default: minilm")
    options.add_argument("--size", action="append", type=size, help="default: 16x64; repeats")
    options.add_argument("--replicas", type=int, default=15, help="at least 2")
    options.add_argument("--dtype", default="float32", choices=DTYPES, help="of activations")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=2, help="of all replicas in a round")
    options.add_argument("--of_steps", type=int, default=676, help="of a run of the whole sweep")
    chosen = options.parse_args(argv)
    count = chosen.replicas
    if count < 2:
        options.error(f"--replicas must be 2 or more; got {count}")
    print(f"{head_line()}\nexamples/s of {count} replicas; compile: seconds for each program\n")
    columns = ("shape", "batch", "dtype", "together", "one after another", "ratio")
    more = ("compile together, one", f"ratio over {chosen.of_steps} steps: each compiles", "cached")
    print(table_head(*columns, *more), flush=True)
    for name in chosen.shape or ["minilm"]:
        for at in chosen.size or [Size(16, 64)]:
            sides = [
                training_steps(SHAPES[name], "sweet", at, chosen.dtype, several)
                for several in (replicas(count), replicas(1))
            ]
            both, one = timed(sides, chosen.rounds, chosen.steps)
            compiling = [side.compile_seconds for side in sides]
            together = compiling[0] + chosen.of_steps * both
            apart = chosen.of_steps * one * count
            print(
                row(
                    *(name, at, chosen.dtype),
                    *(f"{at.batch * count / both:.2f}", f"{at.batch / one:.2f}"),
                    f"{count * one / both:.2f}",
                    ", ".join(f"{seconds:.1f} s" for seconds in compiling),
                    f"{(count * compiling[1] + apart) / together:.2f}",
                    f"{(compiling[1] + apart) / together:.2f}",
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
