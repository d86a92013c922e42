"""Examples per second of a training step: this project against the same model in torch.

    pip install -e ".[torch]"
    python -m experiments.benchmarks.train_step --shape=minilm --shape=bert-base

Same work on both sides: random encoder of that shape, exits with pooler, dropout 0.1 and
classifier, cross-entropy summed over exits, gradient clipping per owner, AdamW, float32, batch
16 x 128 without padding. torch runs transformers' BertModel with its SDPA attention, eagerly. The
two sides take turns, a few steps each, in one process; the median step of each is compared.
2 cores need about 6 minutes for both shapes.
"""

import argparse
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from experiments.benchmarks.memory import SHAPES
from sweet_jax.config import Config
from sweet_jax.models.bert import Bert, BertConfig
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.training.run import compile_step, step_settings
from sweet_jax.training.sharding import by_replica, by_row, make_mesh
from sweet_jax.training.step import new_state

BATCH, LENGTH, CLASSES, RATE = 16, 128, 2, 3e-5


def jax_step(config: BertConfig, exits: tuple[int, ...], method: str) -> Callable[[], None]:
    """A function that takes one step of this project and waits for it."""
    key = jax.random.key(0)
    graphdef, values = nnx.split(EarlyExit(Bert(config, key), exits, CLASSES, key))
    run = Config(method=method, exits=exits, batch_size=BATCH, epochs=1000).resolved()
    settings = step_settings(run, graphdef, exits, rows=1000)
    mesh = make_mesh(1, BATCH)
    state = new_state(nnx.to_pure_dict(values), RATE, 0)
    state = jax.device_put(state, by_replica(mesh, 1))
    step = compile_step(settings, 1, mesh, 1)
    rng = np.random.default_rng(0)
    host = {
        "input_ids": rng.integers(1, config.vocab_size, (BATCH, LENGTH), dtype=np.int32),
        "token_type_ids": np.zeros((BATCH, LENGTH), np.int32),
        "mask": np.ones((BATCH, LENGTH), bool),
        "labels": rng.integers(0, CLASSES, (BATCH,), dtype=np.int32),
    }
    batch = jax.device_put(host, by_row(mesh, 1))

    def take() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return take


def torch_step(config: BertConfig, exits: tuple[int, ...], method: str) -> Callable[[], None]:
    """A function that takes one step of the same model in torch."""
    settings = transformers.BertConfig(**dataclasses.asdict(config), attn_implementation="sdpa")
    model = transformers.BertModel(settings, add_pooling_layer=False).train()
    hidden = config.hidden_size
    heads = torch.nn.ModuleList(
        torch.nn.Sequential(
            torch.nn.Linear(hidden, hidden),
            torch.nn.Tanh(),
            torch.nn.Dropout(config.hidden_dropout_prob),
            torch.nn.Linear(hidden, CLASSES),
        )
        for _ in exits
    )
    starts = (0, *exits[:-1])
    owned = [
        [*heads[i].parameters(), *model.encoder.layer[start:end].parameters()]
        for i, (start, end) in enumerate(zip(starts, exits, strict=True))
    ]
    owned[0] += model.embeddings.parameters()
    parameters = [p for group in owned for p in group]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    ids = torch.randint(1, config.vocab_size, (BATCH, LENGTH))
    labels = torch.randint(0, CLASSES, (BATCH,))
    mask = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)

    def take() -> None:
        h, losses = model.embeddings(ids), []
        for number, layer in enumerate(model.encoder.layer, start=1):
            h = layer(h, mask)
            h = h[0] if isinstance(h, tuple) else h
            if number in exits:
                logits = heads[exits.index(number)](h[:, 0])
                losses.append(torch.nn.functional.cross_entropy(logits, labels))
                h = h.detach() if method == "sweet" else h
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        for group in owned:
            torch.nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()

    return take


def compare(shape: str, method: str, rounds: int, steps: int) -> tuple[float, float]:
    """Median seconds of a step (this project, torch), the two taking turns."""
    sides = [make(*SHAPES[shape], method) for make in (jax_step, torch_step)]
    times: list[list[float]] = [[], []]
    for take in sides:
        take()  # compiles, allocates
    for _ in range(rounds):
        for take, seconds in zip(sides, times, strict=True):
            take()  # the first after the other side's is not counted
            for _ in range(steps):
                began = time.perf_counter()
                take()
                seconds.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Prints one line for each shape and method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: minilm")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    options = parser.parse_args()
    print(
        f"batch {BATCH} x {LENGTH}, float32, {torch.get_num_threads()} threads, "
        f"{jax.default_backend()}, jax {jax.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, python {platform.python_version()}"
    )
    for shape in options.shape or ["minilm"]:
        for method in ("sweet", "early_exit"):
            ours, theirs = compare(shape, method, options.rounds, options.steps)
            print(
                f"{shape:>10} {method:>11}: sweet_jax {BATCH / ours:7.2f} examples/s, "
                f"torch {BATCH / theirs:7.2f} examples/s, ratio {theirs / ours:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
