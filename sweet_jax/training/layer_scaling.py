"""Layer scaling: reduces the changes that training made to the early layers of the encoder.

This is "LiNeS" by Wang et al. 2025 (arXiv 2410.17146): the scale grows linearly with depth. The
layers that a shallow exit reads move back toward the pretrained ones, which are more general; the
last layer keeps everything it learned.

Shape letters: R replica.
"""

import functools
from typing import Any

import jax

from sweet_jax.models.ownership import encoder_layer
from sweet_jax.training.step import Params


def scale_layer_updates(params: Params, encoder: Any, depth: int, first: float) -> Params:
    """Returns parameters [R, ...] that keep only a share of what training changed in each layer.

    Layer l of L keeps the share first + (1 - first) (l - 1) / (L - 1) of its change. Embeddings and
    tables of relative positions count as layer 0, and their share is at least 0. A model with one
    layer keeps the whole change. Heads are never scaled.

    Args:
      params: trained parameters [R, ...] on the devices; their sharding is preserved.
      encoder: parameters of the pretrained encoder, without the axis R.
      depth: number of layers of the model, L.
      first: share of the change that layer 1 keeps.

    """
    shardings = jax.tree.map(lambda x: x.sharding, params["encoder"])
    scale = jax.vmap(functools.partial(_scale, depth=depth, first=first), in_axes=(0, None))
    scaled = jax.jit(scale, out_shardings=shardings)(params["encoder"], encoder)
    return params | {"encoder": scaled}


def _scale(trained: Any, start: Any, depth: int, first: float) -> Any:
    """Returns the scaled encoder parameters of one replica."""

    def scale(path: tuple, end: jax.Array, begin: jax.Array) -> jax.Array:
        layer = encoder_layer(("encoder", *(part.key for part in path)), depth)
        assert layer is not None, "every path is in the encoder"
        above = (layer - 1) / (depth - 1) if depth > 1 else 1.0
        share = max(0.0, first + (1 - first) * above)
        # If the whole change is kept, the sum below would only add rounding errors.
        return end if share == 1 else begin + share * (end - begin)

    return jax.tree.map_with_path(scale, trained, start)
