"""DeBERTa v1 (He et al. 2020, arXiv 2006.03654), and the modules that v2 and v3 share with it.

Shape letters: B batch, L length, H hidden, W rows in use of the table of relative positions.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.disentangled_attention import (
    DisentangledAttention,
    RelativePositionConfig,
    RelativePositions,
)
from sweet_jax.models.dropout import dropout
from sweet_jax.models.embedding import Embedding, token_type_rows
from sweet_jax.models.encoder import (
    Attention,
    Encoder,
    LayerNorm,
    embedding_table,
    linear,
)
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.layers import derive_key
from sweet_jax.models.tensor_names import TensorNames


@dataclasses.dataclass(frozen=True)
class DebertaConfig(RelativePositionConfig):
    """The config.json of model_type "deberta"."""

    vocab_size: int = 50265
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    embedding_size: int = 0  # width of the tables; 0 means hidden_size
    position_biased_input: bool = True  # adds absolute positions to the embeddings
    pooler_hidden_act: str = "gelu"

    FIXED: ClassVar[dict[str, Any]] = {
        **EncoderConfig.FIXED,
        "talking_head": False,
        "pooler_dropout": 0,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_activation("pooler_hidden_act")

    @property
    def positions(self) -> int | None:
        """The longest input, in tokens; None without absolute positions.

        Distant relative positions share a row of their table, so they set no limit.
        """
        return self.max_position_embeddings if self.position_biased_input else None

    @property
    def pooler_act(self) -> str:
        """The activation of DeBERTa's own pooler (ContextPooler), as in SWEET's released code."""
        return self.pooler_hidden_act


class DebertaEmbeddings(nnx.Module):
    """Sums the config's embeddings, projects them to H, normalizes them and zeroes the padding."""

    def __init__(self, config: DebertaConfig, dtype, rngs: nnx.Rngs):
        hidden = config.hidden_size
        width = config.embedding_size or hidden

        def rows(count: int) -> Embedding:
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
            h = h + token_type_rows(self.token_type, token_type_ids)
        if self.widen is not None:
            h = self.widen(h)
        h = self.norm(h) * mask[..., None].astype(h.dtype)
        return dropout(key, h, self.dropout_rate, length_axes=(1,))


class DebertaAttention(DisentangledAttention):
    """Attention with one packed projection, and with biases for queries and values only."""

    def __init__(self, config: DebertaConfig, dtype, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.in_proj = linear(config, hidden, 3 * hidden, dtype, rngs, bias=False)
        self.q_bias, self.v_bias = (nnx.Param(jnp.zeros(hidden)) for _ in range(2))
        super().__init__(config, dtype, rngs)
        if "c2p" in self.kinds:
            self.pos_proj = linear(config, hidden, hidden, dtype, rngs, bias=False)
        if "p2c" in self.kinds:
            self.pos_q_proj = linear(config, hidden, hidden, dtype, rngs)

    def project(self, first: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def packed(x: jax.Array, selection: slice) -> list[jax.Array]:
            # The columns are ordered by head, then query, key, value.
            heads = self.in_proj(x).reshape(x.shape[0], self.heads, 3, -1)
            return [heads[:, :, i].reshape(x.shape) for i in range(3)[selection]]

        (k, v), (q,) = packed(x, slice(1, 3)), packed(first, slice(0, 1))
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
        *(r"lm_predictions\.", r"mask_predictions\."),  # pretraining heads
        r"embeddings\.position_embeddings\.",  # used only by the decoder in pretraining
        r"embeddings\.word_embeddings\._weight$",  # a second table, left in some v3 checkpoints
        r"encoder\.LayerNorm\.",  # unused if the table of relative positions is not normalized
    ),
)

DEBERTA = EncoderFamily(
    model_type="deberta",
    architecture="DebertaModel",
    config=DebertaConfig,
    encoder=Deberta,
    names=NAMES,
    fused_attention_obstacle="DeBERTa's attention scores have terms for relative positions",
)
