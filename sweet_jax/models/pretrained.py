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

from sweet_jax.errors import UserError
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
        """Returns the encoder family's name, even if config.json does not state it."""
        return self.family.model_type

    @property
    def vocab_size(self) -> int:
        """Returns the number of token ids: if config.json has none, the family's default."""
        return self.config.vocab_size

    @property
    def depth(self) -> int:
        """Returns the number of encoder layers."""
        return self.config.num_hidden_layers

    @functools.cached_property
    def weights(self) -> Weights:
        """Returns the pretrained weights, which are read at first use and then cached.

        Raises UserError as `read_weights` does.
        """
        return read_weights(self.folder, self.family, self.config)

    def encoder(self, key: jax.Array, dtype=jnp.float32, depth: int | None = None) -> Encoder:
        """Returns the encoder with random parameters.

        Args:
          key: typed key for the parameters.
          dtype: dtype of the activations.
          depth: number of layers to build, None for all.

        """
        config = dataclasses.replace(self.config, num_hidden_layers=depth or self.depth)
        return self.family.encoder(config, key, dtype)


def open_checkpoint(name: str) -> Checkpoint:
    """Locates a checkpoint (see `locate_checkpoint`) and reads the configuration of its family.

    A model_type that no family of this package has may be that of an installed extension, see
    `registry`.

    Raises UserError if the checkpoint is missing, has an unsupported architecture, or has no
    readable config.json.
    """
    files = locate_checkpoint(name)
    kind = files.values.get("model_type")
    if not kind:
        kind = guess_model_type(files.folder, files.values, FAMILIES.values())
    # Not by FAMILIES[kind], which imports "module:OBJECT": the files name a kind, and no code.
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        short_name = name if len(name) <= 24 else f"…{name[-23:]}"
        # Of a saved model, which was trained where the family was known; a Multi-Model has folders.
        saved = any((f / "exits.json").exists() for f in (files.folder, files.folder.parent))
        fix = ": install the package that defines this family" if kind and saved else ""
        raise UserError(
            f"checkpoint {short_name!r} has model_type {repr(kind)[:20]}; supported are "
            f"{', '.join(FAMILIES)}{fix}"
        )
    try:
        config = family.config.from_values(files.values)
    except UserError as error:
        raise UserError(f"checkpoint {name!r} has {error}") from error
    return Checkpoint(files.folder, files.values, family, config)


def load_encoder(name: str | Path) -> Callable[..., tuple[jax.Array, ...]]:
    """Loads the pretrained encoder, without exits, as a function that returns all hidden states.

    Args:
      name: hub id, local directory (which may be a saved `model/`) or `pkg://package/path`.

    Returns:
      A function f(input_ids, attention_mask=None, token_type_ids=None) of integer arrays [B, L]. It
      returns a tuple of float32 arrays [B, L, H]: the output of the embeddings and then of every
      layer. It is compiled once for each shape, and raises ValueError if the input is empty or too
      long, or has ids without a row in their table.

    Raises:
      UserError: as `open_checkpoint` and `read_weights` do.

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
            most = "" if limit is None else f", with L at most {limit}"
            raise ValueError(f"input_ids must be a nonempty array [B, L]{most}; got {ids.shape}")
        mask = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask)
        types = jnp.zeros_like(ids) if token_type_ids is None else jnp.asarray(token_type_ids)
        config = checkpoint.config
        for name, values, rows in (
            ("input_ids", ids, config.vocab_size),
            ("token_type_ids", types, config.type_vocab_size),
        ):
            # The values are unknown while an enclosing function is traced.
            concrete = rows and values.size and not isinstance(values, jax.core.Tracer)
            if concrete and not 0 <= int(values.min()) <= int(values.max()) < rows:
                raise ValueError(
                    f"{name} must be from 0 to {rows - 1}; got {values.min()} to {values.max()}: "
                    "use the tokenizer of this checkpoint"
                )
        return run(params, ids, mask.astype(bool), types.astype(jnp.int32))

    return encode


def hidden_states(encoder: Encoder, input_ids, mask, token_type_ids) -> tuple[jax.Array, ...]:
    """Returns the outputs of the embeddings and of every layer, each [B, L, H], without dropout."""
    h = [encoder.embed(input_ids, token_type_ids, mask)]
    relative = encoder.relative_table()
    for number in range(1, encoder.config.num_hidden_layers + 1):
        h.append(encoder.layer(number, h[-1], mask, relative=relative))
    if encoder.final_norm is not None:
        h[-1] = encoder.final_norm(h[-1])
    return tuple(h)
