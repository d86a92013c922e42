r"""Examples per second of a training step: this project against the same model in torch.

    pip install -e ".[torch]"
    python -m experiments.benchmarks.train_step --shape=minilm --shape=bert-base
    python -m experiments.benchmarks.train_step --shape=bert-base --shape=bert-large \
        --shape=deberta-base --dtype=bfloat16 --size=16x128 --size=32x256        # on a GPU

Same work on both sides: random encoder of that shape, exits with pooler, dropout 0.1 and
classifier, cross-entropy summed over exits, gradient clipping per owner, AdamW, rows without
padding. torch runs transformers' BertModel with SDPA attention, eagerly and compiled
(torch.compile; clipping and the fused AdamW stay outside), and is given no mask, as transformers
drops one that hides nothing. DeBERTa has no SDPA attention: DebertaModel's own, eager one runs, and
torch.compile breaks its graph once a layer.

float32: on a GPU both sides multiply matrices in TF32 (jax's default; torch's "high").
bfloat16: ours has activations in bfloat16 and parameters, gradients, softmax, norms and AdamW in
float32; torch runs its forward pass and losses under autocast to bfloat16, parameters float32.
Under autocast DebertaModel's attention raises: there all of torch's model is bfloat16, parameters
and AdamW too, which is less work.

The sides take turns, a few steps each, in one process, and each step is awaited; the median step
of each is compared. 2 cores need about 10 minutes for the first line, a GPU about 10 for the
second.
"""

import argparse
import dataclasses
import functools
import logging
import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers

from experiments.benchmarks import torch_model
from experiments.benchmarks.shapes import (
    CLASSES,
    RATE,
    SHAPES,
    Shape,
    Size,
    head_line,
    parser,
    row,
    size,
    table_head,
    training_steps,
)
from experiments.benchmarks.torch_model import ExitsInTorch
from sweet_jax.config import DTYPES
from sweet_jax.errors import one_line
from sweet_jax.models.deberta import DebertaConfig

SIDES = ("sweet_jax", "torch", "torch.compile")


def torch_exits(shape: Shape, method: str, dtype: str = "float32") -> ExitsInTorch:
    """Returns the shape's model in torch, in training mode; of DeBERTa's all in `dtype`."""
    values = dataclasses.asdict(shape.config)
    if isinstance(shape.config, DebertaConfig):
        del values["embedding_size"]  # 0 is our word for the hidden size
        values["pos_att_type"] = list(values["pos_att_type"])
        encoder = transformers.DebertaModel(transformers.DebertaConfig(**values))
    else:
        settings = transformers.BertConfig(**values, attn_implementation="sdpa")
        encoder = transformers.BertModel(settings, add_pooling_layer=False)
    model = ExitsInTorch(encoder, shape.exits, CLASSES, method, shape.config.pooler_act)
    if model.relative:
        model.to(getattr(torch, dtype))
    return model.to(torch_model.device()).train()


def torch_steps(shape: Shape, method: str, at: Size, dtype: str) -> list[Callable[[], None]]:
    """Functions that take one step in torch and wait for it: eagerly, and compiled.

    Both train one set of parameters: two would not fit beside ours.
    """
    model, where = torch_exits(shape, method, dtype), torch_model.device()
    narrow = dtype == "bfloat16" and not model.relative
    owned = model.owned()
    optimizer = torch_model.make_optimizer(owned, RATE)
    ids = torch.randint(1, shape.config.vocab_size, (at.batch, at.length), device=where)
    labels = torch.randint(0, CLASSES, (at.batch,), device=where)

    def loss() -> torch.Tensor:
        with torch.autocast(where, torch.bfloat16, enabled=narrow):
            return torch_model.summed_loss(model(ids), labels)

    torch.compiler.reset()  # what was compiled for another shape is not this one's

    def take(loss: Callable[[], torch.Tensor]) -> None:
        torch_model.update(owned, optimizer, loss())
        torch_model.fence()

    compiled = torch.compile(loss, dynamic=False)
    return [functools.partial(take, loss), functools.partial(take, compiled)]


def compare(shape: Shape, method: str, at: Size, options: argparse.Namespace) -> dict[str, float]:
    """Returns the median seconds of a step of each side that runs, the sides taking turns."""
    ours = training_steps(shape, method, at, options.dtype)
    # Said at once: a lent machine's time may end before the row.
    print(f"sweet_jax: compiled in {ours.compile_seconds:.0f} s", file=sys.stderr, flush=True)
    theirs = torch_steps(shape, method, at, options.dtype)
    found = dict(zip(SIDES, [ours.take, *theirs], strict=True))
    if options.no_compile:
        del found["torch.compile"]
    for name, take in list(found.items()):
        began = time.perf_counter()
        try:
            take()  # compiles, allocates
        except Exception as error:
            if name != "torch.compile":
                raise
            # It needs a C++ compiler on a CPU and Triton on a GPU; without, the rest still counts.
            print(f"torch.compile is not available: {type(error).__name__}: {one_line(error)}")
            del found[name]
        seconds = time.perf_counter() - began
        print(f"{name}: the first step took {seconds:.0f} s", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.rounds):
        for name, take in found.items():
            take()  # the first after another side's is not counted
            for _ in range(options.steps):
                began = time.perf_counter()
                take()
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main(argv: list[str] | None = None) -> None:
    """Prints one row for each shape, method and size."""
    options = parser(__doc__)
    options.add_argument("--shape", action="append", choices=SHAPES, help="default: minilm")
    options.add_argument("--size", action="append", type=size, help="default: 16x128; repeats")
    options.add_argument("--method", action="append", choices=("sweet", "early_exit"))
    options.add_argument("--dtype", default="float32", choices=DTYPES, help="of activations")
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--steps", type=int, default=3, help="of each side in a round")
    options.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    chosen = options.parse_args(argv)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # DeBERTa: each break of the graph
    torch.set_float32_matmul_precision("high")  # on a GPU TF32, as jax's default there
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{head_line('torch', 'transformers')}; torch: {on}, {torch.get_num_threads()} threads")
    print("examples/s of each side, and what sweet_jax's are a multiple of\n")
    columns = ("shape", "method", "batch", "dtype", *SIDES, "x torch", "x torch.compile")
    print(table_head(*columns), flush=True)
    for name in chosen.shape or ["minilm"]:
        for at in chosen.size or [Size(16, 128)]:
            for method in chosen.method or ("sweet", "early_exit"):
                seconds = compare(SHAPES[name], method, at, chosen)
                speeds = [f"{at.batch / seconds[s]:.2f}" if s in seconds else "" for s in SIDES]
                ratios = [
                    f"{seconds[s] / seconds['sweet_jax']:.2f}" if s in seconds else ""
                    for s in SIDES[1:]
                ]
                print(row(name, method, at, chosen.dtype, *speeds, *ratios), flush=True)


if __name__ == "__main__":
    main()
