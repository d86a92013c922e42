"""BERT (Devlin et al. 2018, arXiv 1810.04805) as an encoder that shows every hidden state.

Shape letters: B batch, L length, H hidden, A attention heads, D = H / A head size, F feed-forward.
Inside a layer tokens are one axis, B*L: matrix products and their gradients then need no copies.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.layers import derive, dropout, gelu, layer_norm, masked_softmax, sub_key


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The keys of a Hugging Face `config.json` of model_type "bert" that change the arithmetic."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def linear(config: BertConfig, fan_in: int, fan_out: int, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer with BERT's initialisation, activations in `dtype`, parameters in float32."""
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(fan_in, fan_out, kernel_init=init, dtype=dtype, rngs=rngs)


class LayerNorm(nnx.Module):
    """`layer_norm` with its parameters scale and bias, float32 [H]."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


class BertEmbeddings(nnx.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    def __init__(self, config: BertConfig, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)

        def table(rows: int) -> nnx.Embed:
            return nnx.Embed(rows, config.hidden_size, embedding_init=init, dtype=dtype, rngs=rngs)

        self.word = table(config.vocab_size)
        self.position = table(config.max_position_embeddings)
        self.token_type = table(config.type_vocab_size)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, key) -> jax.Array:
        h = self.word(input_ids) + self.token_type(token_type_ids)  # [B, L, H]
        h = h + self.position(jnp.arange(input_ids.shape[1]))[None]
        return dropout(key, self.norm(h), self.dropout_rate, length_axes=(1,))


class BertAttention(nnx.Module):
    """Multi-head self-attention, its output projection, the residual and its norm."""

    def __init__(self, config: BertConfig, dtype, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.query = linear(config, hidden, hidden, dtype, rngs)
        self.key = linear(config, hidden, hidden, dtype, rngs)
        self.value = linear(config, hidden, hidden, dtype, rngs)
        self.output = linear(config, hidden, hidden, dtype, rngs)
        self.norm = LayerNorm(hidden, config.layer_norm_eps)
        self.heads = config.num_attention_heads
        self.weight_dropout = config.attention_probs_dropout_prob
        self.hidden_dropout = config.hidden_dropout_prob

    def __call__(self, x: jax.Array, mask: jax.Array, key) -> jax.Array:
        batch, length = mask.shape
        size = x.shape[-1] // self.heads

        def split(x):
            return x.reshape(batch, length, self.heads, size).transpose(0, 2, 1, 3)  # [B, A, L, D]

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = jnp.einsum("bald,bamd->balm", q * size**-0.5, k)  # [B, A, L, L]
        weights = masked_softmax(scores, mask[:, None, None, :]).astype(v.dtype)
        weights = dropout(
            sub_key(key, "weights"), weights, self.weight_dropout, length_axes=(2, 3), packed_axis=1
        )
        context = jnp.einsum("balm,bamd->bald", weights, v).transpose(0, 2, 1, 3)  # [B, L, A, D]
        out = self.output(context.reshape(x.shape))  # [B*L, H]
        out = _token_dropout(sub_key(key, "output"), out, self.hidden_dropout, batch)
        return self.norm(x + out)


class BertLayer(nnx.Module):
    """Attention, then the two-matrix feed-forward with its residual and norm."""

    def __init__(self, config: BertConfig, dtype, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.attention = BertAttention(config, dtype, rngs)
        self.intermediate = linear(config, hidden, inner, dtype, rngs)
        self.output = linear(config, inner, hidden, dtype, rngs)
        self.norm = LayerNorm(hidden, config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(self, h: jax.Array, mask: jax.Array, key) -> jax.Array:
        x = h.reshape(-1, h.shape[-1])  # [B*L, H]
        x = self.attention(x, mask, sub_key(key, "attention"))
        out = self.output(self.activation(self.intermediate(x)))
        out = _token_dropout(sub_key(key, "output"), out, self.dropout_rate, len(h))
        return self.norm(x + out).reshape(h.shape)


class Bert(nnx.Module):
    """The encoder, with the call signature that every encoder of this package has.

    Dropout is an explicit function of a typed key: None switches it off.

    Args:
      config: sizes and rates.
      key: typed key that the random initial parameters are derived from, name by name.
      dtype: of activations; parameters are float32.

    """

    def __init__(self, config: BertConfig, key: jax.Array, dtype=jnp.float32):
        def rngs(*names: str | int) -> nnx.Rngs:
            return nnx.Rngs(derive(key, *names))

        self.config = config
        self.embeddings = BertEmbeddings(config, dtype, rngs("embeddings"))
        self.layers = nnx.List(
            BertLayer(config, dtype, rngs("layer", number))
            for number in range(1, config.num_hidden_layers + 1)
        )

    def embed(self, input_ids: jax.Array, token_type_ids: jax.Array, key=None) -> jax.Array:
        """Embedding output [B, L, H] from ids and token types, int32 [B, L]."""
        return self.embeddings(input_ids, token_type_ids, sub_key(key, "embeddings"))

    def layer(self, number: int, h: jax.Array, mask: jax.Array, key=None) -> jax.Array:
        """Hidden state [B, L, H] after layer `number` (from 1), given the one before it.

        mask is bool [B, L], True at the tokens that may be attended to.
        """
        return self.layers[number - 1](h, mask, sub_key(key, "layer", number))


def _token_dropout(key, x: jax.Array, rate: float, batch: int) -> jax.Array:
    """Dropout of [B*L, H] whose masks depend on (row, position, unit) but not on L."""
    shaped = x.reshape(batch, -1, x.shape[-1])
    return dropout(key, shaped, rate, length_axes=(1,)).reshape(x.shape)
