"""Ownership of parameters: under SWEET, only the loss of a parameter's owner trains it.

An exit owns the layers and the head of its segment. The embeddings belong to the first segment
(SWEET paper, section 4.1), and so does the table of relative positions unless it is shared.
ALBERT's only layer is shared by all exits. A family declares the owners of other groups of its
encoder's parameters (`EncoderFamily.owners`).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from sweet_jax.errors import UserError

SHARED = 0  # owner number of parameters that every exit trains
BUILT_IN_GROUPS = ("embeddings", "relative", "layers", "shared_layer")
OWNERS = ("first", "shared")  # of a group that a family declares: the first exit, or all
# `EncoderFamily.owners` as pairs, which are hashable: name of a group, one of OWNERS.
Owners = tuple[tuple[str, str], ...]


def parameter_owners(
    params: Any,
    exits: Sequence[int],
    *,
    shared_relative: bool = False,
    owners: Iterable[tuple[str, str]] = (),
) -> Any:
    """Returns the owner of each parameter: the layer number of an exit, or SHARED.

    Args:
      params: tree of parameters.
      exits: layer numbers of the exits.
      shared_relative: whether every exit trains the table of relative positions.
      owners: owners of other groups of the encoder's parameters, see `Owners`.

    Returns:
      A tree with the structure of `params`.

    Raises:
      UserError: if the encoder has another group of parameters.
      KeyError: if no rule covers a parameter outside the encoder.

    """
    declared = dict(owners)

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
            case ("encoder", group, *_) if group in declared:
                return SHARED if declared[str(group)] == "shared" else exits[0]
            case ("encoder", group, *_):
                raise UserError(
                    f"the encoder has a group of parameters {group!r}, which no exit owns: declare "
                    f"it in EncoderFamily.owners, as one of {', '.join(map(repr, OWNERS))}"
                )
            case ("heads", str(number), *_):
                return int(number)
            case ("pooler", *_):
                return SHARED
        raise KeyError(f"no owner is defined for parameter {path}")

    return jax.tree.map_with_path(lambda path, _: owner(tuple(p.key for p in path)), params)


def encoder_layer(path: tuple[str | int, ...], depth: int) -> int | None:
    """Returns the layer of the parameter at a path, from 1; None outside the encoder.

    Embeddings, tables of relative positions and the groups that a family declares are in layer 0.
    ALBERT's only layer counts as the last one.

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


def leaves_by_owner(
    tree: Any, exits: Sequence[int], owners: Owners = ()
) -> Iterator[tuple[int, jax.Array]]:
    """Returns (owner, leaf) for every leaf of a tree with the structure of the parameters."""
    owner_of = parameter_owners(tree, exits, owners=owners)
    return zip(jax.tree.leaves(owner_of), jax.tree.leaves(tree), strict=True)
