"""What each pooling reads of a layer, without JAX; `models.pooling` has the functions."""

from typing import NamedTuple


class PoolingInputs(NamedTuple):
    """Describes what a pooling reads.

    Attributes:
      first_only: whether it reads the first token alone, so that an exit's layer need be computed
        at that token only.
      dense: whether the pretrained pooler follows, a dense layer and its activation.
      width: width of the pooled vector, in multiples of the hidden size.
      pairs: whether it reads the two texts of a pair apart.

    """

    first_only: bool = False
    dense: bool = False
    width: int = 1
    pairs: bool = False


POOLING_INPUTS: dict[str, PoolingInputs] = {
    "first": PoolingInputs(first_only=True, dense=True),
    # No pooler: it was pretrained for the first token of the last layer.
    "mean": PoolingInputs(),
    "pair": PoolingInputs(width=4, pairs=True),
}
