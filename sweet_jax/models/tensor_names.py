"""Our parameters and the names that Hugging Face gives them, one table for all encoders.

Shape letters: H hidden, C classes.
"""

import re
from typing import Any

import jax
import numpy as np

# Our module's path and Hugging Face's. What BERT, RoBERTa and DeBERTa have under one name stands
# once; no two encoders give one path different names.
_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention": "attention.self",  # q_bias, v_bias
    "attention/in_proj": "attention.self.in_proj",
    "attention/pos_proj": "attention.self.pos_proj",
    "attention/pos_q_proj": "attention.self.pos_q_proj",
    "attention/query_proj": "attention.self.query_proj",
    "attention/key_proj": "attention.self.key_proj",
    "attention/value_proj": "attention.self.value_proj",
    "attention/pos_key_proj": "attention.self.pos_key_proj",
    "attention/pos_query_proj": "attention.self.pos_query_proj",
    "attention/output": "attention.output.dense",
    "attention/norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "norm": "output.LayerNorm",
}
_OTHERS = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/widen": "embeddings.embed_proj",
    "embeddings/norm": "embeddings.LayerNorm",
    "layers/0/conv/conv": "encoder.conv.conv",
    "layers/0/conv/norm": "encoder.conv.LayerNorm",
    "relative": "encoder.rel_embeddings",
    "relative/norm": "encoder.LayerNorm",
}
# Parts of a published checkpoint that are not the encoder: buffers, pre-training heads,
# classifiers of a former task, absolute positions that DeBERTa was pretrained with but does not
# use, the norm of a table of relative positions that a config leaves out, the second table of words
# that pre-training left in some of DeBERTa-v3, and this package's own exits.
NOT_ENCODER = re.compile(
    r"(embeddings\.(position|token_type)_ids$|embeddings\.position_embeddings\.|"
    r"embeddings\.word_embeddings\._weight$|encoder\.LayerNorm\.|cls\.|lm_head\.|"
    r"lm_predictions\.|mask_predictions\.|classifier\.|qa_outputs\.|exits\.)"
)


def hugging_face_name(path: tuple[str | int, ...]) -> str:
    """Hugging Face name of an encoder parameter, from its path in the pure dict."""
    *module, leaf = map(str, path)
    leaf = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(leaf, leaf)
    place = "/".join(module)
    if place in _OTHERS:
        return f"{_OTHERS[place]}.{leaf}"
    return f"encoder.layer.{module[1]}.{_LAYER['/'.join(module[2:])]}.{leaf}"


def normalize_name(name: str) -> str:
    """A published tensor's name as hugging_face_name has it: no prefix, LayerNorm.weight, .bias."""
    name = re.sub(r"^(bert|roberta|deberta)\.", "", name)
    return re.sub(
        r"LayerNorm\.(gamma|beta)$",
        lambda match: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match[1]],
        name,
    )


def is_transposed(name: str) -> bool:
    """Whether torch stores the axes of the tensor in the reverse order of ours."""
    return name.endswith(".weight") and not re.search(r"_embeddings\.|LayerNorm", name)


def hugging_face_tensors(params: Any, exits: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A trained model's parameters under the names that a saved model has, torch's layout.

    The encoder's are Hugging Face's, its pooler the last exit's; heads are `exits.<layer>.…`.
    """
    tensors: dict[str, np.ndarray] = {}

    def put(name: str, value: np.ndarray) -> None:
        tensors[name] = np.ascontiguousarray(value.T if is_transposed(name) else value)

    for path, value in jax.tree_util.tree_leaves_with_path(params["encoder"]):
        put(hugging_face_name(tuple(p.key for p in path)), value)
    for layer in exits:
        head = params["heads"][str(layer)]
        pooler = head.get("pooler") or params.get("pooler")  # None: a pooling without one
        dense = {"pooler.dense": pooler} if pooler else {}
        dense |= {k: head[k] for k in ("classifier", "learning_to_exit") if k in head}
        for name, part in dense.items():
            put(f"exits.{layer}.{name}.weight", part["kernel"])
            put(f"exits.{layer}.{name}.bias", part["bias"])
    for leaf in ("weight", "bias"):
        if (name := f"exits.{exits[-1]}.pooler.dense.{leaf}") in tensors:
            tensors[f"pooler.dense.{leaf}"] = tensors[name]
    return tensors
