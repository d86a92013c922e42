"""Compiles training steps for TPUs that are not there: their memory, work and communication.

    pip install -e ".[tpu-aot]"                                        # libtpu, beside JAX
    python -m experiments.benchmarks.tpu_aot --shape=minilm            # 2 cores: 5 minutes
    python -m experiments.benchmarks.tpu_aot --shape=bert-base --shape=bert-large \
        --topology=v5e:2x2 --topology=v6e:2x2 --dtype=bfloat16 --length=128 --length=256

A row is a combination of topology, shape, method, dtype and length, 16 rows a chip. arguments and
temporaries are MiB of a chip's memory. FLOPs and bytes are the compiler's estimate for a chip:
FLOPs with all runs of a loop (tpu_loops.py), GB accessed with one, and with the bytes of the chip's
fast memory; those of the main memory alone are read from the compiled text (tpu_traffic.py). The
bound is what the chip's published peaks (bfloat16 products, bandwidth of the main memory) take for
them at least, the larger of both: a bound, and never a measurement. The grid is the paper's for one
method and size: 7 tasks of at most 6,000 rows, 5 learning rates, 3 seeds, 2 epochs in batches of
16; a run on each chip of the row. collectives are those over the rows of a batch, MB sent what
these make each chip send at least. --breakdown adds the bytes of the main memory by the function of
this package that moves them.
"""

import itertools
import math
import sys

from experiments.benchmarks.shapes import SHAPES, Size, head_line, parser, row, table_head
from experiments.benchmarks.tpu_programs import Compiled, compile_training_step, devices_of
from experiments.benchmarks.tpu_traffic import traffic
from sweet_jax.config import DTYPES

# A chip's published peaks, bfloat16 FLOP/s and bytes/s: cloud.google.com/tpu/docs.
PEAKS = {
    "v4": (275e12, 1228e9),
    "v5e": (197e12, 819e9),
    "v5p": (459e12, 2765e9),
    "v6e": (918e12, 1640e9),
}
METHODS = ("sweet", "early_exit")
# Steps of the paper's grid: runs of a task, times the steps of one; MRPC has 3,668 rows, RTE 2,490.
GRID_STEPS = 5 * 3 * 2 * sum(math.ceil(rows / 16) for rows in (*[6000] * 5, 3668, 2490))


def bound(found: Compiled, generation: str) -> tuple[float, float]:
    """Returns the seconds that a chip's peaks take at least: for arithmetic, and for memory."""
    arithmetic, bandwidth = PEAKS[generation]
    return found.flops / arithmetic, traffic(found.text).total() / bandwidth


def cells(found: Compiled, generation: str, chips: int) -> list[str]:
    """Returns the numbers of a row."""
    least = bound(found, generation)
    minutes = GRID_STEPS * max(least) / chips / 60
    return [
        f"{found.seconds:.0f}",
        f"{found.arguments / 2**20:.0f}",
        f"{found.temporaries / 2**20:.0f}",
        f"{found.flops / 1e9:.0f}",
        f"{found.bytes_accessed / 1e9:.1f}",
        f"{traffic(found.text).total() / 1e9:.1f}",
        ", ".join(f"{1e3 * seconds:.1f}" for seconds in least),
        f"{minutes:.1f}",
        str(found.collectives),
        f"{found.sent / 1e6:.0f}",
    ]


def print_breakdown(found: Compiled) -> None:
    """Prints the bytes of the main memory by the function that moves them, largest first."""
    print(f"\n{table_head('function', 'pass', 'GB', 'share')}")
    moved = traffic(found.text)
    for (source, backward), count in moved.most_common(20):
        share = f"{count / moved.total():.2f}"
        print(row(source, "backward" if backward else "forward", f"{count / 1e9:.2f}", share))
    print(flush=True)


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each combination."""
    asked = parser(__doc__)
    asked.add_argument("--shape", action="append", choices=SHAPES, help="default: minilm")
    asked.add_argument("--topology", action="append", help="GENERATION:SHAPE; default: v5e:2x2")
    asked.add_argument("--method", action="append", choices=METHODS, help="default: sweet")
    asked.add_argument("--dtype", action="append", choices=DTYPES, help="default: bfloat16")
    asked.add_argument("--length", action="append", type=int, help="tokens; default: 128")
    asked.add_argument("--rows", type=int, default=16, help="of a batch, for each chip")
    asked.add_argument("--breakdown", action="store_true", help="bytes by function, too")
    options = asked.parse_args(argv)
    for topology in options.topology or []:
        if topology.partition(":")[0] not in PEAKS:
            sys.exit(f"error: --topology must begin with one of {', '.join(PEAKS)}; got {topology}")
    print(f"{head_line('libtpu')}\n")
    columns = ("topology", "shape", "method", "dtype", "batch", "compile, core s")
    columns += ("arguments MiB", "temporaries MiB", "GFLOP", "GB accessed", "GB of main memory")
    columns += ("bound of a step, ms: arithmetic, memory", "bound of the grid, min", "collectives")
    columns += ("MB sent",)
    print(table_head(*columns), flush=True)
    choices = (
        options.topology or ["v5e:2x2"],
        options.shape or ["minilm"],
        options.method or ["sweet"],
        options.dtype or ["bfloat16"],
        options.length or [128],
    )
    for topology, name, method, dtype, length in itertools.product(*choices):
        devices, generation = devices_of(topology), topology.partition(":")[0]
        size = Size(options.rows * len(devices), length)
        found = compile_training_step(SHAPES[name], method, size, dtype, devices)
        numbers = cells(found, generation, len(devices))
        print(row(topology, name, method, dtype, size, *numbers), flush=True)
        if options.breakdown:
            print_breakdown(found)


if __name__ == "__main__":
    main()
