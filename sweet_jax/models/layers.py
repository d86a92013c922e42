"""Functions that all encoders share: derived keys, rematerialization, layer norm, softmax, GELU.

The last three have hand-written backward passes. With automatic differentiation, they take a fifth
of a training step on a CPU (experiments/benchmarks/train_step.py).

Shape letters: B batch, L length, H hidden, A attention heads.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def derive_key(key: jax.Array, *names: str | int | jax.Array) -> jax.Array:
    """Folds names (strings or numbers) into a typed key, one after the other.

    The result depends only on the key and the names, so that adding a layer, an exit or a replica
    does not change the random numbers of the others.
    """
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()) if isinstance(name, str) else name)
    return key


def derive_optional_key(key: jax.Array | None, *names: str | int) -> jax.Array | None:
    """Returns `derive_key(key, *names)`, or None (no dropout) if `key` is None."""
    return None if key is None else derive_key(key, *names)


def rematerialize(function: Callable[..., jax.Array], h: jax.Array, *others: Any) -> jax.Array:
    """Returns function(h, *others), keeping only the arguments for the backward pass.

    Everything else is recomputed once the gradient of the result is known. jax.checkpoint leaves
    this order to the compiler, and XLA on a CPU recomputes everything earlier, which saves no
    memory. Here the recomputation starts from h plus a zero that depends on the gradient, which
    enforces the order.

    Args:
      function: function that returns a floating-point array; no gradient is taken with respect to
        variables that it closes over.
      h: floating-point array.
      others: further arguments, trees of floating-point arrays.

    """

    def forward(h, *others):
        return function(h, *others), (h, others)

    def backward(residuals, g):
        h, others = residuals
        first = g[(0,) * g.ndim]
        zero = first - first  # the compiler keeps this, since it is NaN for NaN and infinity
        return jax.vjp(function, h + zero.astype(h.dtype), *others)[1](g)

    again = jax.custom_vjp(function)
    again.defvjp(forward, backward)
    return again(h, *others)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Returns GELU: x times the normal distribution function of x (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5))


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The derivative, as large as x, is kept for the backward pass, which needs no second erf then.
    cdf = 0.5 * (1 + jax.lax.erf(x * 2**-0.5))
    slope = cdf + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5
    return x * cdf, slope


gelu.defvjp(_gelu_forward, lambda slope, g: (g * slope,))


def tanh_gelu(x: jax.Array) -> jax.Array:
    """Returns the tanh approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
    """Returns the sigmoid approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


# By the names in transformers, which has several names for some functions.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


@jax.custom_vjp
def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the softmax over the last axis where mask is True, and 0 elsewhere, in float32.

    Args:
      scores: floating-point array [..., L].
      mask: bool array, broadcastable to scores. A row that is all False gets equal weights.

    """
    scores = jnp.where(mask, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    exponent = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponent * (1 / exponent.sum(axis=-1, keepdims=True))


def _softmax_forward(scores, mask):
    weights = masked_softmax(scores, mask)
    return weights, (weights, jnp.zeros((), scores.dtype))


def _softmax_backward(residuals, g):
    weights, like = residuals
    scores = weights * (g - (g * weights).sum(axis=-1, keepdims=True))
    return scores.astype(like.dtype), None


masked_softmax.defvjp(_softmax_forward, _softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Normalizes x [..., H] over H (Ba et al. 2016, arXiv 1607.06450), with float32 statistics.

    The variance is computed from the deviations because E[x^2] - E[x]^2 loses precision.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    rate = jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon)
    normed = centred * rate
    scale, bias = (v.reshape(*[1] * (x.ndim - 1), -1) for v in (scale, bias))  # [..., H]
    return (normed * scale + bias).astype(x.dtype), (normed.astype(x.dtype), rate, scale)


def _layer_norm_backward(epsilon, residuals, g):
    normed, rate, scale = residuals
    wide, h = g.astype(jnp.float32), normed.astype(jnp.float32)
    leading = tuple(range(g.ndim - 1))
    out = wide * scale
    out = out - out.mean(axis=-1, keepdims=True) - h * (out * h).mean(axis=-1, keepdims=True)
    return (out * rate).astype(g.dtype), (wide * h).sum(leading), wide.sum(leading)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
