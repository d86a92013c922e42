"""Exit confidences computed on the device, in the program of a stage.

Of the policies that read one exit alone (PLAIN_POLICIES). A program returns complements, 1 minus
the confidence: float32 resolves them where the confidence is near 1, which thresholds often are,
and the confidence itself it would round to 1 at a logit gap of 17.

Shape letters: B batch, C classes, K plain policies.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sweet_jax.exits.calibration import BELOW_ONE
from sweet_jax.inference.engine import PLAIN_POLICIES


def plain_complements(logits: jax.Array, temperatures: jax.Array) -> jax.Array:
    """Computes 1 minus the confidence by each plain policy, above 0, float32 [B, K].

    The formulas are those of `exits/confidences.py`, written with d = (max z - z) / T, so that
    nothing cancels as the confidence approaches 1. NaN where a logit or the temperature is.

    Args:
      logits: float32 [B, C].
      temperatures: float32 [B].

    """
    gaps = logits.max(axis=1, keepdims=True) - logits  # [B, C], 0 at the prediction
    scaled = gaps / temperatures[:, None]
    found = {
        "confidence": _max_probability(scaled),
        "raw_confidence": _max_probability(gaps),
        "entropy": _entropy(scaled),
        "margin": _margin(scaled),
    }
    # An entropy may round to more than 1; and no confidence is 1, see BELOW_ONE.
    return jnp.clip(jnp.stack([found[name] for name in PLAIN_POLICIES], axis=1), 1 - BELOW_ONE, 1)


def _others(gaps: jax.Array) -> jax.Array:
    """Sums exp(-d) over the classes but the predicted one, [B]."""
    first = jnp.arange(gaps.shape[1])[None] == gaps.argmin(axis=1)[:, None]  # [B, C]
    return jnp.where(first, gaps - gaps, jnp.exp(-gaps)).sum(axis=1)


def _max_probability(gaps: jax.Array) -> jax.Array:
    others = _others(gaps)
    return others / (1 + others)


def _entropy(gaps: jax.Array) -> jax.Array:
    others, weights = _others(gaps), jnp.exp(-gaps)
    # 0 times infinity, of a probability that is 0, counts as 0.
    terms = jnp.where(weights == 0, 0, weights * gaps).sum(axis=1)
    return (jnp.log1p(others) + terms / (1 + others)) / np.log(max(2, gaps.shape[1]))


def _margin(gaps: jax.Array) -> jax.Array:
    others = _others(gaps)
    second = jnp.exp(-jnp.sort(gaps, axis=1)[:, 1]) if gaps.shape[1] > 1 else jnp.zeros_like(others)
    return (others + second) / (1 + others)
