"""Shapes of encoders, random rows, and this project's training step on them.

Shape letters: R replica, B batch, L length.
"""

import argparse
import time
from collections.abc import Callable, Sequence
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
from sweet_jax.training.parallel import compile_step
from sweet_jax.training.settings import step_settings
from sweet_jax.training.sharding import (
    batch_sharding,
    drop_replica_axis,
    make_mesh,
    state_shardings,
)
from sweet_jax.training.step import init_state

CLASSES, LEARNING_RATE = 2, 3e-5


class Shape(NamedTuple):
    """Describes an encoder by its sizes, and the layers that have exits."""

    config: EncoderConfig
    exits: tuple[int, ...]

    @property
    def family(self) -> EncoderFamily:
        """Returns the encoder family of the config."""
        return next(f for f in FAMILIES.values() if f.config is type(self.config))

    def model(
        self,
        seed: int = 0,
        dtype: str = "float32",
        *,
        remat: bool = False,
        pooling: str = "first",
    ) -> EarlyExit:
        """Returns a model with random float32 parameters and activations in `dtype`."""
        key = jax.random.key(seed)
        encoder = self.family.encoder(self.config, key, dtype)
        exit_config = ExitConfig(pooling=pooling, remat=remat)
        return EarlyExit(encoder, self.exits, CLASSES, key, exit_config, dtype)


_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_DEBERTA: dict[str, Any] = {  # as in microsoft/deberta-base
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
    """Holds the rows of a batch and the tokens of a row."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


def parse_size(text: str) -> Size:
    """Parses a size such as 16x128. Raises ArgumentTypeError for anything else."""
    batch, _, length = text.partition("x")
    if not (batch.isdecimal() and length.isdecimal() and int(batch) and int(length)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 16x128: batch x length")
    return Size(int(batch), int(length))


def random_rows(vocabulary: int, size: Size, replicas: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a batch of random rows without padding.

    input_ids and token_type_ids are int32 [R, B, L], mask bool [R, B, L], labels int32 [R, B], and
    row_mask bool [R, B].
    """
    rng = np.random.default_rng(seed)
    shape = (replicas, *size)
    return {
        "input_ids": rng.integers(1, vocabulary, shape, dtype=np.int32),
        "token_type_ids": np.zeros(shape, np.int32),
        "mask": np.ones(shape, bool),
        "labels": rng.integers(0, CLASSES, shape[:2], dtype=np.int32),
        "row_mask": np.ones(shape[:2], bool),
    }


def program_memory(program: jax.stages.Compiled) -> Any:
    """Returns the compiler's sizes of a program, in bytes, such as `temp_size_in_bytes`."""
    memory = program.memory_analysis()
    assert memory is not None, "this backend does not report the memory of a program"
    return memory


class TimedStep(NamedTuple):
    """Holds a compiled training step, ready to be timed."""

    take: Callable[[], None]  # takes one step of all replicas, and waits for it
    compile_seconds: float  # of tracing and compiling
    temporaries: int  # bytes, in addition to parameters and optimizer state


def make_training_step(
    shape: Shape,
    method: str,
    size: Size,
    dtype: str = "float32",
    replicas: Sequence[tuple[int, float]] = ((0, LEARNING_RATE),),
    pooling: str = "first",
) -> TimedStep:
    """Compiles this project's training step; each call of it trains on the same random batch.

    Args:
      shape: shape of the encoder.
      method: name of the method.
      size: size of a batch.
      dtype: dtype of the activations.
      replicas: seed and learning rate of each replica.
      pooling: pooling of the exits.

    """
    count = len(replicas)
    graphdef = nnx.split(nnx.eval_shape(lambda: shape.model(0, dtype, pooling=pooling)))[0]
    config = Config(
        method=method, exits=shape.exits, batch_size=size.batch, epochs=1000, dtype=dtype
    )
    settings = step_settings(config.resolved(), graphdef, shape.exits, rows=1000)
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
    host_batch = drop_replica_axis(random_rows(shape.config.vocab_size, size, count), count)
    batch = jax.device_put(host_batch, batch_sharding(mesh, count))
    start = time.perf_counter()
    schedule = settings.schedule
    step = compile_step(settings, count, shardings).lower(state, batch, schedule).compile()
    seconds = time.perf_counter() - start

    def take() -> None:
        nonlocal state
        state, metrics = step(state, batch, schedule)
        jax.block_until_ready((state, metrics))

    return TimedStep(take, seconds, program_memory(step).temp_size_in_bytes)
