"""Fused attention: the context of a layer's tokens without a matrix of weights in memory.

It has no dropout on the weights: `jax.nn.dot_product_attention` offers none, with either of its
implementations. Nor has it room for the terms that DeBERTa adds to the scores that would not be as
large as what it saves.

Shape letters: B batch, L length, Q first tokens, A attention heads, D head size.
"""

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from sweet_jax.config import UserError

EINSUM = "einsum"  # this project's own: dropout on the weights, and scores that may have more terms


def fused_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, implementation: str
) -> jax.Array:
    """softmax(q k^T) v where mask is True, [B, Q, A, D].

    Args:
      q: scaled queries [B, Q, A, D], of the first Q of the L tokens.
      k: keys [B, L, A, D].
      v: values [B, L, A, D].
      mask: bool [B, L], True at the tokens that may be attended to.
      implementation: "xla", or "cudnn" (a CUDA GPU, bfloat16).

    """
    # As wide as the scores, since cuDNN takes a mask as a bias; each row's own, not its length
    # alone, since a row of a batch may be empty and its gradient must be finite.
    wide = jnp.broadcast_to(mask[:, None, None, :], (len(mask), 1, q.shape[1], k.shape[1]))
    chosen = cast(Literal["xla", "cudnn"], implementation)
    return jax.nn.dot_product_attention(q, k, v, mask=wide, scale=1.0, implementation=chosen)


def supports_shape(implementation: str, count: int, length: int) -> bool:
    """Whether an implementation computes `count` queries of `length` keys, with their gradients.

    cuDNN wants both even where there is a mask. What an exit reads, one token, is not much to save
    on.
    """
    return implementation != "cudnn" or (count % 2 == 0 and length % 2 == 0)


def check_attention(
    implementation: str, name: str, *, obstacle: str, config: Any, dtype: str, backend: str
) -> None:
    """Raises UserError unless an implementation of attention can compute a checkpoint's layers.

    Args:
      implementation: the config key `attention`.
      name: of the checkpoint, for the message.
      obstacle: why fused attention cannot compute its family's layers; "" where it can.
      config: its EncoderConfig, with the rate of dropout that it is trained with.
      dtype: of activations.
      backend: what JAX runs on: "cpu", "gpu", "tpu".

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
