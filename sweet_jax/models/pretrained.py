"""Hugging Face checkpoints: found by name, their configuration, tokenizer and encoder.

Shape letters: B batch, L length, H hidden.
"""

import dataclasses
import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.config import UserError
from sweet_jax.files import resolve_path
from sweet_jax.models.checkpoint_files import encoder_folder, guess_model_type, tokenizer_options
from sweet_jax.models.encoder import Encoder
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.families import FAMILIES
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.weights import Weights, read_weights

_SENTENCEPIECE = ("spm.model", "spiece.model", "sentencepiece.bpe.model")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", *_SENTENCEPIECE)
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "merges.txt"]
_FILES += [*_VOCABULARIES, "special_tokens_map.json", "added_tokens.json", "exits.json"]
_FILES += ["depth_*/config.json"]  # a saved Multi-Model's shallower models
_FILES += ["modules.json", "*_Pooling/config.json"]  # sentence-transformers' read-out
_FILES += ["adapter_config.json", *(f"0_Transformer/{name}" for name in _FILES)]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Describes a checkpoint on disk: its folder, encoder family and configuration."""

    folder: Path
    family: EncoderFamily
    config: EncoderConfig

    @property
    def model_type(self) -> str:
        """The family's name in config.json."""
        return self.family.model_type

    @property
    def depth(self) -> int:
        """Number of encoder layers."""
        return self.config.num_hidden_layers

    @functools.cached_property
    def weights(self) -> Weights:
        """The pretrained weights, read at the first use and kept as long as this value is.

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
    """Finds a checkpoint by hub id, local directory or `pkg://package/path`; reads its config.

    Raises UserError when it is absent, of another architecture, or its config is unreadable.
    """
    folder = resolve_path(name)
    if not os.path.isdir(folder):  # also False where permission is lacking
        if name.startswith(("pkg://", "/", ".", "~")):
            raise UserError(f"checkpoint {name!r} is not a directory")
        folder = _from_hub(name)
    folder = encoder_folder(folder)
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {name!r} has no readable config.json: {error}") from error
    kind = values.get("model_type") or guess_model_type(folder, values, FAMILIES.values())
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        shown = name if len(name) <= 24 else f"…{name[-23:]}"
        raise UserError(
            f"checkpoint {shown!r} is of model_type {repr(kind)[:20]}; supported are "
            f"{', '.join(FAMILIES)}"
        )
    try:
        return Checkpoint(folder, family, family.config.from_values(values))
    except UserError as error:
        raise UserError(f"checkpoint {name!r} has {error}") from error


def _from_hub(name: str) -> Path:
    import huggingface_hub  # heavy, and not needed for local files

    def fetch(patterns: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))

    try:
        folder = fetch(_FILES)
        # Pickles are large, and not wanted beside safetensors.
        return folder if [*folder.rglob("*.safetensors")] else fetch([*_FILES, "*pytorch_model*"])
    except Exception as error:  # the client raises many kinds; each means the same to a user
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {name!r} is neither a local directory nor to be had from the hub "
            f"({reason}): check the name and the network"
        ) from error


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Loads the checkpoint's own fast tokenizer. Raises UserError where there is none."""
    import transformers  # heavy, and not needed for the arithmetic

    # Without files transformers makes an empty tokenizer, in which every word is unknown.
    found = [name for name in _VOCABULARIES if (checkpoint.folder / name).exists()]
    if not found:
        raise UserError(f"no {' or '.join(_VOCABULARIES)} in {str(checkpoint.folder)!r}")
    if set(found) <= {*_SENTENCEPIECE} and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"the tokenizer in {str(checkpoint.folder)!r} is a SentencePiece model, {found[0]}: "
            'pip install -e ".[sentencepiece]" to read it'
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            checkpoint.folder,
            trust_remote_code=False,
            local_files_only=True,
            **tokenizer_options(checkpoint.folder, checkpoint.model_type),
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no tokenizer in {str(checkpoint.folder)!r}: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{str(checkpoint.folder)!r} has no fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer in {str(checkpoint.folder)!r} has no padding token")
    if max(tokenizer.get_vocab().values()) >= checkpoint.config.vocab_size:
        raise UserError(
            f"the tokenizer in {str(checkpoint.folder)!r} has more tokens than the checkpoint's "
            f"vocab_size, {checkpoint.config.vocab_size}"
        )
    if checkpoint.family.repair_tokenizer is not None:
        checkpoint.family.repair_tokenizer(tokenizer)
    return tokenizer


def load_encoder(name: str) -> Callable[..., tuple[jax.Array, ...]]:
    """Loads the pretrained encoder alone, as a function that returns every hidden state.

    Args:
      name: hub id, local directory (also a saved `model/`) or `pkg://package/path`.

    Returns:
      f(input_ids, attention_mask=None, token_type_ids=None) for integer arrays [B, L], which
      returns a tuple of float32 [B, L, H]: the embeddings' output and then every layer's. It is
      compiled once per shape, and raises ValueError for input that is too long and for ids without
      a row in their table.

    Raises:
      UserError: see `open_checkpoint` and `read_weights`.

    """
    checkpoint = open_checkpoint(name)
    graphdef = nnx.split(nnx.eval_shape(lambda: checkpoint.encoder(jax.random.key(0))))[0]
    params = jax.tree.map(jnp.asarray, checkpoint.weights.encoder)

    @jax.jit
    def run(params, input_ids, mask, token_type_ids):
        return hidden_states(nnx.merge(graphdef, params), input_ids, mask, token_type_ids)

    def encode(input_ids, attention_mask=None, token_type_ids=None) -> tuple[jax.Array, ...]:
        ids = jnp.asarray(input_ids, jnp.int32)
        limit = checkpoint.config.positions
        if ids.ndim != 2 or (limit is not None and ids.shape[1] > limit):
            most = "" if limit is None else f" with L up to {limit}"
            raise ValueError(f"input_ids must be [B, L]{most}; got {ids.shape}")
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
