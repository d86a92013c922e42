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
    LEARNING_RATE,
    SHAPES,
    Shape,
    Size,
    make_training_step,
    parse_size,
)
from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.benchmarks.timing import time_in_turns
from experiments.benchmarks.torch_model import EarlyExitInTorch
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import DTYPES
from sweet_jax.errors import one_line
from sweet_jax.models.deberta import DebertaConfig

_SIDES = ("sweet_jax", "torch", "torch.compile")
_METHODS = ("sweet", "early_exit")


def make_torch_model(shape: Shape, method: str, dtype: str = "float32") -> EarlyExitInTorch:
    """Returns the model of a shape in torch, in training mode.

    dtype: of DeBERTa's parameters; BERT's are float32.
    """
    values = dataclasses.asdict(shape.config)
    if isinstance(shape.config, DebertaConfig):
        del values["embedding_size"]  # a field of this project, where 0 means the hidden size
        values["pos_att_type"] = list(values["pos_att_type"])
        encoder = transformers.DebertaModel(transformers.DebertaConfig(**values))
    else:
        config = transformers.BertConfig(**values, attn_implementation="sdpa")
        encoder = transformers.BertModel(config, add_pooling_layer=False)
    model = EarlyExitInTorch(encoder, shape.exits, CLASSES, method, shape.config.pooler_act)
    if model.is_deberta:
        model.to(getattr(torch, dtype))
    return model.to(torch_model.device()).train()


def make_torch_steps(shape: Shape, method: str, size: Size, dtype: str) -> list[Callable[[], None]]:
    """Returns two functions that take one step in torch and wait for it: eager, and compiled.

    Both train the same parameters: two sets would not fit into the memory beside this project's.
    """
    model, device = make_torch_model(shape, method, dtype), torch_model.device()
    autocast = dtype == "bfloat16" and not model.is_deberta
    owned = model.owned_parameters()
    optimizer = torch_model.make_optimizer(owned, LEARNING_RATE)
    ids = torch.randint(1, shape.config.vocab_size, (size.batch, size.length), device=device)
    labels = torch.randint(0, CLASSES, (size.batch,), device=device)

    def loss() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return torch_model.summed_loss(model(ids), labels)

    torch.compiler.reset()  # drops what was compiled for another shape

    def take(loss: Callable[[], torch.Tensor]) -> None:
        torch_model.update(owned, optimizer, loss())
        torch_model.synchronize()

    compiled = torch.compile(loss, dynamic=False)
    return [functools.partial(take, loss), functools.partial(take, compiled)]


def compare(shape: Shape, method: str, size: Size, options: argparse.Namespace) -> dict[str, float]:
    """Returns the median seconds of a step of each side that this machine can run."""
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
