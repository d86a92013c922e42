"""Checkpoints under their Hugging Face names: found, read, checked, written.

Shape letters: B batch, L length, H hidden.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from sweet_jax.config import UserError
from sweet_jax.data.read import resolve_path
from sweet_jax.models.bert import ACTIVATIONS, Bert, BertConfig
from sweet_jax.models.names import NOT_ENCODER, canonical, hugging_face_name, is_matrix

_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab.txt"]
_FILES += ["special_tokens_map.json", "exits.json"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder and the encoder's configuration."""

    folder: Path
    config: BertConfig

    @property
    def depth(self) -> int:
        """Number of encoder layers."""
        return self.config.num_hidden_layers


def open_checkpoint(name: str) -> Checkpoint:
    """Finds a checkpoint by hub id, local directory or `pkg://package/path`; reads its config.

    Raises UserError when it is absent, of another architecture, or its config is unreadable.
    """
    folder = resolve_path(name)
    if not folder.is_dir():
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
    if kind != "bert":
        raise UserError(f"checkpoint {name!r} is of model_type {kind!r}; only 'bert' is supported")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(
            f"checkpoint {name!r} has {values['position_embedding_type']!r} position embeddings; "
            "only 'absolute' is supported"
        )
    if values.get("is_decoder"):
        raise UserError(f"checkpoint {name!r} is a decoder; only encoders are supported")
    known = {field.name: type(field.default) for field in dataclasses.fields(BertConfig)}
    for key, kind in known.items():
        if key in values and not isinstance(values[key], (int, float) if kind is float else kind):
            raise UserError(f"checkpoint {name!r}: {key} is {values[key]!r} in its config.json")
    config = BertConfig(**{k: v for k, v in values.items() if k in known})
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"checkpoint {name!r} has the activation {config.hidden_act!r}; supported "
            f"are {', '.join(ACTIVATIONS)}"
        )
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"checkpoint {name!r} has hidden_size {config.hidden_size}, not a multiple of its "
            f"num_attention_heads {config.num_attention_heads}"
        )
    return Checkpoint(folder, config)


def _from_hub(name: str) -> Path:
    import huggingface_hub  # heavy, and not needed for local files

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # the client raises many kinds; each means the same to a user
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {name!r} is neither a local directory nor to be had from the hub "
            f"({reason}): check the name and the network"
        ) from error


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own fast tokenizer. Raises UserError where there is none."""
    import transformers  # heavy, and not needed for the arithmetic

    # Without files transformers makes an empty tokenizer, to which all words are unknown.
    if not any((checkpoint.folder / name).exists() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"no tokenizer.json or vocab.txt in {str(checkpoint.folder)!r}")
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
    return tokenizer


def read_encoder(checkpoint: Checkpoint, depth: int | None = None) -> tuple[Any, Any]:
    """Pretrained encoder parameters up to layer `depth`, and the pooler's or None.

    Returns pure dicts of float32 arrays, the encoder's shaped like `nnx.split(Bert(config, key))`.
    Raises UserError naming every missing, unexpected or misshapen tensor, or a damaged file.
    """
    tensors = {canonical(name): value for name, value in _read_tensors(checkpoint.folder).items()}
    config = checkpoint.config
    whole = nnx.eval_shape(lambda: Bert(config, jax.random.key(0)))
    wanted = nnx.to_pure_dict(nnx.split(whole)[1])
    paths = jax.tree_util.tree_leaves_with_path(wanted)
    names = {hugging_face_name(tuple(p.key for p in path)): leaf for path, leaf in paths}
    pooler = [f"pooler.dense.{leaf}" for leaf in ("weight", "bias")]
    missing = [name for name in names if name not in tensors]
    extra = [
        name
        for name in tensors
        if name not in names and name not in pooler and not NOT_ENCODER.match(name)
    ]
    shapes = {name: tuple(leaf.shape) for name, leaf in names.items()}
    for name, shape in shapes.items():
        shapes[name] = shape[::-1] if is_matrix(name) else shape
    misshapen = [
        f"{name} {tensors[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    found = {"missing": missing, "unexpected": extra, "misshapen": misshapen}
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
    return encoder, {"kernel": _ours(pooler[0], tensors), "bias": _ours(pooler[1], tensors)}


def load_encoder(name: str) -> Callable[..., tuple[jax.Array, ...]]:
    """The pretrained encoder alone, as a function that gives every hidden state.

    Args:
      name: hub id, local directory (a saved `model/` too) or `pkg://package/path`.

    Returns:
      f(input_ids, attention_mask=None, token_type_ids=None) for integer arrays [B, L]: a tuple of
      float32 [B, L, H], the embeddings' output and then every layer's. Compiled once per shape.

    Raises:
      UserError: see `open_checkpoint` and `read_encoder`.

    """
    checkpoint = open_checkpoint(name)
    graphdef = nnx.split(nnx.eval_shape(lambda: Bert(checkpoint.config, jax.random.key(0))))[0]
    params = jax.tree.map(jnp.asarray, read_encoder(checkpoint)[0])

    @jax.jit
    def run(params, input_ids, mask, token_type_ids):
        return hidden_states(nnx.merge(graphdef, params), input_ids, mask, token_type_ids)

    def encode(input_ids, attention_mask=None, token_type_ids=None) -> tuple[jax.Array, ...]:
        ids = jnp.asarray(input_ids, jnp.int32)
        limit = checkpoint.config.max_position_embeddings
        if ids.ndim != 2 or ids.shape[1] > limit:
            raise ValueError(f"input_ids must be [B, L] with L up to {limit}; got {ids.shape}")
        mask = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask)
        types = jnp.zeros_like(ids) if token_type_ids is None else jnp.asarray(token_type_ids)
        return run(params, ids, mask.astype(bool), types.astype(jnp.int32))

    return encode


def hidden_states(encoder: Bert, input_ids, mask, token_type_ids) -> tuple[jax.Array, ...]:
    """Embedding output and every layer's, each [B, L, H], without dropout."""
    h = [encoder.embed(input_ids, token_type_ids)]
    for number in range(1, encoder.config.num_hidden_layers + 1):
        h.append(encoder.layer(number, h[-1], mask))
    return tuple(h)


def _ours(name: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    value = tensors[name].astype(np.float32)
    return np.ascontiguousarray(value.T) if is_matrix(name) else value


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    tensors: dict[str, np.ndarray] = {}
    try:
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for name in names:
            tensors |= safetensors.numpy.load_file(folder / name)
    except FileNotFoundError as error:
        raise UserError(
            f"{str(folder)!r} has no {names[0]}; a checkpoint in another format must be saved as "
            "safetensors first (save_pretrained of transformers does)"
        ) from error
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(folder / names[0])!r} is damaged: {error}; fetch it anew") from error
    return tensors
