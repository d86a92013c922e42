r"""Compiles training steps for TPUs that are not present; prints memory, work and communication.

    pip install -e ".[tpu-aot]"                                        # libtpu, in addition to JAX
    python -m experiments.benchmarks.tpu_aot --shape=minilm            # 2 cores: 5 minutes
    python -m experiments.benchmarks.tpu_aot --shape=bert-base --shape=bert-large \
        --topology=v5e:2x2 --topology=v6e:2x2 --dtype=bfloat16 --length=128 --length=256

A row of the table is a combination of topology, shape, method, dtype and length, with 16 rows per
chip; its numbers are for one chip. FLOPs and bytes are the compiler's estimates: FLOPs with all
iterations of loops (tpu_loops.py), "GB accessed" with one iteration and with the bytes of the fast
memory. "GB of main memory" are read from the compiled text (tpu_traffic.py). The bound of a step is
the time that its FLOPs (arithmetic) and bytes of main memory take at the published peaks of the
chip (bfloat16 products, bandwidth of the main memory); it is not a measurement. The bound of the
grid follows from the larger of both, for one method and size of the paper: 7 tasks of at most 6,000
rows, 5 learning rates, 3 seeds, 2 epochs in batches of 16, with one run on each chip of the row.
"collectives" are those over the rows of a batch, and "MB sent" is the least that a chip sends for
them. With --breakdown, the bytes of main memory follow by function of this package.
"""

import itertools
import math
import sys

from experiments.benchmarks.shapes import SHAPES, Size
from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.benchmarks.tpu_programs import Compiled, compile_training_step, describe_devices
from experiments.benchmarks.tpu_traffic import traffic
from experiments.packages import check_libtpu
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import DTYPES
from sweet_jax.errors import UserError

# Published peaks of a chip, bfloat16 FLOP/s and bytes/s: cloud.google.com/tpu/docs.
_PEAKS = {
    "v4": (275e12, 1228e9),
    "v5e": (197e12, 819e9),
    "v5p": (459e12, 2765e9),
    "v6e": (918e12, 1640e9),
}
_METHODS = ("sweet", "early_exit")
# Steps of the paper's grid: rates x seeds x epochs x batches; MRPC has 3,668 rows, RTE 2,490.
_GRID_STEPS = 5 * 3 * 2 * sum(math.ceil(rows / 16) for rows in (*[6000] * 5, 3668, 2490))


def format_numbers(program: Compiled, generation: str, chips: int) -> list[str]:
    """Returns the numbers of a row."""
    arithmetic, bandwidth = _PEAKS[generation]
    moved = traffic(program.text).total()
    bounds = (program.flops / arithmetic, moved / bandwidth)  # seconds
    minutes = _GRID_STEPS * max(bounds) / chips / 60
    return [
        f"{program.seconds:.0f}",
        f"{program.arguments / 2**20:.0f}",
        f"{program.temporaries / 2**20:.0f}",
        f"{program.flops / 1e9:.0f}",
        f"{program.bytes_accessed / 1e9:.1f}",
        f"{moved / 1e9:.1f}",
        ", ".join(f"{1e3 * seconds:.1f}" for seconds in bounds),
        f"{minutes:.1f}",
        str(program.collectives),
        f"{program.sent / 1e6:.0f}",
    ]


def print_breakdown(program: Compiled) -> None:
    """Prints the bytes of main memory of the 20 functions that move the most."""
    print(f"\n{table_head('function', 'pass', 'GB', 'share')}")
    moved = traffic(program.text)
    for (source, backward), count in moved.most_common(20):
        share = f"{count / moved.total():.2f}"
        direction = "backward" if backward else "forward"
        print(table_row(source, direction, f"{count / 1e9:.2f}", share))
    print(flush=True)


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each combination."""
    options = _make_parser().parse_args(argv)
    for topology in options.topology or []:
        if topology.partition(":")[0] not in _PEAKS:
            raise UserError(
                f"--topology must begin with one of {', '.join(_PEAKS)}; got {topology!r}"
            )
    check_libtpu()
    print(f"{describe_machine('libtpu')}\n")
    columns: tuple[str, ...] = ("topology", "shape", "method", "dtype", "batch", "compile, core s")
    columns += ("arguments MiB", "temporaries MiB", "GFLOP", "GB accessed", "GB of main memory")
    columns += ("bound of a step, ms: arithmetic, memory", "bound of the grid, min", "collectives")
    columns += ("MB sent",)
    print(table_head(*columns), flush=True)
    combinations = itertools.product(
        options.topology or ["v5e:2x2"],
        options.shape or ["minilm"],
        options.method or ["sweet"],
        options.dtype or ["bfloat16"],
        options.length or [128],
    )
    for topology, name, method, dtype, length in combinations:
        devices, generation = describe_devices(topology), topology.partition(":")[0]
        size = Size(options.rows * len(devices), length)
        program = compile_training_step(SHAPES[name], method, size, dtype, devices)
        numbers = format_numbers(program, generation, len(devices))
        print(table_row(topology, name, method, dtype, size, *numbers), flush=True)
        if options.breakdown:
            print_breakdown(program)


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser("experiments.benchmarks.tpu_aot", __doc__ or "")
    text = "repeatable (default minilm)"
    parser.add_argument("--shape", action="append", choices=SHAPES, help=text)
    text = "GENERATION:SHAPE; repeatable (default v5e:2x2)"
    parser.add_argument("--topology", action="append", help=text)
    text = "repeatable (default sweet)"
    parser.add_argument("--method", action="append", choices=_METHODS, help=text)
    text = "dtype of the activations; repeatable (default bfloat16)"
    parser.add_argument("--dtype", action="append", choices=DTYPES, help=text)
    text = "tokens of a row; repeatable (default 128)"
    parser.add_argument("--length", action="append", type=int, help=text)
    text = "rows of a batch per chip (default 16)"
    parser.add_argument("--rows", type=int, default=16, help=text)
    text = "also print the bytes of main memory by function"
    parser.add_argument("--breakdown", action="store_true", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
