"""BERT (Devlin et al. 2018, arXiv 1810.04805) and RoBERTa (Liu et al. 2019, arXiv 1907.11692).

Shape letters: B batch, L length, H hidden.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.encoder import Attention, Encoder, LayerNorm, embedding_table, linear
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.layers import dropout


@dataclasses.dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """Of model_type "bert"."""

    FIXED: ClassVar[dict[str, Any]] = {
        **EncoderConfig.FIXED,
        "position_embedding_type": "absolute",
    }


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """Of model_type "roberta"."""

    vocab_size: int = 50265
    pad_token_id: int = 1

    @property
    def positions(self) -> int:
        """Positions of tokens begin after the padding's own."""
        return self.max_position_embeddings - self.pad_token_id - 1


class BertEmbeddings(nnx.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    def __init__(self, config: BertConfig, dtype, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.word = embedding_table(config, config.vocab_size, hidden, dtype, rngs)
        self.position = embedding_table(config, config.max_position_embeddings, hidden, dtype, rngs)
        self.token_type = embedding_table(config, config.type_vocab_size, hidden, dtype, rngs)
        self.norm = LayerNorm(hidden, config.layer_norm_eps)
        self.dropout_rate = config.hidden_dropout_prob

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """Rows of the position table, [B or 1, L]."""
        return jnp.arange(input_ids.shape[1])[None]

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, mask, key) -> jax.Array:
        h = self.word(input_ids) + self.token_type(token_type_ids)  # [B, L, H]
        h = h + self.position(self.positions(input_ids))
        return dropout(key, self.norm(h), self.dropout_rate, length_axes=(1,))


class RobertaEmbeddings(BertEmbeddings):
    """The same with positions counted over what is not padding, from the padding's id on."""

    def __init__(self, config: RobertaConfig, dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self.pad = config.pad_token_id
        self.one_type = config.type_vocab_size == 1

    def positions(self, input_ids: jax.Array) -> jax.Array:
        # Told by id and not by mask, as Hugging Face does.
        present = (input_ids != self.pad).astype(jnp.int32)
        return self.pad + jnp.cumsum(present, axis=1) * present  # [B, L]

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, mask, key) -> jax.Array:
        if self.one_type:  # whatever a tokenizer says of pairs
            token_type_ids = jnp.zeros_like(token_type_ids)
        return super().__call__(input_ids, token_type_ids, mask, key)


class BertAttention(Attention):
    """Attention with three projections."""

    def __init__(self, config: BertConfig, dtype, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.query = linear(config, hidden, hidden, dtype, rngs)
        self.key = linear(config, hidden, hidden, dtype, rngs)
        self.value = linear(config, hidden, hidden, dtype, rngs)
        super().__init__(config, dtype, rngs)

    def project(self, asking: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.query(asking), self.key(x), self.value(x)


class Bert(Encoder):
    """BERT; takes a BertConfig."""

    EMBEDDINGS = BertEmbeddings
    ATTENTION = BertAttention


class Roberta(Encoder):
    """RoBERTa; takes a RobertaConfig."""

    EMBEDDINGS = RobertaEmbeddings
    ATTENTION = BertAttention
