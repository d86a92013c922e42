r"""Compares a training step of this project with one of the same model in torch.

    pip install -e ".[torch]"
    python -m experiments.benchmarks.train_step --shape=minilm --shape=bert-base
    python -m experiments.benchmarks.train_step --shape=bert-base --shape=bert-large \
        --shape=deberta-base --dtype=bfloat16 --size=16x128 --size=32x256        # on a GPU

Both sides do the same work: a random encoder of a shape whose exits have a pooler, dropout of 0.1
and a classifier, the sum of the exits' cross-entropies, gradient clipping per owner, AdamW, and
rows without padding. torch runs transformers' BertModel with SDPA attention, in eager mode and
compiled (torch.compile; clipping and the fused AdamW stay outside). It gets no mask, because
transformers drops a mask that hides nothing. DeBERTa has no SDPA attention: DebertaModel's own
attention runs instead, and torch.compile breaks its graph at every layer.

float32: on a GPU, both sides multiply matrices in TF32 (jax's default; torch's "high").
bfloat16: this project has activations in bfloat16, and parameters, gradients, softmax, norms and
AdamW in float32; torch runs its forward pass and losses under autocast to bfloat16, with parameters
in float32. DebertaModel's attention fails under autocast, so torch's whole model is then in
bfloat16, including parameters and AdamW, which is less work.

The sides are timed in turns of a few steps in one process, and each step is waited for. Prints
examples per second, from the median step of each side. The first command takes about 10 minutes on
2 cores, and the second about 10 minutes on a GPU.
"""

import argparse
import logging
import statistics
import sys
import time

from experiments.benchmarks.shapes import SHAPES, Shape, Size, make_training_step, parse_size
from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.benchmarks.timing import time_in_turns
from experiments.packages import check_torch
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import DTYPES
from sweet_jax.errors import one_line

_SIDES = ("sweet_jax", "torch", "torch.compile")
_METHODS = ("sweet", "early_exit")


def compare(shape: Shape, method: str, size: Size, options: argparse.Namespace) -> dict[str, float]:
    """Returns the median seconds of a step of each side that this machine can run."""
    from experiments.benchmarks.torch_step import make_torch_steps  # imports torch

    ours = make_training_step(shape, method, size, options.dtype)
    # Printed at once, because the command may be ended by a time limit before the row.
    print(f"sweet_jax: compiled in {ours.compile_seconds:.0f} s", file=sys.stderr, flush=True)
    theirs = make_torch_steps(shape, method, size, options.dtype)
    sides = dict(zip(_SIDES, [ours.take, *theirs], strict=True))
    if options.no_compile:
        del sides["torch.compile"]
    for name, take in list(sides.items()):
        start = time.perf_counter()
        try:
            take()  # compiles and allocates
        except Exception as error:
            if name != "torch.compile":
                raise
            # It needs a C++ compiler on a CPU and Triton on a GPU; the other sides do not.
            print(f"torch.compile is not available: {type(error).__name__}: {one_line(error)}")
            del sides[name]
        seconds = time.perf_counter() - start
        print(f"{name}: the first step took {seconds:.0f} s", file=sys.stderr, flush=True)
    times = time_in_turns(list(sides.values()), options.rounds, options.steps, skipped=1)
    return {name: statistics.median(own) for name, own in zip(sides, times, strict=True)}


def main(argv: list[str] | None = None) -> None:
    """Prints one row for each shape, method and size."""
    parser = ArgumentParser("experiments.benchmarks.train_step", __doc__ or "")
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, help="repeatable (default minilm)"
    )
    parser.add_argument(
        "--size", action="append", type=parse_size, help="repeatable (default 16x128)"
    )
    parser.add_argument("--method", action="append", choices=_METHODS, help="(default both)")
    text = "dtype of the activations (default float32)"
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help=text)
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side (default 4)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn (default 3)")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(argv)
    check_torch()
    import torch

    # Otherwise it warns at every break of DeBERTa's graph.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as is jax's default there
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = describe_machine("torch", "transformers")
    print(f"{machine}; torch: {device}, {torch.get_num_threads()} threads")
    print("examples/s of each side, and sweet_jax's as a multiple of torch's\n")
    columns = ("shape", "method", "batch", "dtype", *_SIDES, "x torch", "x torch.compile")
    print(table_head(*columns), flush=True)
    for name in options.shape or ["minilm"]:
        for size in options.size or [Size(16, 128)]:
            for method in options.method or _METHODS:
                seconds = compare(SHAPES[name], method, size, options)
                speeds = [f"{size.batch / seconds[s]:.2f}" if s in seconds else "" for s in _SIDES]
                ratios = [
                    f"{seconds[s] / seconds['sweet_jax']:.2f}" if s in seconds else ""
                    for s in _SIDES[1:]
                ]
                print(table_row(name, method, size, options.dtype, *speeds, *ratios), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
