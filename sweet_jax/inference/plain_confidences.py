"""Confidences under the plain policies, computed in a stage's program, or in Python for few rows.

The plain policies are those that read only one exit (PLAIN_POLICIES). The functions compute
complements, 1 minus the confidence: near 1, where thresholds often are, float32 resolves the
complement, whereas it would round the confidence itself to 1 at a logit gap of 17.

Shape letters: B batch, C classes, K plain policies.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sweet_jax.exits.calibration import BELOW_ONE
from sweet_jax.inference.engine import PLAIN_POLICIES


def plain_complements(logits: Any, temperatures: Any) -> Any:
    """Computes 1 minus the confidence under each plain policy, above 0, float32 [B, K].

    The formulas are those of `exits/confidences.py`, written with d = (max z - z) / T, so that
    there is no cancellation as the confidence approaches 1. NaN if a logit or the temperature is
    NaN.

    Args:
      logits: NumPy or JAX array, float32 [B, C].
      temperatures: float32 [B].

    """
    xp = logits.__array_namespace__()
    gaps = logits.max(axis=1, keepdims=True) - logits  # [B, C], 0 at the prediction
    predicted = xp.arange(gaps.shape[1])[None] == gaps.argmin(axis=1)[:, None]  # [B, C]
    scaled = gaps / temperatures[:, None]
    weights = xp.exp(-scaled)  # [B, C], relative to the prediction's
    others = _sum_others(weights, scaled, predicted)  # [B]
    others_raw = _sum_others(xp.exp(-gaps), gaps, predicted)
    # Where a probability is 0, 0 times infinity counts as 0.
    terms = xp.where(weights == 0, 0, weights * scaled).sum(axis=1)
    entropy = (xp.log1p(others) + terms / (1 + others)) / math.log(max(2, gaps.shape[1]))
    second = xp.where(predicted, 0, weights).max(axis=1)
    values = {
        "confidence": others / (1 + others),
        "raw_confidence": others_raw / (1 + others_raw),
        "entropy": entropy,
        "margin": (others + second) / (1 + others),
    }
    # An entropy may round to more than 1, and a confidence must stay below 1, see BELOW_ONE.
    return xp.clip(xp.stack([values[name] for name in PLAIN_POLICIES], axis=1), 1 - BELOW_ONE, 1)


def _sum_others(weights: Any, gaps: Any, predicted: Any) -> Any:
    """Sums the weights of all classes but the predicted one [B]; NaN if its gap is NaN."""
    where = weights.__array_namespace__().where
    return where(predicted, gaps - gaps, weights).sum(axis=1)


def plain_complement(policy: str, logits: Sequence[float], temperature: float) -> float:
    """Computes 1 minus the confidence of one row, as `plain_complements` does, in float64.

    It uses Python floats: for the few classes that most models have, a single NumPy call takes as
    long as this whole function, and several times as long after a layer has evicted the cache.

    Args:
      policy: one of PLAIN_POLICIES.
      logits: logits [C] of the row.
      temperature: temperature of the exit.

    """
    if not math.isfinite(sum(logits)) or math.isnan(temperature):
        return _complement_by_numpy(policy, logits, temperature)
    largest = max(logits)
    scale = 1.0 if policy == "raw_confidence" else temperature
    gaps = [(largest - logit) / scale for logit in logits]  # [C], 0 at the prediction
    del gaps[logits.index(largest)]  # [C - 1]
    weights = [math.exp(-gap) for gap in gaps]
    others = sum(weights)
    if policy == "margin":
        complement = (others + max(weights, default=0.0)) / (1 + others)
    elif policy == "entropy":
        terms = sum(weight * gap for weight, gap in zip(weights, gaps, strict=True) if weight)
        complement = (math.log1p(others) + terms / (1 + others)) / math.log(max(2, len(logits)))
    else:
        complement = others / (1 + others)
    return min(max(complement, 1 - BELOW_ONE), 1.0)


def _complement_by_numpy(policy: str, logits: Sequence[float], temperature: float) -> float:
    """Computes `plain_complement` for NaN or infinite logits, or a NaN temperature."""
    values, fitted = np.asarray([logits], np.float64), np.asarray([temperature])
    with np.errstate(all="ignore"):
        return float(plain_complements(values, fitted)[0, PLAIN_POLICIES.index(policy)])
