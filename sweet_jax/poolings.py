"""The poolings: how an exit reduces the hidden state of its layer to one vector.

Importing this table does not import JAX, which their functions in `models/pooling.py` need.

Shape letters: B batch, L length, H hidden, P width of a pooled vector.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from sweet_jax.registry import Registry, import_object


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Describes what a pooling reads, and computes it.

    Raises ValueError unless the width is at least 1, and 1 with `dense`.

    Attributes:
      read: function without trainable parameters, (h [B, L, H], mask bool [B, L], second bool
        [B, L] or None) → [B, P], or its name "module:function", which is imported at the first
        call. mask is True at tokens; second is True from the second text of a pair on, and is None
        unless the pooling reads pairs. Results for rows without tokens, which fill up a batch
        during inference, are not used.
      first_only: whether it reads the first token alone, so that an exit's layer need be computed
        at that token only: h may then be [B, 1, H].
      dense: whether the pretrained pooler follows, a dense layer and its activation.
      width: width of the pooled vector, in multiples of the hidden size, P / H.
      pairs: whether it reads the two texts of a pair apart.

    """

    read: Callable[[Any, Any, Any], Any] | str
    first_only: bool = False
    dense: bool = False
    width: int = 1
    pairs: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or (self.dense and self.width != 1):
            raise ValueError(f"width {self.width} with dense={self.dense}")

    def __call__(self, h: Any, mask: Any, second: Any = None) -> Any:
        """Returns the pooled vectors [B, P]; see `read`.

        Raises UnknownNameError if the function cannot be imported.
        """
        read = import_object("pooling", self.read) if isinstance(self.read, str) else self.read
        return read(h, mask, second)


POOLINGS = Registry(
    "pooling",
    Pooling,
    {
        "first": Pooling("sweet_jax.models.pooling:first_token", first_only=True, dense=True),
        # No pooler: it was pretrained for the first token of the last layer.
        "mean": Pooling("sweet_jax.models.pooling:mean_of_tokens"),
        "pair": Pooling("sweet_jax.models.pooling:means_of_pair", width=4, pairs=True),
        "aligned_pair": Pooling("sweet_jax.models.pooling:aligned_pair", width=6, pairs=True),
    },
    "sweet_jax.poolings",
)
