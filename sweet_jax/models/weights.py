"""Pretrained weights: the tensors of a checkpoint, checked and brought into this package's layout.

Shape letters: H hidden.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from sweet_jax.config import UserError
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.tensor_names import is_transposed, path_keys
from sweet_jax.models.tensors import read_tensors


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of a checkpoint.

    Attributes:
      encoder: pure dict of float32 arrays, as `nnx.split(checkpoint.encoder(key))` has it.
      pooler: {"kernel": float32 [H, H], "bias": float32 [H]}, or None where the file has none.
      exits: tensors of a saved model's exits, `exits.<layer>.…`, as the file has them.

    """

    encoder: Any
    pooler: dict[str, np.ndarray] | None
    exits: Mapping[str, np.ndarray]

    @property
    def final_norm(self) -> dict[str, np.ndarray] | None:
        """The encoder's final norm, that the head of each exit begins with; None for none."""
        return self.encoder.get("final_norm")

    def first_layers(self, depth: int) -> Any:
        """Returns the encoder's parameters with `depth` layers, without its final norm."""
        kept = {k: v for k, v in self.encoder.items() if k != "final_norm"}
        if "layers" in kept:
            kept["layers"] = {i: kept["layers"][i] for i in range(depth)}
        return kept


def read_weights(folder: Path, family: EncoderFamily, config: EncoderConfig) -> Weights:
    """Reads the tensors of a checkpoint's folder.

    Raises UserError that names every missing, unexpected or misshapen tensor, or a damaged file.
    """
    names = family.names
    tensors = {names.normalize(name): value for name, value in read_tensors(folder).items()}
    random = nnx.eval_shape(lambda: family.encoder(config, jax.random.key(0)))
    wanted = nnx.to_pure_dict(nnx.split(random)[1])
    shapes = {}  # in torch's layout
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        keys, shape = path_keys(path), tuple(leaf.shape)
        shapes[names.name(keys)] = shape[::-1] if is_transposed(keys) else shape
    hidden = config.hidden_size
    weight, bias = f"{names.pooler}.weight", f"{names.pooler}.bias"
    pooler = {weight: (hidden, hidden), bias: (hidden,)}
    found = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [
            name for name in tensors if name not in shapes | pooler and not names.is_ignored(name)
        ],
        "misshapen": [
            f"{name} {tensors[name].shape} instead of {shape}"
            for name, shape in (shapes | pooler).items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if any(found.values()):
        listed = "; ".join(f"{kind}: {', '.join(each)}" for kind, each in found.items() if each)
        raise UserError(f"tensors in {str(folder)!r} do not fit its config: {listed}")

    def pick(path: tuple[Any, ...], _: jax.ShapeDtypeStruct) -> np.ndarray:
        keys = path_keys(path)
        return _parameter(tensors[names.name(keys)], transposed=is_transposed(keys))

    dense = None
    if weight in tensors and bias in tensors:
        dense = {
            "kernel": _parameter(tensors[weight], transposed=True),
            "bias": _parameter(tensors[bias], transposed=False),
        }
    exits = {name: value for name, value in tensors.items() if name.startswith("exits.")}
    return Weights(jax.tree.map_with_path(pick, wanted), dense, exits)


def _parameter(tensor: np.ndarray, *, transposed: bool) -> np.ndarray:
    """Returns a tensor as float32, C-contiguous, with its axes in this package's order."""
    value = tensor.T if transposed else tensor
    return np.ascontiguousarray(value, np.float32)
