"""Compares a sweep whose replicas share one program with one run after another.

    python -m experiments.benchmarks.sweep --shape=minilm                  # 2 cores: 10 minutes
    python -m experiments.benchmarks.sweep --shape=bert-base --dtype=bfloat16 --size=16x128  # a GPU

The replicas are by default 5 learning rates x 3 seeds, each with its own parameters, optimizer
state and rows: SWEET, with random weights and random rows. Of the separate runs only one is timed,
because the others are the same program with other numbers. The two sides are timed in turns. Prints
examples per second, from the median step.

The last two ratios are for whole sweeps of --of_steps steps per run (676: 5,400 rows, 2 epochs,
batches of 16), including compilation, and are computed from the same measurements. In the first,
each separate run compiles its program, as processes without a compilation cache do. In the second,
all but the first run find it in a cache. Leave JAX_COMPILATION_CACHE_DIR unset.

Expected: a ratio of about 1 on a CPU, whose cores one replica keeps busy, and of at least 3 on a
GPU.
"""

import statistics
import sys

from experiments.benchmarks.shapes import (
    SHAPES,
    Size,
    TimedStep,
    make_training_step,
    parse_size,
)
from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.benchmarks.timing import time_in_turns
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import DTYPES
from sweet_jax.errors import UserError

_LEARNING_RATES = (1e-5, 2e-5, 3e-5, 4e-5, 5e-5)  # the SWEET paper's, appendix A


def replicas(count: int) -> list[tuple[int, float]]:
    """Returns `count` pairs of seed and learning rate, all rates of a seed before the next seed."""
    rates = len(_LEARNING_RATES)
    return [(i // rates, _LEARNING_RATES[i % rates]) for i in range(count)]


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each shape and size."""
    parser = ArgumentParser("experiments.benchmarks.sweep", __doc__ or "")
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, help="repeatable (default minilm)"
    )
    parser.add_argument(
        "--size", action="append", type=parse_size, help="repeatable (default 16x64)"
    )
    parser.add_argument("--replicas", type=int, default=15, help="at least 2 (default 15)")
    text = "dtype of the activations (default float32)"
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help=text)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per turn (default 2)")
    parser.add_argument(
        "--of_steps", type=int, default=676, help="steps of a run in the whole sweep (default 676)"
    )
    options = parser.parse_args(argv)
    count = options.replicas
    if count < 2:
        raise UserError(f"--replicas must be at least 2; got {count}")
    title = f"examples/s of {count} replicas; compile: seconds for each program"
    print(f"{describe_machine()}\n{title}\n")
    columns = ("shape", "batch", "dtype", "together", "one after another", "ratio")
    more = ("compile together, one", f"ratio over {options.of_steps} steps: each compiles")
    print(table_head(*columns, *more, "cached"), flush=True)
    for name in options.shape or ["minilm"]:
        for size in options.size or [Size(16, 64)]:
            sides = [
                make_training_step(SHAPES[name], "sweet", size, options.dtype, replicas(n))
                for n in (count, 1)
            ]
            times = time_in_turns(
                [side.take for side in sides], options.rounds, options.steps, skipped=1
            )
            medians = [statistics.median(seconds) for seconds in times]
            numbers = _numbers(sides, medians, size, count, options.of_steps)
            print(table_row(name, size, options.dtype, *numbers), flush=True)


def _numbers(
    sides: list[TimedStep], medians: list[float], size: Size, count: int, steps: int
) -> list[str]:
    """Returns the numbers of a row.

    sides, medians: the program and the seconds of its step for all replicas together, and for one.
    """
    together, one = medians
    compile_together, compile_one = (side.compile_seconds for side in sides)
    sweep_together = compile_together + steps * together
    sweep_apart = steps * one * count
    return [
        f"{size.batch * count / together:.2f}",
        f"{size.batch / one:.2f}",
        f"{count * one / together:.2f}",
        f"{compile_together:.1f} s, {compile_one:.1f} s",
        f"{(count * compile_one + sweep_apart) / sweep_together:.2f}",
        f"{(compile_one + sweep_apart) / sweep_together:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
