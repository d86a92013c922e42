"""Fused attention: softmax(q k^T) v without a matrix of attention weights in memory.

`jax.nn.dot_product_attention` supports no dropout on the weights in either of its implementations.
Terms that are added to the scores, such as relative positions, would need the memory it saves.

Shape letters: B batch, L length, Q queries (the first tokens), A attention heads, D head size.
"""

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from sweet_jax.errors import UserError

EINSUM = "einsum"  # not fused: supports dropout on the weights and further terms in the scores


def fused_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, implementation: str
) -> jax.Array:
    """Returns softmax(q k^T) v over the keys where mask is True, [B, Q, A, D].

    Args:
      q: scaled queries of the first Q of the L tokens, [B, Q, A, D].
      k: keys [B, L, A, D].
      v: values [B, L, A, D].
      mask: True at the tokens that may be attended to, bool [B, L].
      implementation: "xla", or "cudnn" (CUDA GPU and bfloat16 only).

    """
    # The mask is broadcast to the shape of the scores because cuDNN uses it as a bias. A mask is
    # used instead of lengths because a row may be empty, and its gradient must still be finite.
    wide = jnp.broadcast_to(mask[:, None, None, :], (len(mask), 1, q.shape[1], k.shape[1]))
    chosen = cast(Literal["xla", "cudnn"], implementation)
    return jax.nn.dot_product_attention(q, k, v, mask=wide, scale=1.0, implementation=chosen)


def supports_shape(implementation: str, count: int, length: int) -> bool:
    """Returns whether an implementation supports `count` queries and `length` keys, with gradients.

    cuDNN requires both numbers to be even if there is a mask.
    """
    return implementation != "cudnn" or (count % 2 == 0 and length % 2 == 0)


def check_attention(
    implementation: str, name: str, *, obstacle: str, config: Any, dtype: str, backend: str
) -> None:
    """Checks that an attention implementation supports the layers of a checkpoint.

    Args:
      implementation: value of the config key `attention`.
      name: name of the checkpoint, for the message.
      obstacle: reason why fused attention cannot compute the family's layers; "" if it can.
      config: EncoderConfig of the checkpoint, with the dropout rates used in training.
      dtype: dtype of the activations.
      backend: JAX backend: "cpu", "gpu" or "tpu".

    Raises:
      UserError: if the layers are not supported; the message says what to set instead.

    """
    if implementation == EINSUM:
        return
    prefix = f"attention is {implementation!r}, but"
    if obstacle:
        raise UserError(
            f"{prefix} fused attention cannot compute the layers of {name!r}: {obstacle}; remove "
            "attention from the config"
        )
    if config.attention_probs_dropout_prob > 0:
        raise UserError(
            f"{prefix} fused attention supports no dropout on its weights, and {name!r} has a rate "
            f"of {config.attention_probs_dropout_prob}: add --config.attention_dropout=off, or "
            "remove attention from the config"
        )
    if implementation != "cudnn":
        return
    if backend != "gpu":
        raise UserError(f"{prefix} JAX runs on {backend}: remove it, or set it to xla")
    if dtype != "bfloat16":
        raise UserError(f"{prefix} dtype is {dtype!r}: add --config.dtype=bfloat16")
    size = config.hidden_size // config.num_attention_heads
    if size % 8 or size > 128:
        raise UserError(
            f"{prefix} the attention heads of {name!r} have size {size}, and cuDNN requires a "
            "multiple of 8 that is at most 128: set it to xla"
        )
