"""The optimizers and learning-rate schedules of this package; see `sweet_jax.optimizers`."""

import jax
import jax.numpy as jnp
import optax

# AdamW's weight decay is added by the training step. Values from the SWEET paper, appendix A.
ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
LION = optax.scale_by_lion(b1=0.9, b2=0.99)  # Chen et al. 2023 (arXiv 2302.06675), algorithm 2


def linear(remaining: jax.Array) -> jax.Array:
    """Returns the remaining share of the steps itself, float32 [...] (SWEET paper, appendix A)."""
    return remaining


def cosine(remaining: jax.Array) -> jax.Array:
    """Returns a share, float32 [...], that falls from 1 to 0 along half a cosine.

    Source: Loshchilov and Hutter 2017 (arXiv 1608.03983), equation 5, without restarts.
    """
    return 0.5 - 0.5 * jnp.cos(jnp.pi * remaining)


def constant(remaining: jax.Array) -> jax.Array:
    """Returns ones, float32 [...]: after warm-up, the learning rate stays at its peak."""
    return jnp.ones_like(remaining)
