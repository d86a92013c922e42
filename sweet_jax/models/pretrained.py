"""Hugging Face checkpoints of the encoder families: configuration, weights, encoder.

Shape letters: B batch, L length, H hidden.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.config import UserError
from sweet_jax.models.checkpoint_folder import CheckpointFiles, locate_checkpoint
from sweet_jax.models.encoder import Encoder
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.families import FAMILIES
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.model_type import guess_model_type
from sweet_jax.models.weights import Weights, read_weights


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint(CheckpointFiles):
    """Describes a checkpoint on disk: its files, encoder family and configuration."""

    family: EncoderFamily
    config: EncoderConfig

    @property
    def model_type(self) -> str:
        """Returns the encoder family's name, also where config.json does not say."""
        return self.family.model_type

    @property
    def vocab_size(self) -> int:
        """Returns the number of token ids, the family's default where config.json does not say."""
        return self.config.vocab_size

    @property
    def depth(self) -> int:
        """Returns the number of encoder layers."""
        return self.config.num_hidden_layers

    @functools.cached_property
    def weights(self) -> Weights:
        """Returns the pretrained weights, read at the first use and kept as long as this value is.

        Raises UserError: see `read_weights`.
        """
        return read_weights(self.folder, self.family, self.config)

    def encoder(self, key: jax.Array, dtype=jnp.float32, depth: int | None = None) -> Encoder:
        """Returns the encoder with random parameters from a typed key.

        dtype is that of activations; depth is how many of its layers, None for all.
        """
        config = dataclasses.replace(self.config, num_hidden_layers=depth or self.depth)
        return self.family.encoder(config, key, dtype)


def open_checkpoint(name: str) -> Checkpoint:
    """Finds a checkpoint, see `locate_checkpoint`, and reads its family's configuration.

    Raises UserError when it is absent, of another architecture, or its config is unreadable.
    """
    files = locate_checkpoint(name)
    kind = files.values.get("model_type")
    if not kind:
        kind = guess_model_type(files.folder, files.values, FAMILIES.values())
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        shown = name if len(name) <= 24 else f"…{name[-23:]}"
        raise UserError(
            f"checkpoint {shown!r} is of model_type {repr(kind)[:20]}; supported are "
            f"{', '.join(FAMILIES)}"
        )
    try:
        config = family.config.from_values(files.values)
    except UserError as error:
        raise UserError(f"checkpoint {name!r} has {error}") from error
    return Checkpoint(files.folder, files.values, family, config)


def load_encoder(name: str | Path) -> Callable[..., tuple[jax.Array, ...]]:
    """Loads the pretrained encoder alone, as a function that returns every hidden state.

    Args:
      name: hub id, local directory (also a saved `model/`) or `pkg://package/path`.

    Returns:
      f(input_ids, attention_mask=None, token_type_ids=None) for integer arrays [B, L], which
      returns a tuple of float32 [B, L, H]: the embeddings' output and then every layer's. It is
      compiled once per shape, and raises ValueError for input that is empty or too long and for ids
      without a row in their table.

    Raises:
      UserError: see `open_checkpoint` and `read_weights`.

    """
    checkpoint = open_checkpoint(str(name))
    graphdef = nnx.split(nnx.eval_shape(lambda: checkpoint.encoder(jax.random.key(0))))[0]
    params = jax.tree.map(jnp.asarray, checkpoint.weights.encoder)

    @jax.jit
    def run(params, input_ids, mask, token_type_ids):
        return hidden_states(nnx.merge(graphdef, params), input_ids, mask, token_type_ids)

    def encode(input_ids, attention_mask=None, token_type_ids=None) -> tuple[jax.Array, ...]:
        ids = jnp.asarray(input_ids, jnp.int32)
        limit = checkpoint.config.positions
        if ids.ndim != 2 or not ids.size or (limit is not None and ids.shape[1] > limit):
            most = "" if limit is None else f" with L up to {limit}"
            raise ValueError(f"input_ids must be [B, L], not empty{most}; got {ids.shape}")
        mask = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask)
        types = jnp.zeros_like(ids) if token_type_ids is None else jnp.asarray(token_type_ids)
        config = checkpoint.config
        for name, values, rows in (
            ("input_ids", ids, config.vocab_size),
            ("token_type_ids", types, config.type_vocab_size),
        ):
            # While another program is traced the values are not known.
            known = rows and values.size and not isinstance(values, jax.core.Tracer)
            if known and not 0 <= int(values.min()) <= int(values.max()) < rows:
                raise ValueError(
                    f"{name} must be from 0 to {rows - 1}; got {values.min()} to {values.max()}: "
                    "are they another tokenizer's?"
                )
        return run(params, ids, mask.astype(bool), types.astype(jnp.int32))

    return encode


def hidden_states(encoder: Encoder, input_ids, mask, token_type_ids) -> tuple[jax.Array, ...]:
    """Returns the embeddings' output and every layer's, each [B, L, H], without dropout."""
    h = [encoder.embed(input_ids, token_type_ids, mask)]
    relative = encoder.relative_table()
    for number in range(1, encoder.config.num_hidden_layers + 1):
        h.append(encoder.layer(number, h[-1], mask, relative=relative))
    if encoder.final_norm is not None:
        h[-1] = encoder.final_norm(h[-1])
    return tuple(h)
