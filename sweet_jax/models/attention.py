"""Fused attention: softmax(q k^T) v without a matrix of weights in memory.

`jax.nn.dot_product_attention` offers no dropout on the weights, with either of its implementations,
and terms added to the scores, as relative positions are, would take the memory that it saves.

Shape letters: B batch, L length, Q queries (the first tokens), A attention heads, D head size.
"""

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from sweet_jax.config import UserError

EINSUM = "einsum"  # not fused: with dropout on the weights, and scores that may have more terms


def fused_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, implementation: str
) -> jax.Array:
    """Returns softmax(q k^T) v over the keys where mask is True, [B, Q, A, D].

    Args:
      q: scaled queries [B, Q, A, D], of the first Q of the L tokens.
      k: keys [B, L, A, D].
      v: values [B, L, A, D].
      mask: bool [B, L], True at the tokens that may be attended to.
      implementation: "xla", or "cudnn" (a CUDA GPU, bfloat16).

    """
    # As wide as the scores, since cuDNN takes a mask as a bias; a mask and not lengths, since a
    # row of a batch may be empty and its gradient must be finite.
    wide = jnp.broadcast_to(mask[:, None, None, :], (len(mask), 1, q.shape[1], k.shape[1]))
    chosen = cast(Literal["xla", "cudnn"], implementation)
    return jax.nn.dot_product_attention(q, k, v, mask=wide, scale=1.0, implementation=chosen)


def supports_shape(implementation: str, count: int, length: int) -> bool:
    """Returns whether an implementation computes `count` queries by `length` keys, and gradients.

    cuDNN requires both to be even where there is a mask.
    """
    return implementation != "cudnn" or (count % 2 == 0 and length % 2 == 0)


def check_attention(
    implementation: str, name: str, *, obstacle: str, config: Any, dtype: str, backend: str
) -> None:
    """Checks that an implementation of attention can compute a checkpoint's layers.

    Args:
      implementation: the config key `attention`.
      name: the checkpoint's, for the message.
      obstacle: why fused attention cannot compute its family's layers; "" where it can.
      config: its EncoderConfig, with the rate of dropout that it is trained with.
      dtype: of activations.
      backend: what JAX runs on: "cpu", "gpu", "tpu".

    Raises:
      UserError: it cannot; the message says what to set instead.

    """
    if implementation == EINSUM:
        return
    asked = f"attention is {implementation!r}, but"
    if obstacle:
        raise UserError(
            f"{asked} fused attention cannot compute the layers of {name!r}: {obstacle}; leave "
            "attention out"
        )
    if config.attention_probs_dropout_prob > 0:
        raise UserError(
            f"{asked} fused attention has no dropout on its weights, and {name!r} has "
            f"{config.attention_probs_dropout_prob}: add --config.attention_dropout=off, or leave "
            "attention out"
        )
    if implementation != "cudnn":
        return
    if backend != "gpu":
        raise UserError(f"{asked} JAX runs on {backend}: leave it out, or set it to xla")
    if dtype != "bfloat16":
        raise UserError(f"{asked} dtype is {dtype!r}: add --config.dtype=bfloat16")
    size = config.hidden_size // config.num_attention_heads
    if size % 8 or size > 128:
        raise UserError(
            f"{asked} the heads of {name!r} have size {size}, not a multiple of 8 up to 128: set "
            "it to xla"
        )
