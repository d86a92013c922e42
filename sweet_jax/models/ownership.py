"""Ownership of parameters: the exit whose loss alone trains a parameter under SWEET.

A segment's layers and head are its exit's; the embeddings belong to the first segment (SWEET paper,
section 4.1), and so does the table of relative positions, unless it is shared. ALBERT's one layer
is every exit's. No array is made here: trees have the shape of the parameters.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

SHARED = 0  # the owner number of parameters that every exit trains


def parameter_owners(params: Any, exits: Sequence[int], *, shared_relative: bool = False) -> Any:
    """Returns the tree of `params` with the layer number of the owning exit, or SHARED.

    shared_relative: whether every exit trains the table of relative positions.
    Raises KeyError for a parameter that no rule covers.
    """

    def owner(path: tuple[str | int, ...]) -> int:
        match path:
            case ("encoder", "embeddings", *_):
                return exits[0]
            case ("encoder", "relative", *_):
                return SHARED if shared_relative else exits[0]
            case ("encoder", "shared_layer", *_):  # ALBERT's, which no exit can own
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
    """Returns the layer of the parameter at a path, from 1; None for one outside of the encoder.

    Embeddings and tables of relative positions are layer 0, ALBERT's one layer is the last.
    depth: layers of the model.
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
    """Returns (owner, leaf) of every leaf of a tree shaped like the parameters."""
    return zip(jax.tree.leaves(parameter_owners(tree, exits)), jax.tree.leaves(tree), strict=True)
