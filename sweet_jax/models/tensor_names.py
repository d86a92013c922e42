"""Names of tensors in Hugging Face checkpoints: a table for each family, and what follows from it.

Parameters are addressed by their path in the pure dict of an encoder, for example
("layers", 0, "attention", "query", "kernel").

Shape letters: H hidden, C classes.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from sweet_jax.config import UserError

# What stands beside an encoder of any family: buffers, pre-training heads, classifiers of an
# earlier task, and the exits of a model that this package saved.
_BESIDE = (
    r"embeddings\.(position|token_type)_ids$",
    *(r"cls\.", r"lm_head\.", r"classifier\.", r"qa_outputs\.", r"exits\."),
)
_ROOTS = {"embeddings", "encoder", "layer", "layers", "transformer"}  # of encoders of any family
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
_OLD_LEAVES = {"gamma": "weight", "beta": "bias"}


@dataclasses.dataclass(frozen=True, eq=False)
class TensorNames:
    """Maps the parameters of a family's encoder to Hugging Face's tensors, and back.

    Attributes:
      prefix: the module that published files may name before all others, "bert" for `bert.…`.
      encoder: modules outside the layers, and the one whose name does not follow `layers`: our
        path joined by "/" → Hugging Face's name.
      layer: modules of a layer: our path within it → Hugging Face's name within it.
      layers: where Hugging Face keeps the layers.
      pooler: the dense layer that a classifier of the family puts on the first token.
      ignored: regular expressions of tensors that published files hold and the encoder does not.

    """

    prefix: str
    encoder: Mapping[str, str]
    layer: Mapping[str, str]
    layers: str = "encoder.layer"
    pooler: str = "pooler.dense"
    ignored: tuple[str, ...] = ()

    def name(self, path: tuple[str | int, ...]) -> str:
        """Returns the Hugging Face name of the parameter at a path.

        Raises KeyError for a parameter that the tables do not name.
        """
        *module, last = map(str, path)
        leaf = leaf_name(last)
        place = "/".join(module)
        if place in self.encoder:
            return f"{self.encoder[place]}.{leaf}"
        return f"{self.layers}.{module[1]}.{self.layer['/'.join(module[2:])]}.{leaf}"

    def normalized(self, found: Iterable[str]) -> dict[str, str]:
        """Maps the names in a file to what `name` writes: no prefix, and today's leaves.

        A program that wraps an encoder puts its own name before all others ("module.",
        "0.auto_model."): whatever stands before the word embeddings is left out.

        Raises UserError where the file holds several encoders.
        """
        found = list(found)
        word = f"{self.encoder['embeddings/word']}.weight"
        usual = f"{self.prefix}."
        prefixes = {
            name.removesuffix(word) for name in found if name == word or name.endswith(f".{word}")
        }
        known = [prefix for prefix in ("", usual) if prefix in prefixes]
        if len(prefixes) > 1 and not known:
            raise UserError(f"there are several encoders, under {', '.join(sorted(prefixes))}")
        prefix = known[0] if known else next(iter(prefixes), usual)
        around = prefix.removesuffix(usual)  # of a classifier that holds the encoder

        def normalize(name: str) -> str:
            name = name.removeprefix(prefix if name.startswith(prefix) else around)
            return re.sub(
                r"LayerNorm\.(gamma|beta)$", lambda old: f"LayerNorm.{_OLD_LEAVES[old[1]]}", name
            )

        return {name: normalize(name) for name in found}

    def is_ignored(self, name: str) -> bool:
        """Returns whether a tensor, by its normalized name, is known not to be the encoder's."""
        return any(re.match(pattern, name) for pattern in (*_BESIDE, *self.ignored))

    def is_inside(self, name: str) -> bool:
        """Returns whether a tensor, by its normalized name, stands among the encoder's own."""
        roots = {place.split(".")[0] for place in (*self.encoder.values(), self.layers)}
        return name.split(".")[0] in roots | _ROOTS


def leaf_name(leaf: str | int) -> str:
    """Returns torch's name of the last key of a path: "weight" or "bias", or the key itself."""
    return _LEAVES.get(str(leaf), str(leaf))


def is_transposed(path: tuple[str | int, ...]) -> bool:
    """Returns whether torch stores the axes of the parameter at a path in reverse order."""
    return path[-1] == "kernel"


def path_keys(path: tuple[Any, ...]) -> tuple[str | int, ...]:
    """Returns the keys of a path as `jax.tree_util` gives it."""
    return tuple(part.key for part in path)


def hugging_face_tensors(
    names: TensorNames, params: Any, exits: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Returns a trained model's parameters by the names of a saved model, in torch's layout.

    The encoder's tensors have Hugging Face's names, its pooler and its final norm are the last
    exit's; heads are `exits.<layer>.…`.
    """
    tensors: dict[str, np.ndarray] = {}

    def put(tree: Any, module: str | None = None) -> None:
        for path, value in jax.tree_util.tree_leaves_with_path(tree):
            keys = path_keys(path)
            name = f"{module}.{leaf_name(keys[-1])}" if module else names.name(keys)
            tensors[name] = np.ascontiguousarray(value.T if is_transposed(keys) else value)

    put(params["encoder"])
    for layer in exits:
        head = params["heads"][str(layer)]
        pooler = head.get("pooler") or params.get("pooler")  # None: a pooling without one
        dense = {"pooler.dense": pooler} if pooler else {}
        dense |= {k: head[k] for k in ("classifier", "learning_to_exit", "norm") if k in head}
        for name, part in dense.items():
            put(part, f"exits.{layer}.{name}")
    if "norm" in head:
        put({"final_norm": head["norm"]})
    for leaf in ("weight", "bias"):
        if (name := f"exits.{exits[-1]}.pooler.dense.{leaf}") in tensors:
            tensors[f"{names.pooler}.{leaf}"] = tensors[name]
    return tensors
