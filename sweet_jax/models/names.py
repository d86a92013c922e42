"""Our parameters and the names that Hugging Face gives them.

Shape letters: H hidden, C classes.
"""

import re
from typing import Any

import jax
import numpy as np

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
NOT_ENCODER = re.compile(
    r"(embeddings\.(position|token_type)_ids$|cls\.|classifier\.|qa_outputs\.|exits\.)"
)


def hugging_face_name(path: tuple[str | int, ...]) -> str:
    """Hugging Face name of an encoder parameter, from its path in the pure dict."""
    *module, leaf = path
    leaf = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(str(leaf), str(leaf))
    if module[0] == "embeddings":
        names = {ours: theirs for theirs, ours in _EMBEDDINGS.items()}
        return f"embeddings.{names[str(module[1])]}.{leaf}"
    names = {ours: theirs for theirs, ours in _LAYER.items()}
    return f"encoder.layer.{module[1]}.{names['/'.join(map(str, module[2:]))]}.{leaf}"


def canonical(name: str) -> str:
    """A published tensor's name as hugging_face_name has it: no prefix, LayerNorm.weight, .bias."""
    name = name.removeprefix("bert.")
    return re.sub(
        r"LayerNorm\.(gamma|beta)$",
        lambda match: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match[1]],
        name,
    )


def is_matrix(name: str) -> bool:
    """Whether torch stores the tensor as [out, in], the transpose of ours."""
    dense = not name.startswith("embeddings.") and "LayerNorm" not in name
    return dense and name.endswith(".weight")


def hugging_face_tensors(params: Any, exits: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A trained model's parameters under the names that a saved model has, torch's layout.

    The encoder's are Hugging Face's, its pooler the last exit's; heads are `exits.<layer>.…`.
    """
    tensors: dict[str, np.ndarray] = {}

    def put(name: str, value: np.ndarray) -> None:
        tensors[name] = np.ascontiguousarray(value.T if is_matrix(name) else value)

    for path, value in jax.tree_util.tree_leaves_with_path(params["encoder"]):
        put(hugging_face_name(tuple(p.key for p in path)), value)
    for layer in exits:
        head = params["heads"][str(layer)]
        dense = {"pooler.dense": head.get("pooler") or params["pooler"]}
        dense |= {k: head[k] for k in ("classifier", "learning_to_exit") if k in head}
        for name, part in dense.items():
            put(f"exits.{layer}.{name}.weight", part["kernel"])
            put(f"exits.{layer}.{name}.bias", part["bias"])
    for leaf in ("weight", "bias"):
        tensors[f"pooler.dense.{leaf}"] = tensors[f"exits.{exits[-1]}.pooler.dense.{leaf}"]
    return tensors
