"""Ownership of parameters: under SWEET, only the loss of a parameter's owner trains it.

An exit owns the layers and the head of its segment. The embeddings belong to the first segment
(SWEET paper, section 4.1), and so does the table of relative positions unless it is shared.
ALBERT's only layer is shared by all exits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

SHARED = 0  # owner number of parameters that every exit trains


def parameter_owners(params: Any, exits: Sequence[int], *, shared_relative: bool = False) -> Any:
    """Returns the owner of each parameter: the layer number of an exit, or SHARED.

    Args:
      params: tree of parameters.
      exits: layer numbers of the exits.
      shared_relative: whether every exit trains the table of relative positions.

    Returns:
      A tree with the structure of `params`.

    Raises:
      KeyError: if no rule covers a parameter.

    """

    def owner(path: tuple[str | int, ...]) -> int:
        match path:
            case ("encoder", "embeddings", *_):
                return exits[0]
            case ("encoder", "relative", *_):
                return SHARED if shared_relative else exits[0]
            case ("encoder", "shared_layer", *_):  # ALBERT's only layer, which no exit can own
                return SHARED
            case ("encoder", "layers", int(index), *_):
                return next(e for e in exits if e > index)
            case ("heads", str(number), *_):
                return int(number)
            case ("pooler", *_):
                return SHARED
        raise KeyError(f"no owner is defined for parameter {path}")

    return jax.tree.map_with_path(lambda path, _: owner(tuple(p.key for p in path)), params)


def encoder_layer(path: tuple[str | int, ...], depth: int) -> int | None:
    """Returns the layer of the parameter at a path, from 1; None outside the encoder.

    Embeddings and tables of relative positions are in layer 0. ALBERT's only layer counts as the
    last one.

    Args:
      path: keys of the parameter's path.
      depth: number of layers of the model.

    """
    match path:
        case ("encoder", "layers", int(index), *_):
            return index + 1
        case ("encoder", "shared_layer", *_):
            return depth
        case ("encoder", *_):
            return 0
    return None


def leaves_by_owner(tree: Any, exits: Sequence[int]) -> Iterator[tuple[int, jax.Array]]:
    """Returns (owner, leaf) for every leaf of a tree with the structure of the parameters."""
    return zip(jax.tree.leaves(parameter_owners(tree, exits)), jax.tree.leaves(tree), strict=True)
