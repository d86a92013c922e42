"""Exit confidences by the plain policies: in the program of a stage, or for few rows in Python.

Of the policies that read one exit alone (PLAIN_POLICIES). They are complements, 1 minus the
confidence: float32 resolves them where the confidence is near 1, which thresholds often are,
and the confidence itself it would round to 1 at a logit gap of 17.

Shape letters: B batch, C classes, K plain policies.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sweet_jax.exits.calibration import BELOW_ONE
from sweet_jax.inference.engine import PLAIN_POLICIES


def plain_complements(logits: Any, temperatures: Any) -> Any:
    """Computes 1 minus the confidence by each plain policy, above 0, float32 [B, K].

    The formulas are those of `exits/confidences.py`, written with d = (max z - z) / T, so that
    nothing cancels as the confidence approaches 1. NaN where a logit or the temperature is.

    Args:
      logits: float32 [B, C], of NumPy or JAX.
      temperatures: float32 [B].

    """
    xp = logits.__array_namespace__()
    gaps = logits.max(axis=1, keepdims=True) - logits  # [B, C], 0 at the prediction
    predicted = xp.arange(gaps.shape[1])[None] == gaps.argmin(axis=1)[:, None]  # [B, C]
    scaled = gaps / temperatures[:, None]
    weights = xp.exp(-scaled)  # [B, C], relative to the prediction's
    others = _sum_others(weights, scaled, predicted)  # [B]
    others_raw = _sum_others(xp.exp(-gaps), gaps, predicted)
    # 0 times infinity, of a probability that is 0, counts as 0.
    terms = xp.where(weights == 0, 0, weights * scaled).sum(axis=1)
    entropy = (xp.log1p(others) + terms / (1 + others)) / math.log(max(2, gaps.shape[1]))
    second = xp.where(predicted, 0, weights).max(axis=1)
    found = {
        "confidence": others / (1 + others),
        "raw_confidence": others_raw / (1 + others_raw),
        "entropy": entropy,
        "margin": (others + second) / (1 + others),
    }
    # An entropy may round to more than 1; and no confidence is 1, see BELOW_ONE.
    return xp.clip(xp.stack([found[name] for name in PLAIN_POLICIES], axis=1), 1 - BELOW_ONE, 1)


def _sum_others(weights: Any, gaps: Any, predicted: Any) -> Any:
    """Sums the weights of the classes but the predicted one [B], NaN where its gap is no number."""
    where = weights.__array_namespace__().where
    return where(predicted, gaps - gaps, weights).sum(axis=1)


def plain_complement(policy: str, logits: Sequence[float], temperature: float) -> float:
    """Computes 1 minus the confidence of one row, as `plain_complements` does, in float64.

    In Python's floats: for the few classes that most models have, a call of NumPy takes as long as
    all of this, and after a layer has emptied the cache several times as long.

    Args:
      policy: one of PLAIN_POLICIES.
      logits: [C].
      temperature: of the exit.

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
        found = (others + max(weights, default=0.0)) / (1 + others)
    elif policy == "entropy":
        terms = sum(weight * gap for weight, gap in zip(weights, gaps, strict=True) if weight)
        found = (math.log1p(others) + terms / (1 + others)) / math.log(max(2, len(logits)))
    else:
        found = others / (1 + others)
    return min(max(found, 1 - BELOW_ONE), 1.0)


def _complement_by_numpy(policy: str, logits: Sequence[float], temperature: float) -> float:
    """Computes what `plain_complement` returns where a logit is no number, or infinite."""
    values, fitted = np.asarray([logits], np.float64), np.asarray([temperature])
    with np.errstate(all="ignore"):
        return float(plain_complements(values, fitted)[0, PLAIN_POLICIES.index(policy)])
