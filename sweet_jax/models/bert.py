"""BERT (Devlin et al. 2018, arXiv 1810.04805).

Shape letters: B batch, L length, H hidden.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.dropout import dropout
from sweet_jax.models.embedding import Embedding, token_type_rows
from sweet_jax.models.encoder import Attention, Encoder, LayerNorm, embedding_table, linear
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.tensor_names import TensorNames


@dataclasses.dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """The config.json of model_type "bert"."""

    FIXED: ClassVar[dict[str, Any]] = {
        **EncoderConfig.FIXED,
        "position_embedding_type": "absolute",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("type_vocab_size")


class BertEmbeddings(nnx.Module):
    """Sums and normalizes word, position and token-type embeddings; `width` is H by default."""

    TOKEN_TYPES: ClassVar[bool] = True  # whether there are embeddings of token types

    def __init__(self, config: EncoderConfig, dtype, rngs: nnx.Rngs, width: int | None = None):
        width = width or config.hidden_size

        def rows(count: int) -> Embedding:
            return embedding_table(config, count, width, dtype, rngs)

        self.word, self.position = rows(config.vocab_size), rows(config.max_position_embeddings)
        self.token_type = rows(config.type_vocab_size) if self.TOKEN_TYPES else None
        self.norm = LayerNorm(width, config.layer_norm_eps)
        self.dropout_rate = config.hidden_dropout_prob

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """Returns the rows of the position table to add, int32 [B or 1, L]."""
        return jnp.arange(input_ids.shape[1])[None]

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, mask, key) -> jax.Array:
        h = self.word(input_ids)  # [B, L, H]
        if self.token_type is not None:
            h = h + token_type_rows(self.token_type, token_type_ids)
        h = h + self.position(self.positions(input_ids))  # [B, L, H]
        return dropout(key, self.norm(h), self.dropout_rate, length_axes=(1,))


class BertAttention(Attention):
    """Attention with separate projections of queries, keys and values."""

    def __init__(self, config: EncoderConfig, dtype, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.query = linear(config, hidden, hidden, dtype, rngs)
        self.key = linear(config, hidden, hidden, dtype, rngs)
        self.value = linear(config, hidden, hidden, dtype, rngs)
        super().__init__(config, dtype, rngs)

    def project(self, first: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.query(first), self.key(x), self.value(x)


class Bert(Encoder):
    """BERT; takes a BertConfig."""

    EMBEDDINGS = BertEmbeddings
    ATTENTION = BertAttention


NAMES = TensorNames(
    prefix="bert",
    encoder={
        "embeddings/word": "embeddings.word_embeddings",
        "embeddings/position": "embeddings.position_embeddings",
        "embeddings/token_type": "embeddings.token_type_embeddings",
        "embeddings/norm": "embeddings.LayerNorm",
    },
    layer={
        "attention/query": "attention.self.query",
        "attention/key": "attention.self.key",
        "attention/value": "attention.self.value",
        "attention/output": "attention.output.dense",
        "attention/norm": "attention.output.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "norm": "output.LayerNorm",
    },
)

BERT = EncoderFamily(
    model_type="bert",
    architecture="BertModel",
    config=BertConfig,
    encoder=Bert,
    names=NAMES,
)
