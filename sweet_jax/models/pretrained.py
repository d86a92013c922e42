"""Checkpoints under their Hugging Face names: found, read, checked, written.

Shape letters: B batch, L length, H hidden.
"""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.config import UserError
from sweet_jax.data.read import resolve_path
from sweet_jax.models.bert import Bert, BertConfig, Roberta, RobertaConfig
from sweet_jax.models.deberta import Deberta, DebertaConfig
from sweet_jax.models.deberta_v2 import DebertaV2, DebertaV2Config
from sweet_jax.models.encoder import Encoder
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.tensor_names import (
    NOT_ENCODER,
    hugging_face_name,
    is_transposed,
    normalize_name,
)
from sweet_jax.models.tensors import read_tensors

# The encoder that a checkpoint's model_type stands for.
ENCODERS: dict[str, tuple[type[EncoderConfig], type[Encoder]]] = {
    "bert": (BertConfig, Bert),
    "roberta": (RobertaConfig, Roberta),
    "deberta": (DebertaConfig, Deberta),
    "deberta-v2": (DebertaV2Config, DebertaV2),
}
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spm.model")
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "merges.txt"]
_FILES += [*_VOCABULARIES, "special_tokens_map.json", "added_tokens.json", "exits.json"]
_FILES += ["depth_*/config.json"]  # a saved Multi-Model's shallower models
_FILES += ["modules.json", "*_Pooling/config.json"]  # sentence-transformers' read-out


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder, its kind of encoder and that encoder's configuration."""

    folder: Path
    model_type: str
    config: EncoderConfig

    @property
    def depth(self) -> int:
        """Number of encoder layers."""
        return self.config.num_hidden_layers

    @property
    def architecture(self) -> str:
        """Hugging Face's name of the class of the encoder alone."""
        return ENCODERS[self.model_type][1].__name__ + "Model"

    def encoder(self, key: jax.Array, dtype=jnp.float32, depth: int | None = None) -> Encoder:
        """The encoder with random parameters from a typed key, of all layers or the first."""
        config = dataclasses.replace(self.config, num_hidden_layers=depth or self.depth)
        return ENCODERS[self.model_type][1](config, key, dtype)


def open_checkpoint(name: str) -> Checkpoint:
    """Finds a checkpoint by hub id, local directory or `pkg://package/path`; reads its config.

    Raises UserError when it is absent, of another architecture, or its config is unreadable.
    """
    folder = resolve_path(name)
    if not os.path.isdir(folder):  # False, too, of one that may not be looked at
        if name.startswith(("pkg://", "/", ".", "~")):
            raise UserError(f"checkpoint {name!r} is not a directory")
        folder = _from_hub(name)
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {name!r} has no readable config.json: {error}") from error
    kind = values.get("model_type")
    if kind not in ENCODERS:
        raise UserError(
            f"checkpoint {name!r} is of model_type {kind!r}; supported are {', '.join(ENCODERS)}"
        )
    try:
        return Checkpoint(folder, kind, ENCODERS[kind][0].from_values(values))
    except UserError as error:
        raise UserError(f"checkpoint {name!r} has {error}") from error


def _from_hub(name: str) -> Path:
    import huggingface_hub  # heavy, and not needed for local files

    def fetch(patterns: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))

    try:
        folder = fetch(_FILES)
        # Pickles are large, and not wanted beside safetensors.
        return folder if [*folder.glob("*.safetensors")] else fetch([*_FILES, "pytorch_model*"])
    except Exception as error:  # the client raises many kinds; each means the same to a user
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {name!r} is neither a local directory nor to be had from the hub "
            f"({reason}): check the name and the network"
        ) from error


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own fast tokenizer. Raises UserError where there is none."""
    import transformers  # heavy, and not needed for the arithmetic
    from tokenizers import processors

    # Without files transformers makes an empty tokenizer, to which all words are unknown.
    found = [name for name in _VOCABULARIES if (checkpoint.folder / name).exists()]
    if not found:
        raise UserError(f"no {' or '.join(_VOCABULARIES)} in {str(checkpoint.folder)!r}")
    if found == ["spm.model"] and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"the tokenizer in {str(checkpoint.folder)!r} is a SentencePiece model, spm.model: "
            'pip install -e ".[sentencepiece]" to read it'
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=False, local_files_only=True
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
    if checkpoint.model_type == "deberta":
        # Pairs as DeBERTa was pretrained on: transformers 5 puts two [SEP] between them.
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[
                ("[CLS]", tokenizer.cls_token_id),
                ("[SEP]", tokenizer.sep_token_id),
            ],
        )
    return tokenizer


def read_encoder(
    checkpoint: Checkpoint,
    depth: int | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> tuple[Any, Any]:
    """Pretrained encoder parameters up to layer `depth`, and the pooler's or None.

    Returns pure dicts of float32 arrays, the encoder's as `nnx.split(checkpoint.encoder(key))` has.
    `tensors` are the folder's, where they have been read already. Raises UserError naming every
    missing, unexpected or misshapen tensor, or a damaged file.
    """
    tensors = read_tensors(checkpoint.folder) if tensors is None else tensors
    tensors = {normalize_name(name): value for name, value in tensors.items()}
    wanted = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: _random(checkpoint)))[1])
    paths = jax.tree_util.tree_leaves_with_path(wanted)
    names = {hugging_face_name(tuple(p.key for p in path)): leaf for path, leaf in paths}
    shapes = {name: tuple(leaf.shape) for name, leaf in names.items()}
    shapes = {n: shape[::-1] if is_transposed(n) else shape for n, shape in shapes.items()}
    hidden = checkpoint.config.hidden_size
    pooler = {"pooler.dense.weight": (hidden, hidden), "pooler.dense.bias": (hidden,)}
    found = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [
            name for name in tensors if name not in shapes | pooler and not NOT_ENCODER.match(name)
        ],
        "misshapen": [
            f"{name} {tensors[name].shape} instead of {shape}"
            for name, shape in (shapes | pooler).items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if any(found.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in found.items() if names)
        raise UserError(f"tensors in {str(checkpoint.folder)!r} do not fit its config: {listed}")

    def pick(path, leaf) -> np.ndarray:
        return _ours(hugging_face_name(tuple(p.key for p in path)), tensors)

    encoder = jax.tree.map_with_path(pick, wanted)
    if depth is not None:
        encoder["layers"] = {i: encoder["layers"][i] for i in range(depth)}
    if not all(name in tensors for name in pooler):
        return encoder, None
    kernel, bias = (_ours(name, tensors) for name in pooler)
    return encoder, {"kernel": kernel, "bias": bias}


def load_encoder(name: str) -> Callable[..., tuple[jax.Array, ...]]:
    """The pretrained encoder alone, as a function that gives every hidden state.

    Args:
      name: hub id, local directory (a saved `model/` too) or `pkg://package/path`.

    Returns:
      f(input_ids, attention_mask=None, token_type_ids=None) for integer arrays [B, L]: a tuple of
      float32 [B, L, H], the embeddings' output and then every layer's. Compiled once per shape.
      It raises ValueError for input that is too long, and for ids that have no row in their table.

    Raises:
      UserError: see `open_checkpoint` and `read_encoder`.

    """
    checkpoint = open_checkpoint(name)
    graphdef = nnx.split(nnx.eval_shape(lambda: _random(checkpoint)))[0]
    params = jax.tree.map(jnp.asarray, read_encoder(checkpoint)[0])

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
            # Inside another program the values are not known; jax would read NaN for them.
            known = rows and values.size and not isinstance(values, jax.core.Tracer)
            if known and not 0 <= int(values.min()) <= int(values.max()) < rows:
                raise ValueError(
                    f"{name} must be from 0 to {rows - 1}; got {values.min()} to {values.max()}: "
                    "are they another tokenizer's?"
                )
        return run(params, ids, mask.astype(bool), types.astype(jnp.int32))

    return encode


def hidden_states(encoder: Encoder, input_ids, mask, token_type_ids) -> tuple[jax.Array, ...]:
    """Embedding output and every layer's, each [B, L, H], without dropout."""
    h = [encoder.embed(input_ids, token_type_ids, mask)]
    relative = encoder.relative_table()
    for number in range(1, encoder.config.num_hidden_layers + 1):
        h.append(encoder.layer(number, h[-1], mask, relative=relative))
    return tuple(h)


def _random(checkpoint: Checkpoint) -> Encoder:
    return checkpoint.encoder(jax.random.key(0))


def _ours(name: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    value = tensors[name].astype(np.float32)
    return np.ascontiguousarray(value.T) if is_transposed(name) else value
