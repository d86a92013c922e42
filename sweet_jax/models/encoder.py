"""What every encoder is made of, and the one signature that the exits call it by.

An encoder is `embed`, then `layer` 1, 2, ... each on the hidden state of the one before;
`relative_table` is what all layers share beside it (None for most).

Shape letters: B batch, L length, H hidden, A attention heads, D = H / A head size, F feed-forward,
S rows of a table of relative positions. Inside a layer tokens are one axis, B*L: matrix products
and their gradients then need no copies. Q is the tokens whose output is wanted: all L, or the first
few, since an exit reads nothing but the first.
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.attention import EINSUM, fused_attention, supports_shape
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.layers import (
    ACTIVATIONS,
    derive_key,
    derive_optional_key,
    dropout,
    layer_norm,
    masked_softmax,
)


def linear(
    config: EncoderConfig, fan_in: int, fan_out: int, dtype, rngs: nnx.Rngs, *, bias: bool = True
) -> nnx.Linear:
    """A dense layer with BERT's initialisation, activations in `dtype`, parameters in float32."""
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(fan_in, fan_out, kernel_init=init, use_bias=bias, dtype=dtype, rngs=rngs)


def embedding_table(
    config: EncoderConfig, rows: int, width: int, dtype, rngs: nnx.Rngs
) -> nnx.Embed:
    """A table of embeddings [rows, width] with BERT's initialisation."""
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Embed(rows, width, embedding_init=init, dtype=dtype, rngs=rngs)


def first_tokens(x: jax.Array, batch: int, count: int | None) -> jax.Array:
    """The first `count` tokens of each row, [B*Q, H] of [B*L, H]; all for None."""
    if count is None:
        return x
    return x.reshape(batch, -1, x.shape[-1])[:, :count].reshape(-1, x.shape[-1])


def token_dropout(key, x: jax.Array, rate: float, batch: int) -> jax.Array:
    """Dropout of [B*L, H] whose masks depend on (row, position, unit) but not on L."""
    shaped = x.reshape(batch, -1, x.shape[-1])
    return dropout(key, shaped, rate, length_axes=(1,)).reshape(x.shape)


class LayerNorm(nnx.Module):
    """`layer_norm` with its parameters scale and bias, float32 [H]."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


class Attention(nnx.Module):
    """Multi-head self-attention, its output projection, the residual and its norm.

    A subclass makes the projections before it calls this constructor, and may add to the scores.
    """

    def __init__(self, config: EncoderConfig, dtype, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.output = linear(config, hidden, hidden, dtype, rngs)
        self.norm = LayerNorm(hidden, config.layer_norm_eps)
        self.heads = config.num_attention_heads
        self.scale = (hidden // self.heads) ** -0.5
        self.weight_dropout = config.attention_probs_dropout_prob
        self.hidden_dropout = config.hidden_dropout_prob
        self.implementation = EINSUM

    def project(self, asking: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B*Q, H] of tokens `asking` [B*Q, H], keys and values [B*L, H] of tokens x."""
        raise NotImplementedError  # each encoder has its own

    def scores(self, q: jax.Array, k: jax.Array, relative, key) -> jax.Array:
        """What the softmax is taken of, [B, A, Q, L].

        From scaled queries [B, A, Q, D] and keys [B, A, L, D]; Q are the first of the L tokens.
        """
        return jnp.einsum("bald,bamd->balm", q, k)

    def context(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, key, relative
    ) -> jax.Array:
        """What the weights make of the values, [B, Q, A, D], from q like it and k, v [B, L, A, D].

        mask is bool [B, L].
        """
        fused = self.implementation  # of an implementation that takes these shapes
        if fused != EINSUM and supports_shape(fused, q.shape[1], k.shape[1]):
            return fused_attention(q * self.scale, k, v, mask, implementation=fused)
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # [B, A, Q or L, D]
        scores = self.scores(
            q * self.scale, k, relative, derive_optional_key(key, "relative")
        )  # [B, A, Q, L]
        weights = masked_softmax(scores, mask[:, None, None, :]).astype(v.dtype)
        weights = dropout(
            derive_optional_key(key, "weights"),
            weights,
            self.weight_dropout,
            length_axes=(2, 3),
            packed_axis=1,
        )
        return jnp.einsum("balm,bamd->bald", weights, v).transpose(0, 2, 1, 3)

    def __call__(
        self, x: jax.Array, mask: jax.Array, key, relative=None, count: int | None = None
    ) -> jax.Array:
        batch = mask.shape[0]  # not len(): an exported program has a batch without a number
        asking = first_tokens(x, batch, count)  # [B*Q, H]

        def split(x):
            return x.reshape(batch, -1, self.heads, x.shape[-1] // self.heads)

        q, k, v = map(split, self.project(asking, x))  # [B, Q or L, A, D]
        context = self.context(q, k, v, mask, key, relative)
        out = self.output(context.reshape(asking.shape))  # [B*Q, H]
        out = token_dropout(derive_optional_key(key, "output"), out, self.hidden_dropout, batch)
        return self.norm(asking + out)


class Layer(nnx.Module):
    """Attention, then the two-matrix feed-forward with its residual and norm."""

    def __init__(self, config: EncoderConfig, attention: type[Attention], dtype, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.attention = attention(config, dtype, rngs)
        self.intermediate = linear(config, hidden, inner, dtype, rngs)
        self.output = linear(config, inner, hidden, dtype, rngs)
        self.norm = LayerNorm(hidden, config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self, h: jax.Array, mask: jax.Array, key, relative=None, count: int | None = None
    ) -> jax.Array:
        batch, _, hidden = h.shape
        x = h.reshape(-1, hidden)  # [B*L, H]
        x = self.attention(
            x, mask, derive_optional_key(key, "attention"), relative, count
        )  # [B*Q, H]
        out = self.output(self.activation(self.intermediate(x)))
        out = token_dropout(derive_optional_key(key, "output"), out, self.dropout_rate, batch)
        return self.norm(x + out).reshape(batch, -1, hidden)  # [B, Q, H]


class Encoder(nnx.Module):
    """The encoder, with the call signature that every encoder of this package has.

    Dropout is an explicit function of a typed key: None switches it off.

    Args:
      config: sizes and rates.
      key: typed key that the random initial parameters are derived from, name by name.
      dtype: of activations; parameters are float32.

    """

    EMBEDDINGS: ClassVar[Callable[..., nnx.Module]]
    ATTENTION: ClassVar[type[Attention]]

    def __init__(self, config: EncoderConfig, key: jax.Array, dtype=jnp.float32):
        self.config = config
        self.embeddings = self.EMBEDDINGS(config, dtype, nnx.Rngs(derive_key(key, "embeddings")))
        self.layers = nnx.List(
            self.make_layer(number, dtype, nnx.Rngs(derive_key(key, "layer", number)))
            for number in range(1, config.num_hidden_layers + 1)
        )

    def set_attention(self, implementation: str) -> None:
        """Chooses how every layer attends: see `attention.check_attention`."""
        for layer in self.layers:
            layer.attention.implementation = implementation

    def make_layer(self, number: int, dtype, rngs: nnx.Rngs) -> Layer:
        """Layer `number`, from 1, with random parameters."""
        return Layer(self.config, self.ATTENTION, dtype, rngs)

    def embed(
        self, input_ids: jax.Array, token_type_ids: jax.Array, mask: jax.Array, key=None
    ) -> jax.Array:
        """Embedding output [B, L, H] from ids and token types, int32 [B, L], and mask as below."""
        return self.embeddings(
            input_ids, token_type_ids, mask, derive_optional_key(key, "embeddings")
        )

    def relative_table(self) -> jax.Array | None:
        """The embeddings of relative positions [S, H] that `layer` wants, or None."""
        return None

    def layer(
        self,
        number: int,
        h: jax.Array,
        mask: jax.Array,
        key=None,
        relative=None,
        *,
        count: int | None = None,
    ) -> jax.Array:
        """Hidden state [B, L, H] after layer `number` (from 1), given the one before it.

        mask is bool [B, L], True at the tokens that may be attended to; relative is
        `relative_table()`. With `count`, the hidden state of that many first tokens [B, Q, H]: the
        same numbers, for little more than the keys and values of all.
        """
        return self.layers[number - 1](
            h, mask, derive_optional_key(key, "layer", number), relative, count
        )
