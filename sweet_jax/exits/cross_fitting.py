"""Confidences of the calibration rows themselves, cross-fitted where needed.

Shape letters: R replica, E exit, N examples.
"""

from collections.abc import Sequence

import numpy as np

from sweet_jax.exits.calibration import Calibrator, fit_calibrators
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import PolicyFunction, exit_confidences, policy_rule


def calibration_confidences(
    calibration: ExitOutputs, policy: str | PolicyFunction, calibrators: Sequence[Calibrator]
) -> np.ndarray:
    """Computes confidences [R, E, N] of calibration rows, cross-fitted if curves are read."""
    if policy_rule(policy).curve:
        return cross_fitted_confidences(calibration, policy)
    return exit_confidences(calibration, policy, calibrators)


def cross_fitted_confidences(calibration: ExitOutputs, policy: str | PolicyFunction) -> np.ndarray:
    """Computes confidences of calibration rows with calibrators fitted on the other four folds.

    Thresholds chosen on confidences from a curve that was fitted on the same rows would be too
    optimistic. The folds are drawn with a fixed seed; a single row is fitted on itself.

    Returns float64 [R, E, N]. Raises UserError for an unknown policy.
    """
    curve = policy_rule(policy).curve
    kinds = [curve] if curve else []
    folds = np.random.default_rng(0).permutation(calibration.labels.shape[1]) % 5  # [N]
    confidences = np.empty(calibration.logits.shape[:3])
    for fold in np.unique(folds):
        held = np.flatnonzero(folds == fold)
        others = np.flatnonzero(folds != fold)
        calibrators = fit_calibrators(calibration.rows(others if len(others) else held), kinds)
        confidences[..., held] = exit_confidences(calibration.rows(held), policy, calibrators)
    return confidences
