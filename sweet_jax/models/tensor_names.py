"""Names of tensors in Hugging Face checkpoints, derived from a table for each family.

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

from sweet_jax.errors import UserError

# Tensors that are stored alongside an encoder of any family: buffers, pretraining heads,
# classifiers of an earlier task, and the exits of a model that this package saved.
_BESIDE = (
    r"embeddings\.(position|token_type)_ids$",
    *(r"cls\.", r"lm_head\.", r"classifier\.", r"qa_outputs\.", r"exits\."),
)
_ROOTS = {"embeddings", "encoder", "layer", "layers", "transformer"}  # first modules of encoders
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
_OLD_LEAVES = {"gamma": "weight", "beta": "bias"}


@dataclasses.dataclass(frozen=True, eq=False)
class TensorNames:
    """Maps the parameters of a family's encoder to the tensors of Hugging Face.

    Attributes:
      prefix: module name that may precede all others in published files, such as "bert" in
        `bert.…`.
      encoder: Hugging Face names of modules, by our path joined with "/": modules outside the
        layers, and modules in a layer whose names do not begin with `layers`.
      layer: Hugging Face names of the modules of a layer, by our path; both within the layer.
      layers: Hugging Face name of the module that holds the layers.
      pooler: dense layer that the family's classifiers apply to the first token.
      ignored: regular expressions for tensors in published files that the encoder does not have.

    """

    prefix: str
    encoder: Mapping[str, str]
    layer: Mapping[str, str]
    layers: str = "encoder.layer"
    pooler: str = "pooler.dense"
    ignored: tuple[str, ...] = ()

    def name(self, path: tuple[str | int, ...]) -> str:
        """Returns the Hugging Face name of the parameter at a path.

        Raises UserError if the tables do not name its module; its message is worded to follow
        "family ...".
        """
        *module, last = map(str, path)
        leaf = leaf_name(last)
        module_path, in_layer = "/".join(module), "/".join(module[2:])
        if module_path in self.encoder:
            return f"{self.encoder[module_path]}.{leaf}"
        if module[:1] == ["layers"] and in_layer in self.layer:
            return f"{self.layers}.{module[1]}.{self.layer[in_layer]}.{leaf}"
        table, key = ("layer", in_layer) if module[:1] == ["layers"] else ("encoder", module_path)
        fix = f"add {key!r} to {table!r} of its TensorNames" if key else "put it in a module"
        raise UserError(f"names no tensor for its parameter {'/'.join((*module, last))!r}: {fix}")

    def normalized(self, names: Iterable[str]) -> dict[str, str]:
        """Maps the names in a file to those that `name` returns: no prefix, and current leaf names.

        A program that wraps an encoder adds its own prefix ("module.", "0.auto_model."). Whatever
        precedes the word embeddings is therefore removed from all names.

        Raises UserError if the file holds several encoders.
        """
        names = list(names)
        word = f"{self.encoder['embeddings/word']}.weight"
        usual = f"{self.prefix}."
        prefixes = {
            name.removesuffix(word) for name in names if name == word or name.endswith(f".{word}")
        }
        usual_prefixes = [prefix for prefix in ("", usual) if prefix in prefixes]
        if len(prefixes) > 1 and not usual_prefixes:
            raise UserError(f"there are several encoders, under {', '.join(sorted(prefixes))}")
        prefix = usual_prefixes[0] if usual_prefixes else next(iter(prefixes), usual)
        around = prefix.removesuffix(usual)  # prefix of a classifier that contains the encoder

        def normalize(name: str) -> str:
            name = name.removeprefix(prefix if name.startswith(prefix) else around)
            return re.sub(
                r"LayerNorm\.(gamma|beta)$", lambda old: f"LayerNorm.{_OLD_LEAVES[old[1]]}", name
            )

        return {name: normalize(name) for name in names}

    def is_ignored(self, name: str) -> bool:
        """Returns whether a tensor, by its normalized name, is known to be outside the encoder."""
        return any(re.match(pattern, name) for pattern in (*_BESIDE, *self.ignored))

    def is_inside(self, name: str) -> bool:
        """Returns whether a tensor, by its normalized name, is in a module of the encoder."""
        roots = {module.split(".")[0] for module in (*self.encoder.values(), self.layers)}
        return name.split(".")[0] in roots | _ROOTS


def leaf_name(leaf: str | int) -> str:
    """Returns torch's name for the last key of a path: "weight", "bias" or the key itself."""
    return _LEAVES.get(str(leaf), str(leaf))


def is_transposed(path: tuple[str | int, ...]) -> bool:
    """Returns whether torch stores the axes of the parameter at a path in reverse order."""
    return path[-1] == "kernel"


def path_keys(path: tuple[Any, ...]) -> tuple[str | int, ...]:
    """Returns the keys of a `jax.tree_util` path."""
    return tuple(part.key for part in path)


def hugging_face_tensors(
    names: TensorNames, params: Any, exits: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Returns a trained model's parameters in torch's layout, by their names in a saved model.

    The encoder's tensors have Hugging Face's names. Its pooler and its final norm are those of the
    last exit. Heads are named `exits.<layer>.…`.
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
        pooler = head.get("pooler") or params.get("pooler")  # None if the pooling has none
        dense = {"pooler.dense": pooler} if pooler else {}
        dense |= {k: head[k] for k in ("classifier", "learning_to_exit", "norm") if k in head}
        for name, module_params in dense.items():
            put(module_params, f"exits.{layer}.{name}")
    if "norm" in head:
        put({"final_norm": head["norm"]})
    for leaf in ("weight", "bias"):
        if (name := f"exits.{exits[-1]}.pooler.dense.{leaf}") in tensors:
            tensors[f"{names.pooler}.{leaf}"] = tensors[name]
    return tensors
