"""Building blocks of encoders, and the interface that exits use.

An encoder computes `embed`, and then `layer` 1, 2, ..., each on the hidden state of the one before.
All layers also share `relative_table`, which is None for most encoders.

Shape letters: B batch, L length, H hidden, A attention heads, D = H / A head size, F feed-forward,
S rows of a table of relative positions, Q tokens whose output is computed: all L, or the first ones
for an exit that reads only the first token. Inside a layer, tokens have one axis, B*L, so that
matrix products and their gradients need no copies.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.errors import UserError
from sweet_jax.models.attention import EINSUM, fused_attention, supports_shape
from sweet_jax.models.dropout import dropout
from sweet_jax.models.embedding import Embedding
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.layers import (
    ACTIVATIONS,
    derive_key,
    derive_optional_key,
    layer_norm,
    masked_softmax,
)


def linear(
    config: EncoderConfig, fan_in: int, fan_out: int, dtype, rngs: nnx.Rngs, *, bias: bool = True
) -> nnx.Linear:
    """Returns a dense layer with BERT's initialization, float32 parameters and `dtype` outputs."""
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(fan_in, fan_out, kernel_init=init, use_bias=bias, dtype=dtype, rngs=rngs)


def embedding_table(
    config: EncoderConfig, rows: int, width: int, dtype, rngs: nnx.Rngs
) -> Embedding:
    """Returns a float32 table of embeddings [rows, width] with BERT's initialization."""
    init = nnx.initializers.normal(config.initializer_range)
    return Embedding(rows, width, embedding_init=init, dtype=dtype, rngs=rngs)


def first_tokens(x: jax.Array, batch: int, count: int | None) -> jax.Array:
    """Returns the first `count` tokens of each row, [B*Q, H], given x [B*L, H]; None means all."""
    if count is None:
        return x
    return x.reshape(batch, -1, x.shape[-1])[:, :count].reshape(-1, x.shape[-1])


def token_dropout(key, x: jax.Array, rate: float, batch: int) -> jax.Array:
    """Applies dropout to x [B*L, H] with masks that depend on (row, position, unit), not on L."""
    shaped = x.reshape(batch, -1, x.shape[-1])
    return dropout(key, shaped, rate, length_axes=(1,)).reshape(x.shape)


class LayerNorm(nnx.Module):
    """Applies `layer_norm`; its parameters are scale and, optionally, bias, float32 [H]."""

    def __init__(self, size: int, epsilon: float, *, bias: bool = True):
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size)) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...]
        bias = jnp.zeros_like(scale) if self.bias is None else self.bias[...]
        return layer_norm(x, scale, bias, self.epsilon)


class Attention(nnx.Module):
    """Computes multi-head self-attention, its output projection, the residual and its norm.

    See Vaswani et al. 2017 (arXiv 1706.03762), section 3.2. A subclass creates its projections, and
    may add terms to the scores. This constructor creates `output`, with a bias, and `norm`: a
    subclass that has others sets them after it calls this constructor.
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

    def project(self, first: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B*Q, H] for `first` [B*Q, H], and keys and values [B*L, H] for x."""
        raise NotImplementedError  # each encoder has its own

    def scores(self, q: jax.Array, k: jax.Array, relative, key) -> jax.Array:
        """Returns the attention scores before the softmax, [B, A, Q, L].

        Args:
          q: scaled queries of the first Q of the L tokens, [B, A, Q, D].
          k: keys [B, A, L, D].
          relative: table of relative positions, or None.
          key: typed key for dropout on that table, or None.

        """
        return jnp.einsum("bald,bamd->balm", q, k)

    def visible(self, mask: jax.Array, count: int) -> jax.Array:
        """Returns which keys the first `count` queries may read, bool [B, 1, Q or 1, L]."""
        return mask[:, None, None, :]

    def context(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, key, relative
    ) -> jax.Array:
        """Returns the values weighted by attention, [B, Q, A, D].

        Args:
          q: queries [B, Q, A, D], not scaled.
          k: keys [B, L, A, D].
          v: values [B, L, A, D].
          mask: True at the tokens that may be attended to, bool [B, L].
          key: typed key for dropout, or None.
          relative: table of relative positions, or None.

        """
        fused = self.implementation
        if fused != EINSUM and supports_shape(fused, q.shape[1], k.shape[1]):
            return fused_attention(q * self.scale, k, v, mask, implementation=fused)
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # [B, A, Q or L, D]
        scores = self.scores(
            q * self.scale, k, relative, derive_optional_key(key, "relative")
        )  # [B, A, Q, L]
        weights = masked_softmax(scores, self.visible(mask, q.shape[2])).astype(v.dtype)
        weights = dropout(
            derive_optional_key(key, "weights"),
            weights,
            self.weight_dropout,
            length_axes=(2, 3),
            packed_axis=1,
        )
        return jnp.einsum("balm,bamd->bald", weights, v).transpose(0, 2, 1, 3)

    def attend(self, first: jax.Array, x: jax.Array, mask: jax.Array, key, relative) -> jax.Array:
        """Returns the attention output of `first` [B*Q, H] over x [B*L, H], before the residual."""
        batch = mask.shape[0]  # not len(): the batch size of an exported program is symbolic

        def split(x):
            return x.reshape(batch, -1, self.heads, x.shape[-1] // self.heads)

        q, k, v = map(split, self.project(first, x))  # [B, Q or L, A, D]
        context = self.context(q, k, v, mask, key, relative)  # [B, Q, A, D]
        out = self.output(context.reshape(first.shape))  # [B*Q, H]
        return token_dropout(derive_optional_key(key, "output"), out, self.hidden_dropout, batch)

    def __call__(
        self, x: jax.Array, mask: jax.Array, key, relative=None, count: int | None = None
    ) -> jax.Array:
        first = first_tokens(x, mask.shape[0], count)  # [B*Q, H]
        return self.norm(first + self.attend(first, x, mask, key, relative))


class Layer(nnx.Module):
    """Applies attention, then the feed-forward network with its residual and norm."""

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
    """Runs an encoder layer by layer; base class of every family's encoder.

    Dropout is an explicit function of a typed key; None disables it.

    Args:
      config: sizes and dropout rates.
      key: typed key from which the random initial parameters are derived by their names.
      dtype: dtype of activations; parameters are float32.

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
        self.final_norm = self.make_final_norm()

    def set_attention(self, implementation: str) -> None:
        """Sets the attention implementation of every layer; see `attention.check_attention`.

        Raises UserError for a fused implementation if a layer has no `attention` to set it for.
        """
        for number in range(1, self.config.num_hidden_layers + 1):
            attention: Any = getattr(self.layer_module(number), "attention", None)
            if hasattr(attention, "implementation"):
                attention.implementation = implementation
            elif implementation != EINSUM:
                raise UserError(
                    f"attention is {implementation!r}, but layer {number} of {type(self).__name__} "
                    "has no attention that can be fused: remove attention from the config"
                )

    def make_layer(self, number: int, dtype, rngs: nnx.Rngs) -> nnx.Module:
        """Returns layer `number`, from 1, with random parameters."""
        return Layer(self.config, self.ATTENTION, dtype, rngs)

    def make_final_norm(self) -> LayerNorm | None:
        """Returns a new final norm for the output, or None if the encoder's layers end with a norm.

        In an `EarlyExit` model, each exit has its own final norm.
        """
        return None

    def layer_module(self, number: int) -> Any:
        """Returns the module of layer `number`, from 1."""
        return self.layers[number - 1]

    def embed(
        self, input_ids: jax.Array, token_type_ids: jax.Array, mask: jax.Array, key=None
    ) -> jax.Array:
        """Returns the embeddings [B, L, H] of ids and types, int32 [B, L]; see `layer` for mask."""
        return self.embeddings(
            input_ids, token_type_ids, mask, derive_optional_key(key, "embeddings")
        )

    def relative_table(self) -> jax.Array | None:
        """Returns the table of relative positions that `layer` takes, [S, H] or [S, A], or None."""
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
        """Returns the hidden state after a layer, [B, L, H], or [B, Q, H] with `count`.

        Args:
          number: number of the layer, from 1.
          h: hidden state before the layer, [B, L, H].
          mask: True at the tokens that may be attended to, bool [B, L].
          key: typed key for dropout, or None.
          relative: table that `relative_table` returns.
          count: number of first tokens to compute, Q; None means all. The results are the same, at
            little more than the cost of all keys and values.

        """
        return self.layer_module(number)(
            h, mask, derive_optional_key(key, "layer", number), relative, count
        )
