"""Exit confidences computed on the device, in the program of a stage.

Of the policies that read one exit alone (PLAIN_POLICIES). A program returns complements, 1 minus
the confidence: float32 resolves them where the confidence is near 1, which thresholds often are,
and the confidence itself it would round to 1 at a logit gap of 17.

Shape letters: B batch, C classes, K plain policies.
"""

import math

import jax
import jax.numpy as jnp

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
    predicted = jnp.arange(gaps.shape[1])[None] == gaps.argmin(axis=1)[:, None]  # [B, C]
    scaled = gaps / temperatures[:, None]
    weights = jnp.exp(-scaled)  # [B, C], relative to the prediction's
    others = _sum_others(weights, scaled, predicted)  # [B]
    others_raw = _sum_others(jnp.exp(-gaps), gaps, predicted)
    # 0 times infinity, of a probability that is 0, counts as 0.
    terms = jnp.where(weights == 0, 0, weights * scaled).sum(axis=1)
    entropy = (jnp.log1p(others) + terms / (1 + others)) / math.log(max(2, gaps.shape[1]))
    second = jnp.where(predicted, 0, weights).max(axis=1)
    found = {
        "confidence": others / (1 + others),
        "raw_confidence": others_raw / (1 + others_raw),
        "entropy": entropy,
        "margin": (others + second) / (1 + others),
    }
    # An entropy may round to more than 1; and no confidence is 1, see BELOW_ONE.
    return jnp.clip(jnp.stack([found[name] for name in PLAIN_POLICIES], axis=1), 1 - BELOW_ONE, 1)


def _sum_others(weights: jax.Array, gaps: jax.Array, predicted: jax.Array) -> jax.Array:
    """Sums the weights of the classes but the predicted one [B], NaN where its gap is no number."""
    return jnp.where(predicted, gaps - gaps, weights).sum(axis=1)
