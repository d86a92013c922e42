"""What the benchmarks of this project's own side share: shapes, random rows, a step, a head line.

Shape letters: R replica, B batch, L length.
"""

import argparse
import datetime
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from sweet_jax.config import Config
from sweet_jax.models.bert import BertConfig
from sweet_jax.models.deberta import DebertaConfig
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.families import FAMILIES
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.mpnet import MPNetConfig
from sweet_jax.training.fit import step_settings
from sweet_jax.training.parallel import compile_step
from sweet_jax.training.sharding import (
    batch_sharding,
    drop_replica_axis,
    make_mesh,
    state_shardings,
)
from sweet_jax.training.step import init_state

CLASSES, RATE = 2, 3e-5


class Shape(NamedTuple):
    """The sizes of an encoder, and where it has exits."""

    config: EncoderConfig
    exits: tuple[int, ...]

    @property
    def family(self) -> EncoderFamily:
        """The family that the config is of."""
        return next(f for f in FAMILIES.values() if f.config is type(self.config))

    def model(
        self,
        seed: int = 0,
        dtype: str = "float32",
        *,
        remat: bool = False,
        pooling: str = "first",
    ) -> EarlyExit:
        """Returns a model with random parameters, float32; activations in `dtype`."""
        key = jax.random.key(seed)
        encoder = self.family.encoder(self.config, key, dtype)
        exit_config = ExitConfig(pooling=pooling, remat=remat)
        return EarlyExit(encoder, self.exits, CLASSES, key, exit_config, dtype)


_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_DEBERTA = {  # of microsoft/deberta-base
    "position_biased_input": False,
    "relative_attention": True,
    "pos_att_type": ("c2p", "p2c"),
}
SHAPES = {
    "tiny": Shape(BertConfig(**_TINY), (1, 2)),
    "tiny-deberta": Shape(DebertaConfig(vocab_size=330, **_TINY, **_DEBERTA), (1, 2)),
    "minilm": Shape(
        BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536), (1, 2, 4, 6)
    ),
    "bert-base": Shape(BertConfig(), (1, 4, 6, 12)),
    "bert-large": Shape(BertConfig(**_LARGE), (1, 6, 12, 24)),
    "deberta-base": Shape(DebertaConfig(**_DEBERTA), (1, 4, 6, 12)),
    "mpnet-base": Shape(MPNetConfig(max_position_embeddings=514), (1, 4, 6, 12)),
}


class Size(NamedTuple):
    """Rows of a batch, and tokens of a row."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


def size(text: str) -> Size:
    """Parses `16x128`. Raises ArgumentTypeError for anything else."""
    batch, _, length = text.partition("x")
    if not (batch.isdecimal() and length.isdecimal() and int(batch) and int(length)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 16x128: batch x length")
    return Size(int(batch), int(length))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose help is a module's docstring as it stands."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def head_line(*packages: str) -> str:
    """Returns the line that numbers are read under: machine, versions and date."""
    device = jax.devices()[0]
    where = device.device_kind if jax.default_backend() != "cpu" else f"{_processor()}, CPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", *packages))
    return (
        f"{where}, {os.cpu_count()} cores; {versions}, Python {platform.python_version()}; "
        f"{datetime.date.today()}"
    )


def _processor() -> str:
    return platform.processor() or platform.machine()


def row(*cells: Any) -> str:
    """Returns one row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table_head(*names: str) -> str:
    """Returns the first two lines of a Markdown table."""
    return f"{row(*names)}\n{row(*('---' for _ in names))}"


def random_rows(vocabulary: int, size: Size, replicas: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a batch without padding: arrays [R, B, L], labels [R, B]."""
    rng = np.random.default_rng(seed)
    shape = (replicas, *size)
    return {
        "input_ids": rng.integers(1, vocabulary, shape, dtype=np.int32),
        "token_type_ids": np.zeros(shape, np.int32),
        "mask": np.ones(shape, bool),
        "labels": rng.integers(0, CLASSES, shape[:2], dtype=np.int32),
        "row_mask": np.ones(shape[:2], bool),
    }


class Steps(NamedTuple):
    """A compiled training step."""

    take: Callable[[], None]  # one step of all replicas, awaited
    compile_seconds: float  # tracing and compiling
    temporaries: int  # bytes, besides parameters and optimizer state


def training_steps(
    shape: Shape,
    method: str,
    size: Size,
    dtype: str = "float32",
    replicas: Sequence[tuple[int, float]] = ((0, RATE),),
    pooling: str = "first",
) -> Steps:
    """Compiles our step on one random batch; replicas are (seed, learning rate)."""
    count = len(replicas)
    graphdef = nnx.split(nnx.eval_shape(lambda: shape.model(0, dtype, pooling=pooling)))[0]
    run = Config(method=method, exits=shape.exits, batch_size=size.batch, epochs=1000, dtype=dtype)
    settings = step_settings(run.resolved(), graphdef, shape.exits, rows=1000)
    mesh = make_mesh(count, size.batch)
    states = [
        init_state(
            nnx.to_pure_dict(nnx.split(shape.model(seed, dtype, pooling=pooling))[1]), rate, seed
        )
        for seed, rate in replicas
    ]
    stacked = jax.tree.map(lambda *x: np.stack([np.asarray(a) for a in x]), *states)
    host_state = drop_replica_axis(stacked, count)
    shardings = state_shardings(mesh, host_state, count)
    state = jax.device_put(host_state, shardings)
    host = drop_replica_axis(random_rows(shape.config.vocab_size, size, count), count)
    batch = jax.device_put(host, batch_sharding(mesh, count))
    began = time.perf_counter()
    schedule = settings.schedule
    step = compile_step(settings, count, shardings).lower(state, batch, schedule).compile()
    seconds = time.perf_counter() - began

    def take() -> None:
        nonlocal state
        state, metrics = step(state, batch, schedule)
        jax.block_until_ready((state, metrics))

    return Steps(take, seconds, step.memory_analysis().temp_size_in_bytes)
