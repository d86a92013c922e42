"""The networks of a saved model: encoders with their exits, read for JAX.

Shape letters: H hidden, P width of a pooled vector, C classes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.devices import check_devices
from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.engine_choice import check_precision
from sweet_jax.inference.onnx_files import check_not_exported
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.pretrained import Checkpoint, open_checkpoint
from sweet_jax.poolings import POOLINGS


class Network(NamedTuple):
    """Holds an encoder with its exits: all of the model's, or with Multi-Model a single one."""

    exits: tuple[int, ...]  # layers of its exits, ascending; the last is its depth
    graphdef: nnx.GraphDef  # structure of an `EarlyExit`
    params: Any  # pure dict of arrays on the host
    pooling: str = "first"  # one of POOLINGS
    model_type: str = ""  # model_type in the encoder's config.json

    @property
    def hidden_size(self) -> int:
        """Returns H."""
        return len(self._classifier) // POOLINGS[self.pooling].width

    @property
    def classes(self) -> int:
        """Returns C."""
        return self._classifier.shape[1]

    @property
    def _classifier(self) -> Any:
        return self.params["heads"][str(self.exits[0])]["classifier"]["kernel"]  # [P, C]


def load_networks(model: ModelArtifact, dtype: str = "float32") -> tuple[Network, ...]:
    """Reads the networks of a saved model: one, or with Multi-Model one for each exit.

    Args:
      model: the saved model.
      dtype: precision of the encoder's parameters and activations, "float32" or "bfloat16".

    Raises UserError for another dtype, for a model exported to ONNX, if tensors are missing or have
    the wrong shape, and if JAX finds no device.

    """
    check_precision("jax", dtype, model)
    check_not_exported(model.folder)
    check_devices()
    return tuple(
        _load_network(open_checkpoint(str(folder)), exits, model, dtype)
        for folder, exits in model.networks
    )


def _load_network(
    checkpoint: Checkpoint, exits: tuple[int, ...], model: ModelArtifact, dtype: str
) -> Network:
    weights = checkpoint.weights
    learned = f"exits.{exits[0]}.learning_to_exit.weight" in weights.exits

    def make() -> EarlyExit:
        key = jax.random.key(0)
        learning = "joint" if learned else ""  # "detached" has the same forward pass
        config = ExitConfig(pooling=model.pooling, learning_to_exit=learning)
        return EarlyExit(
            checkpoint.encoder(key, dtype), exits, len(model.classes), key, config, dtype
        )

    graphdef, shapes = nnx.split(nnx.eval_shape(make))
    heads = _pick_heads(nnx.to_pure_dict(shapes)["heads"], weights.exits, checkpoint)
    encoder = weights.first_layers(checkpoint.depth)
    params = {
        "encoder": jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), encoder),
        # Heads always compute in float32, see `Head`.
        "heads": jax.tree.map(lambda x: x.astype(jnp.float32), heads),
    }
    return Network(exits, graphdef, params, model.pooling, checkpoint.family.model_type)


def _pick_heads(shapes: Any, tensors: Mapping[str, np.ndarray], checkpoint: Checkpoint) -> Any:
    """Returns the parameters of all heads, as a pure dict with the structure of `shapes`."""
    absent: list[str] = []

    def pick(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        layer, *module, kind = (p.key for p in path)
        module_name = "pooler.dense" if module == ["pooler"] else module[0]
        name = f"exits.{layer}.{module_name}.{'bias' if kind == 'bias' else 'weight'}"
        value = tensors.get(name, np.empty(0))
        value = value.T if kind == "kernel" else value
        if value.shape != leaf.shape:
            absent.append(name)
        return np.ascontiguousarray(value)

    heads = jax.tree.map_with_path(pick, shapes)
    if absent:
        raise UserError(
            f"tensors in {str(checkpoint.folder)!r} are missing or have the wrong shape: "
            f"{', '.join(absent)}"
        )
    return heads
