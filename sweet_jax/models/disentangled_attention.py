"""Disentangled attention (He et al. 2020, arXiv 2006.03654, section 3.1).

The attention scores have terms for content to content, content to position ("c2p") and position to
content ("p2c"). All layers share one table of relative positions, and each layer projects it.

Shape letters: B batch, L length, Q first tokens, H hidden, A attention heads, D = H / A head size,
S rows of the table, W rows that are used for distances up to L.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.errors import UserError
from sweet_jax.models.dropout import dropout
from sweet_jax.models.encoder import Attention, LayerNorm
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.positions import rows_by_offset


@dataclasses.dataclass(frozen=True)
class RelativePositionConfig(EncoderConfig):
    """Adds the keys for relative positions to those of any encoder.

    Raises UserError for unsupported values; its message is worded to follow "checkpoint ... has".
    """

    relative_attention: bool = False
    max_relative_positions: int = -1  # less than 1 means max_position_embeddings
    pos_att_type: tuple[str, ...] = ()  # any of "c2p" and "p2c"

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = self.pos_att_type
        if not set(kinds) <= {"c2p", "p2c"} or len(set(kinds)) < len(kinds):
            raise UserError(
                f"pos_att_type {'|'.join(kinds)!r}; supported are 'c2p', 'p2c' and 'c2p|p2c'"
            )

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config that the contents of a config.json describe.

        There, pos_att_type may be a list, a string such as "c2p|p2c", or null.
        """
        kinds = values.get("pos_att_type") or ()
        if isinstance(kinds, str):
            kinds = [kind.strip() for kind in kinds.lower().split("|")]
        if not isinstance(kinds, list | tuple):
            raise UserError(f"pos_att_type {kinds!r} in its config.json")
        return super().from_values({**values, "pos_att_type": tuple(map(str, kinds))})

    @property
    def span(self) -> int:
        """Half the number of rows in the table of relative positions."""
        return self.reach

    @property
    def reach(self) -> int:
        """The distance, in tokens, from which on relative positions share a row."""
        far = self.max_relative_positions
        return far if far >= 1 else self.max_position_embeddings

    @property
    def normed(self) -> bool:
        """Whether the table of relative positions is normalized."""
        return False

    def rows(self, distance: np.ndarray) -> np.ndarray:
        """Returns the row of the table, int, for each distance (query minus key position)."""
        return np.clip(distance + self.span, 0, 2 * self.span - 1)


def along_diagonals(x: jax.Array) -> jax.Array:
    """Returns y [..., Q, L] for x [..., Q, 2L], with y[i, j] = x[i, L - 1 + j - i]; Q is at most L.

    The array is reshaped to rows that are one element shorter, which shifts each row by one against
    the row before. A gather is avoided because its gradient would be a scatter.
    """
    *batch, count, width = x.shape
    length = width // 2
    flat = x.reshape(*batch, count * width)[..., length - 1 :]
    missing = jax.core.max_dim(count * (width - 1) - flat.shape[-1], 0)  # L may be symbolic
    flat = jnp.pad(flat, [(0, 0)] * len(batch) + [(0, missing)])
    rows = flat[..., : count * (width - 1)].reshape(*batch, count, width - 1)
    return rows[..., :length]


class RelativePositions(nnx.Module):
    """Holds the table of relative positions [S, H], normalized if the config requires it."""

    def __init__(self, config: RelativePositionConfig, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        self.embedding = nnx.Param(init(rngs.params(), (2 * config.span, config.hidden_size)))
        norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.norm = norm if config.normed else None
        self.dtype = dtype

    def __call__(self) -> jax.Array:
        rows = self.embedding[...]
        return (rows if self.norm is None else self.norm(rows)).astype(self.dtype)


class DisentangledAttention(Attention):
    """Attention with scores for relative positions, which subclasses project."""

    def __init__(self, config: RelativePositionConfig, dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self.config = config
        self.kinds = config.pos_att_type if config.relative_attention else ()
        # As in transformers, the named kinds count even if relative_attention is off.
        self.scale *= (1 + len(config.pos_att_type)) ** -0.5

    def position_keys(self, relative: jax.Array) -> jax.Array:
        """Returns the keys [W, H] for rows [W, H] of the table, used in "c2p"."""
        raise NotImplementedError  # each version of DeBERTa has its own

    def position_queries(self, relative: jax.Array) -> jax.Array:
        """Returns the queries [W, H] for rows [W, H] of the table, used in "p2c"."""
        raise NotImplementedError  # each version of DeBERTa has its own

    def scores(self, q: jax.Array, k: jax.Array, relative, key) -> jax.Array:
        total = super().scores(q, k, relative, key)  # [B, A, Q, L]
        if not self.kinds:
            return total
        count, length = q.shape[2], k.shape[2]
        # Column c of the input of `along_diagonals` is for the offset column - row = c - (L - 1).
        reach = self.config.reach
        longest = length if isinstance(length, int) else reach
        reached = self.config.rows(np.arange(-longest, longest + 1))
        low, high = reached.min(), reached.max() + 1
        relative = dropout(
            key, relative[low:high], self.hidden_dropout, length_axes=(0,), start=int(low)
        )  # [W, H]

        def rows(projected: jax.Array, sign: int) -> jax.Array:
            heads = projected.reshape(len(projected), self.heads, -1)  # [W, A, D]
            table_rows = rows_by_offset(lambda o: self.config.rows(sign * o) - low, length, reach)
            return heads[table_rows]  # [2L, A, D]

        if "c2p" in self.kinds:  # row query, column key: the distance is row - column
            keys = rows(self.position_keys(relative), -1)
            total += along_diagonals(jnp.einsum("bald,rad->balr", q, keys))
        if "p2c" in self.kinds:  # row key, column query
            queries = rows(self.position_queries(relative) * self.scale, 1)
            position_scores = along_diagonals(jnp.einsum("bald,rad->balr", k, queries))
            total += position_scores.swapaxes(-1, -2)[..., :count, :]
        return total
