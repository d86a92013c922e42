"""Objectives: predictions and probabilities from logits, losses that leave padding out."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from sweet_jax.objectives import OBJECTIVES

LOGITS = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32) * 40  # [E, B, C]
LABELS = np.array([0, 2, 1, 1, 0])


@pytest.mark.parametrize("module", [np, jnp])
def test_single_label_predicts_and_gives_probabilities_of_either_kind_of_array(module):
    objective = OBJECTIVES["single_label"]
    logits = module.asarray(LOGITS)
    found = objective.probabilities(logits)
    assert isinstance(found, type(logits))
    np.testing.assert_allclose(found, softmax(LOGITS, axis=-1), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(objective.predict(logits), LOGITS.argmax(axis=-1))


def test_the_loss_is_the_mean_over_rows_that_are_no_padding():
    objective = OBJECTIVES["single_label"]
    logits, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    rows = -log_softmax(LOGITS.astype(np.float64), axis=-1)[:, np.arange(5), LABELS]  # [E, B]
    np.testing.assert_allclose(objective.row_loss(logits, labels), rows, rtol=1e-5, atol=1e-5)
    mask = np.array([True, False, True, True, False])
    found = objective.mean_loss(logits, labels, jnp.asarray(mask))
    np.testing.assert_allclose(found, rows[:, mask].mean(axis=-1), rtol=1e-5)
    right = LOGITS.argmax(axis=-1) == LABELS
    np.testing.assert_array_equal(objective.is_correct(logits, labels), right)
