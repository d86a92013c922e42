"""Temperatures compared with a fine search, reliability with its definition, and intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax

from sweet_jax import ExitOutputs
from sweet_jax.exits.calibration import TEMPERATURE_RANGE, fit_calibrators, fit_temperature
from sweet_jax.exits.metrics import (
    bootstrap_interval,
    compute_metric,
    mean_interval,
    wilson_interval,
)
from sweet_jax.exits.reliability import expected_calibration_error, reliability_diagram


def nll(logits, labels, temperature):
    rows = np.arange(len(labels))
    return -log_softmax(logits / temperature, axis=-1)[rows, labels].mean()


@settings(deadline=None, max_examples=100)
@given(
    arrays(np.float64, (12, 3), elements=st.floats(-8, 8, width=32)),
    arrays(np.int64, (12,), elements=st.integers(0, 2)),
)
def test_fitted_temperature_minimizes_the_loss(logits, labels):
    best = fit_temperature(logits, labels)
    assert TEMPERATURE_RANGE[0] <= best <= TEMPERATURE_RANGE[1]
    for temperature in np.geomspace(*TEMPERATURE_RANGE, 200):
        assert nll(logits, labels, best) <= nll(logits, labels, temperature) + 1e-9


def test_fitted_temperature_recovers_the_true_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200_000, 3)) * 2
    noise = rng.gumbel(size=logits.shape)
    labels = (logits / 2.5 + noise).argmax(axis=-1)
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.02)


def test_fitted_temperature_stays_in_its_range_or_is_nan():
    logits = np.asarray([[2.0, 0.0], [0.0, 1.0]])
    small_logits = np.asarray([[0.02, 0.0], [0.0, 0.01], [1e-6, 0.0]])
    assert fit_temperature(small_logits, np.asarray([0, 1, 1])) == TEMPERATURE_RANGE[0]
    assert fit_temperature(logits, np.asarray([1, 0])) == TEMPERATURE_RANGE[1]
    assert fit_temperature(np.zeros((2, 2)), np.asarray([1, 0])) == TEMPERATURE_RANGE[1]
    assert np.isnan(fit_temperature(np.full((2, 2), np.nan), np.asarray([1, 0])))


def test_temperature_is_1_when_every_prediction_is_right():
    logits = np.asarray([[2.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, np.asarray([0, 1])) == 1
    assert fit_temperature(np.asarray([[2.0, 0.0], [1.0, 1.0]]), np.asarray([0, 1])) != 1  # a tie


def test_temperatures_are_fitted_for_each_replica_and_exit():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 3, 40, 2)), rng.integers(0, 2, (2, 40))
    calibrators = fit_calibrators(ExitOutputs(logits, labels, [1, 2, 3]))
    fitted = np.stack([calibrator.temperatures for calibrator in calibrators])
    assert fitted.shape == (2, 3)
    expected = fit_temperature(logits[1, 2].astype(np.float32), labels[1])
    assert fitted[1, 2] == pytest.approx(expected, rel=1e-9)


def test_reliability_diagram_and_error_equal_hand_computation():
    confidence = np.asarray([0.05, 0.55, 0.59, 1.0])
    correct = np.asarray([True, False, True, True])
    mean, share, count = reliability_diagram(confidence, correct)
    assert count.tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    np.testing.assert_allclose(mean[[0, 5, 9]], [0.05, 0.57, 1.0])
    np.testing.assert_allclose(share[[0, 5, 9]], [1, 0.5, 1])
    expected = (0.95 + 2 * 0.07 + 0) / 4
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected)


def test_wilson_interval_equals_textbook_values():
    np.testing.assert_allclose(wilson_interval(8, 10), [0.4902, 0.9433], atol=1e-4)
    np.testing.assert_allclose(wilson_interval(10, 10), [0.7225, 1.0], atol=1e-4)


def test_bootstrap_interval_agrees_with_wilson_on_accuracy():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 2000)
    predictions = np.where(rng.random(2000) < 0.8, labels, 0)
    correct = (predictions == labels).sum()
    interval = bootstrap_interval("accuracy", predictions, labels, 3)
    np.testing.assert_allclose(interval, wilson_interval(correct, 2000), atol=3e-3)


def test_mean_interval_over_seeds_is_student_t():
    mean, half = mean_interval(np.asarray([1.0, 2.0, 3.0]))
    assert mean == 2
    assert half == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    assert mean_interval(np.asarray([1.0]))[1] is None


def test_metrics_are_defined_for_constant_predictions():
    labels = np.asarray([0, 1, 1])
    assert compute_metric("matthews", np.asarray([1, 1, 1]), labels, 2) == 0
    assert compute_metric("f1", np.asarray([0, 0, 0]), labels, 2) == 0
    assert compute_metric("accuracy", np.asarray([1, 1, 1]), labels, 2) == pytest.approx(2 / 3)
