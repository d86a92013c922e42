"""Pretrained weights: the tensors of a checkpoint, checked and converted to this package's layout.

Shape letters: H hidden.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from sweet_jax.errors import UserError
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.tensor_names import TensorNames, is_transposed, path_keys
from sweet_jax.models.tensors import read_tensors

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of a checkpoint.

    Attributes:
      encoder: pure dict of float32 arrays, with the structure of
        `nnx.split(checkpoint.encoder(key))[1]`.
      pooler: parameters {"kernel": float32 [H, H], "bias": float32 [H]}, or None if the file has
        none.
      exits: tensors of a saved model's exits, `exits.<layer>.…`, as stored in the file.

    """

    encoder: Any
    pooler: dict[str, np.ndarray] | None
    exits: Mapping[str, np.ndarray]

    @property
    def final_norm(self) -> dict[str, np.ndarray] | None:
        """The encoder's final norm, with which the head of each exit begins, or None."""
        return self.encoder.get("final_norm")

    def first_layers(self, depth: int) -> Any:
        """Returns the parameters of the encoder's first `depth` layers, without its final norm."""
        params = {k: v for k, v in self.encoder.items() if k != "final_norm"}
        if "layers" in params:
            params["layers"] = {i: params["layers"][i] for i in range(depth)}
        return params


def read_weights(folder: Path, family: EncoderFamily, config: EncoderConfig) -> Weights:
    """Reads the tensors in the folder of a checkpoint.

    Unknown tensors outside the encoder are ignored, with a warning. Raises a UserError that names
    missing, unexpected and misshapen tensors, tensors that are not floating-point, or a damaged
    file, or a parameter that the family names no tensor for.
    """
    names = family.names
    tensors = _renamed(folder, names, read_tensors(folder))
    random = nnx.eval_shape(lambda: family.encoder(config, jax.random.key(0)))
    abstract_params = nnx.to_pure_dict(nnx.split(random)[1])
    shapes = {}  # in torch's layout
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params):
        keys, shape = path_keys(path), tuple(leaf.shape)
        shapes[family.tensor_name(keys)] = shape[::-1] if is_transposed(keys) else shape
    hidden = config.hidden_size
    weight, bias = f"{names.pooler}.weight", f"{names.pooler}.bias"
    pooler = {weight: (hidden, hidden), bias: (hidden,)}
    others = [name for name in tensors if name not in shapes and not names.is_ignored(name)]
    others = [name for name in others if tensors[name].shape != pooler.get(name)]
    present = {name: tensors[name] for name in shapes if name in tensors}
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [name for name in others if names.is_inside(name)],
        "misshapen": [
            f"{name} {value.shape} instead of {shapes[name]}"
            for name, value in present.items()
            if value.shape != shapes[name]
        ],
        "not floating-point": [
            f"{name} {value.dtype}" for name, value in present.items() if value.dtype.kind in "biu"
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{kind}: {_listed(affected, 10)}" for kind, affected in problems.items() if affected
        )
        raise UserError(f"tensors in {str(folder)!r} do not fit its config: {listed}")
    if others:
        log.warning(
            "%s holds tensors that do not belong to its encoder and are ignored: %s",
            str(folder),
            _listed([name if len(name) <= 40 else f"{name[:39]}…" for name in others], 5),
        )

    def pick(path: tuple[Any, ...], _: jax.ShapeDtypeStruct) -> np.ndarray:
        keys = path_keys(path)
        return _parameter(tensors[family.tensor_name(keys)], transposed=is_transposed(keys))

    dense = None
    if all(name in tensors and tensors[name].shape == shape for name, shape in pooler.items()):
        dense = {
            "kernel": _parameter(tensors[weight], transposed=True),
            "bias": _parameter(tensors[bias], transposed=False),
        }
    exits = {name: value for name, value in tensors.items() if name.startswith("exits.")}
    return Weights(jax.tree.map_with_path(pick, abstract_params), dense, exits)


def _renamed(
    folder: Path, names: TensorNames, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by their normalized names.

    Raises UserError if there are LoRA matrices that are not merged, or several encoders.
    """
    adapter = next((name for name in tensors if ".lora_" in name), None)
    if adapter is not None:
        raise UserError(
            f"{str(folder)!r} holds a LoRA adapter that is not merged ({adapter}): merge it with "
            "peft's merge_and_unload and save the result"
        )
    try:
        renamed = names.normalized(tensors)
    except UserError as error:
        raise UserError(f"in {str(folder)!r}, {error}: save only one of them") from error
    return {renamed[name]: value for name, value in tensors.items()}


def _listed(names: list[str], most: int) -> str:
    """Returns the first names as text, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _parameter(tensor: np.ndarray, *, transposed: bool) -> np.ndarray:
    """Returns a tensor as C-contiguous float32, with its axes in this package's order."""
    value = tensor.T if transposed else tensor
    return np.ascontiguousarray(value, np.float32)
