"""Layer scaling: what training changed in a layer is reduced, most in the first, in the last not.

"LiNeS" of Wang et al. 2025 (arXiv 2410.17146), linear in depth. The layers that a shallow exit
reads go back towards the pretrained ones, which read texts in general; the last exit keeps what it
learned.

Shape letters: R replica.
"""

import functools
from typing import Any

import jax

from sweet_jax.models.ownership import encoder_layer
from sweet_jax.training.step import Params


def scale_layer_updates(params: Params, encoder: Any, depth: int, first: float) -> Params:
    """Returns parameters [R, ...] whose encoder has a share of what training changed in each layer.

    Layer l of L keeps first + (1 - first) (l - 1) / (L - 1) of it, embeddings and tables of
    relative positions what that is for l = 0, at least nothing. A model of one layer keeps all of
    it, and so do heads.

    Args:
      params: trained, on the devices, whose sharding is kept.
      encoder: the pretrained encoder's parameters, without the axis R.
      depth: L, layers of the model.
      first: the share of layer 1.

    """
    shardings = jax.tree.map(lambda x: x.sharding, params["encoder"])
    scale = jax.vmap(functools.partial(_scale, depth=depth, first=first), in_axes=(0, None))
    scaled = jax.jit(scale, out_shardings=shardings)(params["encoder"], encoder)
    return params | {"encoder": scaled}


def _scale(trained: Any, start: Any, depth: int, first: float) -> Any:
    """Returns the encoder's parameters of one replica."""

    def scale(path: tuple, end: jax.Array, begin: jax.Array) -> jax.Array:
        layer = encoder_layer(("encoder", *(part.key for part in path)), depth)
        assert layer is not None, "all are the encoder's"
        above = (layer - 1) / (depth - 1) if depth > 1 else 1.0
        share = max(0.0, first + (1 - first) * above)
        # Where all is kept the sum below would differ from it by rounding.
        return end if share == 1 else begin + share * (end - begin)

    return jax.tree.map_with_path(scale, trained, start)
