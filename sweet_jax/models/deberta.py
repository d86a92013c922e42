"""DeBERTa (He et al. 2020, arXiv 2006.03654), and what its later versions share with it.

Attention is disentangled (section 3.1): beside content to content it scores content to
position ("c2p") and position to content ("p2c"), from one table of relative positions that all
layers share and each projects for itself.

Shape letters: B batch, L length, Q first tokens, H hidden, A attention heads, D = H / A head size,
S rows of the table, W those that distances up to L reach.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.config import UserError
from sweet_jax.models.encoder import (
    Attention,
    Encoder,
    LayerNorm,
    embedding_table,
    linear,
)
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.layers import derive_key, dropout
from sweet_jax.models.tensor_names import TensorNames


@dataclasses.dataclass(frozen=True)
class DebertaConfig(EncoderConfig):
    """The config.json of model_type "deberta"."""

    vocab_size: int = 50265
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    embedding_size: int = 0  # of the tables; 0 = hidden_size
    position_biased_input: bool = True  # absolute positions too, added to the embeddings
    relative_attention: bool = False
    max_relative_positions: int = -1  # below 1 = max_position_embeddings
    pos_att_type: tuple[str, ...] = ()  # of "c2p", "p2c"
    pooler_hidden_act: str = "gelu"

    FIXED: ClassVar[dict[str, Any]] = {
        **EncoderConfig.FIXED,
        "talking_head": False,
        "pooler_dropout": 0,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_activation("pooler_hidden_act")
        kinds = self.pos_att_type
        if not set(kinds) <= {"c2p", "p2c"} or len(set(kinds)) < len(kinds):
            raise UserError(
                f"pos_att_type {'|'.join(kinds)!r}; supported are 'c2p', 'p2c' and 'c2p|p2c'"
            )

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """As above; pos_att_type may be a list, or text with bars, or null."""
        kinds = values.get("pos_att_type") or ()
        if isinstance(kinds, str):
            kinds = [kind.strip() for kind in kinds.lower().split("|")]
        if not isinstance(kinds, list | tuple):
            raise UserError(f"pos_att_type {kinds!r} in its config.json")
        return super().from_values({**values, "pos_att_type": tuple(map(str, kinds))})

    @property
    def positions(self) -> int | None:
        """Relative positions have no end: far ones share the table's last row."""
        return self.max_position_embeddings if self.position_biased_input else None

    @property
    def pooler_act(self) -> str:
        """The release of SWEET keeps DeBERTa's own pooler (its ContextPooler), with a GELU."""
        return self.pooler_hidden_act

    @property
    def span(self) -> int:
        """Half the rows of the table of relative positions: distances from -span to span - 1."""
        return self.reach

    @property
    def reach(self) -> int:
        """The distance in tokens up to which relative positions are told apart."""
        far = self.max_relative_positions
        return far if far >= 1 else self.max_position_embeddings

    @property
    def normed(self) -> bool:
        """Whether the table of relative positions is normalised."""
        return False

    def rows(self, distance: np.ndarray) -> np.ndarray:
        """The row of the table of relative positions for each distance (query minus key), int."""
        return np.clip(distance + self.span, 0, 2 * self.span - 1)


def along_diagonals(x: jax.Array) -> jax.Array:
    """[..., Q, 2L] → [..., Q, L] with y[i, j] = x[i, L - 1 + j - i]; Q is at most L.

    Rows one shorter shift each row by one against the one before: no gather, whose gradient would
    be a scatter.
    """
    *batch, count, width = x.shape
    length = width // 2
    flat = x.reshape(*batch, count * width)[..., length - 1 :]
    missing = count * (width - 1) - flat.shape[-1]  # beyond what the last row needs
    flat = jnp.pad(flat, [(0, 0)] * len(batch) + [(0, max(0, missing))])
    rows = flat[..., : count * (width - 1)].reshape(*batch, count, width - 1)
    return rows[..., :length]


class DebertaEmbeddings(nnx.Module):
    """Sum of what embeddings the config has, widened to H, normalised, zero at padding."""

    def __init__(self, config: DebertaConfig, dtype, rngs: nnx.Rngs):
        hidden = config.hidden_size
        width = config.embedding_size or hidden

        def rows(count: int) -> nnx.Embed:
            return embedding_table(config, count, width, dtype, rngs)

        biased, types = config.position_biased_input, config.type_vocab_size
        self.word = rows(config.vocab_size)
        self.position = rows(config.max_position_embeddings) if biased else None
        self.token_type = rows(types) if types else None
        narrow = width != hidden
        self.widen = linear(config, width, hidden, dtype, rngs, bias=False) if narrow else None
        self.norm = LayerNorm(hidden, config.layer_norm_eps)
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, mask, key) -> jax.Array:
        h = self.word(input_ids)  # [B, L, H or narrower]
        if self.position is not None:
            h = h + self.position(jnp.arange(input_ids.shape[1]))[None]
        if self.token_type is not None:
            h = h + self.token_type(token_type_ids)
        if self.widen is not None:
            h = self.widen(h)
        h = self.norm(h) * mask[..., None].astype(h.dtype)
        return dropout(key, h, self.dropout_rate, length_axes=(1,))


class RelativePositions(nnx.Module):
    """The table of relative positions [S, H], normalised where the config says so."""

    def __init__(self, config: DebertaConfig, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        self.embedding = nnx.Param(init(rngs.params(), (2 * config.span, config.hidden_size)))
        norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.norm = norm if config.normed else None
        self.dtype = dtype

    def __call__(self) -> jax.Array:
        rows = self.embedding[...]
        return (rows if self.norm is None else self.norm(rows)).astype(self.dtype)


class DisentangledAttention(Attention):
    """Attention that also scores relative positions; subclasses say how they are projected."""

    def __init__(self, config: DebertaConfig, dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self.config = config
        self.kinds = config.pos_att_type if config.relative_attention else ()
        # By the kinds named, whether or not relative_attention is on, as Hugging Face scales.
        self.scale *= (1 + len(config.pos_att_type)) ** -0.5

    def position_keys(self, relative: jax.Array) -> jax.Array:
        """Keys [W, H] of rows [W, H] of the table, for "c2p"."""
        raise NotImplementedError  # each version of DeBERTa has its own

    def position_queries(self, relative: jax.Array) -> jax.Array:
        """Queries [W, H] of rows [W, H] of the table, for "p2c"."""
        raise NotImplementedError  # each version of DeBERTa has its own

    def scores(self, q: jax.Array, k: jax.Array, relative, key) -> jax.Array:
        total = super().scores(q, k, relative, key)  # [B, A, Q, L]
        if not self.kinds:
            return total
        count, length = q.shape[2], k.shape[2]
        # Column c of what `along_diagonals` reads stands for (column - row) = c - (L - 1).
        offset = np.arange(2 * length) - (length - 1)
        reached = self.config.rows(np.arange(-length, length + 1))
        low, high = reached.min(), reached.max() + 1
        relative = dropout(
            key, relative[low:high], self.hidden_dropout, length_axes=(0,), start=int(low)
        )  # [W, H]

        def rows(projected: jax.Array, distance: np.ndarray) -> jax.Array:
            heads = projected.reshape(len(projected), self.heads, -1)  # [W, A, D]
            return heads[self.config.rows(distance) - low]  # [2L, A, D]

        if "c2p" in self.kinds:  # row query, column key: the distance is row - column
            keys = rows(self.position_keys(relative), -offset)
            total += along_diagonals(jnp.einsum("bald,rad->balr", q, keys))
        if "p2c" in self.kinds:  # row key, column query
            queries = rows(self.position_queries(relative) * self.scale, offset)
            found = along_diagonals(jnp.einsum("bald,rad->balr", k, queries))
            total += found.swapaxes(-1, -2)[..., :count, :]
        return total


class DebertaAttention(DisentangledAttention):
    """One packed projection, with biases of queries and values only."""

    def __init__(self, config: DebertaConfig, dtype, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.in_proj = linear(config, hidden, 3 * hidden, dtype, rngs, bias=False)
        self.q_bias, self.v_bias = (nnx.Param(jnp.zeros(hidden)) for _ in range(2))
        super().__init__(config, dtype, rngs)
        if "c2p" in self.kinds:
            self.pos_proj = linear(config, hidden, hidden, dtype, rngs, bias=False)
        if "p2c" in self.kinds:
            self.pos_q_proj = linear(config, hidden, hidden, dtype, rngs)

    def project(self, asking: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def packed(x: jax.Array, parts: slice) -> list[jax.Array]:
            # By head: query, key, value.
            heads = self.in_proj(x).reshape(x.shape[0], self.heads, 3, -1)
            return [heads[:, :, i].reshape(x.shape) for i in range(3)[parts]]

        (k, v), (q,) = packed(x, slice(1, 3)), packed(asking, slice(0, 1))
        q_bias, v_bias = (b[...].astype(x.dtype)[None] for b in (self.q_bias, self.v_bias))
        return q + q_bias, k, v + v_bias

    def position_keys(self, relative: jax.Array) -> jax.Array:
        return self.pos_proj(relative)

    def position_queries(self, relative: jax.Array) -> jax.Array:
        return self.pos_q_proj(relative)


class Deberta(Encoder):
    """DeBERTa v1; takes a DebertaConfig."""

    EMBEDDINGS = DebertaEmbeddings
    ATTENTION: ClassVar[type[Attention]] = DebertaAttention

    def __init__(self, config: DebertaConfig, key: jax.Array, dtype=jnp.float32):
        super().__init__(config, key, dtype)
        rngs = nnx.Rngs(derive_key(key, "relative"))
        relative = config.relative_attention
        self.relative = RelativePositions(config, dtype, rngs) if relative else None

    def relative_table(self) -> jax.Array | None:
        return None if self.relative is None else self.relative()


def separate_pairs_once(tokenizer: Any) -> None:
    """Sets a tokenizer to one [SEP] between the texts of a pair, as DeBERTa was pretrained on.

    transformers 5 puts two there.
    """
    from tokenizers import processors  # heavy, and not needed for the arithmetic

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[
            ("[CLS]", tokenizer.cls_token_id),
            ("[SEP]", tokenizer.sep_token_id),
        ],
    )


NAMES = TensorNames(
    prefix="deberta",
    encoder={
        "embeddings/word": "embeddings.word_embeddings",
        "embeddings/position": "embeddings.position_embeddings",
        "embeddings/token_type": "embeddings.token_type_embeddings",
        "embeddings/widen": "embeddings.embed_proj",
        "embeddings/norm": "embeddings.LayerNorm",
        "relative": "encoder.rel_embeddings",
        "relative/norm": "encoder.LayerNorm",
    },
    layer={
        "attention": "attention.self",  # q_bias, v_bias
        "attention/in_proj": "attention.self.in_proj",
        "attention/pos_proj": "attention.self.pos_proj",
        "attention/pos_q_proj": "attention.self.pos_q_proj",
        "attention/output": "attention.output.dense",
        "attention/norm": "attention.output.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "norm": "output.LayerNorm",
    },
    ignored=(
        *(r"lm_predictions\.", r"mask_predictions\."),  # pre-training heads
        r"embeddings\.position_embeddings\.",  # pretrained with, but used in the decoder only
        r"embeddings\.word_embeddings\._weight$",  # a second table, left in some v3 checkpoints
        r"encoder\.LayerNorm\.",  # of a table of relative positions that is not normalised
    ),
)

DEBERTA = EncoderFamily(
    model_type="deberta",
    architecture="DebertaModel",
    config=DebertaConfig,
    encoder=Deberta,
    names=NAMES,
    repair_tokenizer=separate_pairs_once,
    fused_attention_obstacle="DeBERTa's attention scores have terms for relative positions",
)
