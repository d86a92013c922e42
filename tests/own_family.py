"""NomicBERT (Nussbaum et al. 2024, arXiv 2402.01613), as another package would write a family.

Its entry point is `nomic_bert = "own_family:NOMIC_BERT"` in the group `sweet_jax.families`.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.dropout import dropout
from sweet_jax.models.embedding import token_type_rows
from sweet_jax.models.encoder import (
    Attention,
    Encoder,
    LayerNorm,
    embedding_table,
    linear,
    token_dropout,
)
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.layers import ACTIVATIONS, derive_optional_key
from sweet_jax.models.modernbert import rotate
from sweet_jax.models.tensor_names import TensorNames


@dataclasses.dataclass(frozen=True)
class NomicBertConfig(EncoderConfig):
    hidden_act: str = "silu"
    rope_theta: float = 1000.0

    @classmethod
    def from_values(cls, values):
        # In config.json, theta is inside a dict, so that it is not found by its name.
        rope = values.get("rope_parameters") or {}
        return super().from_values({**values, "rope_theta": rope.get("rope_theta", 1000.0)})


class Embeddings(nnx.Module):
    def __init__(self, config, dtype, rngs):
        rows, hidden = (config.vocab_size, config.type_vocab_size), config.hidden_size
        self.word, self.token_type = (embedding_table(config, n, hidden, dtype, rngs) for n in rows)
        self.norm = LayerNorm(hidden, config.layer_norm_eps)
        self.rate = config.hidden_dropout_prob

    def __call__(self, input_ids, token_type_ids, mask, key):
        h = self.word(input_ids) + token_type_rows(self.token_type, token_type_ids)  # [B, L, H]
        return dropout(key, self.norm(h), self.rate, length_axes=(1,))


class SelfAttention(Attention):
    def __init__(self, config, dtype, rngs):
        super().__init__(config, dtype, rngs)  # makes `norm`, and `output` with a bias
        hidden = config.hidden_size
        self.packed = linear(config, hidden, 3 * hidden, dtype, rngs, bias=False)
        self.output = linear(config, hidden, hidden, dtype, rngs, bias=False)
        self.theta = config.rope_theta

    def project(self, first, x):
        _, k, v = jnp.split(self.packed(x), 3, axis=-1)
        return jnp.split(self.packed(first), 3, axis=-1)[0], k, v

    def context(self, q, k, v, mask, key, relative):
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        return super().context(q, k, v, mask, key, relative)


class GatedLayer(nnx.Module):
    def __init__(self, config, dtype, rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.attention = SelfAttention(config, dtype, rngs)
        self.gate = linear(config, hidden, inner, dtype, rngs, bias=False)
        self.up = linear(config, hidden, inner, dtype, rngs, bias=False)
        self.down = linear(config, inner, hidden, dtype, rngs, bias=False)
        self.norm = LayerNorm(hidden, config.layer_norm_eps)
        self.activation, self.rate = ACTIVATIONS[config.hidden_act], config.hidden_dropout_prob

    def __call__(self, h, mask, key, relative=None, count=None):
        batch, _, hidden = h.shape
        x = h.reshape(-1, hidden)  # [B*L, H]
        x = self.attention(x, mask, derive_optional_key(key, "attention"), relative, count)
        out = self.down(self.activation(self.gate(x)) * self.up(x))  # [B*Q, H]
        out = token_dropout(derive_optional_key(key, "output"), out, self.rate, batch)
        return self.norm(x + out).reshape(batch, -1, hidden)  # [B, Q, H]


class NomicBert(Encoder):
    EMBEDDINGS, ATTENTION = Embeddings, SelfAttention

    def make_layer(self, number, dtype, rngs):
        return GatedLayer(self.config, dtype, rngs)


NOMIC_BERT = EncoderFamily(
    model_type="nomic_bert",
    architecture="NomicBertModel",
    config=NomicBertConfig,
    encoder=NomicBert,
    names=TensorNames(
        prefix="nomic_bert",
        encoder={
            "embeddings/word": "embeddings.word_embeddings",
            "embeddings/token_type": "embeddings.token_type_embeddings",
            "embeddings/norm": "emb_ln",
        },
        layers="encoder.layers",
        layer={
            "attention/packed": "attn.Wqkv",
            "attention/output": "attn.out_proj",
            "attention/norm": "norm1",
            "gate": "mlp.fc12",
            "up": "mlp.fc11",
            "down": "mlp.fc2",
            "norm": "norm2",
        },
    ),
)
