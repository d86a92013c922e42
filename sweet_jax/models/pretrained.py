"""Checkpoints under their Hugging Face names: found, read, checked, written.

Shape letters: B batch, L length, H hidden.
"""

import dataclasses
import json
import re
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

_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab.txt"]
_FILES += ["special_tokens_map.json", "exits.json"]
# Our name of a tensor's last part, and whether the torch matrix [out, in] is the transpose.
_LAYER = {
    "attention.self.query": "attention/query",
    "attention.self.key": "attention/key",
    "attention.self.value": "attention/value",
    "attention.output.dense": "attention/output",
    "attention.output.LayerNorm": "attention/norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "norm",
}
_EMBEDDINGS = {
    "word_embeddings": "word",
    "position_embeddings": "position",
    "token_type_embeddings": "token_type",
    "LayerNorm": "norm",
}
# Parts of a published checkpoint that are not the encoder: buffers, pre-training heads,
# classifiers of a former task, and this package's own exits.
_NOT_ENCODER = re.compile(r"(embeddings\.(position|token_type)_ids$|cls\.|classifier\.|exits\.)")


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
    known = {f.name for f in dataclasses.fields(BertConfig)}
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


def hugging_face_name(path: tuple[str | int, ...]) -> str:
    """Hugging Face name of an encoder parameter, from its path in the pure dict."""
    *module, leaf = path
    leaf = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(str(leaf), str(leaf))
    if module[0] == "embeddings":
        names = {ours: theirs for theirs, ours in _EMBEDDINGS.items()}
        return f"embeddings.{names[str(module[1])]}.{leaf}"
    names = {ours: theirs for theirs, ours in _LAYER.items()}
    return f"encoder.layer.{module[1]}.{names['/'.join(map(str, module[2:]))]}.{leaf}"


def read_encoder(checkpoint: Checkpoint, depth: int | None = None) -> tuple[Any, Any]:
    """Pretrained encoder parameters up to layer `depth`, and the pooler's or None.

    Returns pure dicts of float32 arrays, the encoder's shaped like `nnx.split(Bert(config, key))`.
    Raises UserError naming every missing, unexpected or misshapen tensor, or a damaged file.
    """
    tensors = {_canonical(name): value for name, value in _read_tensors(checkpoint.folder).items()}
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
        if name not in names and name not in pooler and not _NOT_ENCODER.match(name)
    ]
    shapes = {name: tuple(leaf.shape) for name, leaf in names.items()}
    for name, shape in shapes.items():
        shapes[name] = shape[::-1] if _is_matrix(name) else shape
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


def hugging_face_tensors(params: Any, exits: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A trained model's parameters under the names that a saved model has, torch's layout.

    The encoder's are Hugging Face's, its pooler the last exit's; heads are `exits.<layer>.…`.
    """
    tensors: dict[str, np.ndarray] = {}

    def put(name: str, value: np.ndarray) -> None:
        tensors[name] = np.ascontiguousarray(value.T if _is_matrix(name) else value)

    for path, value in jax.tree_util.tree_leaves_with_path(params["encoder"]):
        put(hugging_face_name(tuple(p.key for p in path)), value)
    for layer in exits:
        head = params["heads"][str(layer)]
        dense = {"pooler.dense": head.get("pooler") or params["pooler"]}
        for name, part in (dense | {"classifier": head["classifier"]}).items():
            put(f"exits.{layer}.{name}.weight", part["kernel"])
            put(f"exits.{layer}.{name}.bias", part["bias"])
    for leaf in ("weight", "bias"):
        tensors[f"pooler.dense.{leaf}"] = tensors[f"exits.{exits[-1]}.pooler.dense.{leaf}"]
    return tensors


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


def _canonical(name: str) -> str:
    name = name.removeprefix("bert.")
    return re.sub(
        r"LayerNorm\.(gamma|beta)$",
        lambda match: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match[1]],
        name,
    )


def _is_matrix(name: str) -> bool:
    """Whether torch stores the tensor as [out, in], the transpose of ours."""
    dense = not name.startswith("embeddings.") and "LayerNorm" not in name
    return dense and name.endswith(".weight")


def _ours(name: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    value = tensors[name].astype(np.float32)
    return np.ascontiguousarray(value.T) if _is_matrix(name) else value


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
