"""Exit policies: a policy is a score, a dial is a threshold.

Shape letters: R replica, E exit, N examples, C classes.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax

from sweet_jax.config import UserError, check_choice
from sweet_jax.exits.outputs import ExitOutputs

# A policy maps outputs and temperatures [R, E] to scores float64 [R, E, N]; higher means "answer
# here". An example leaves at the first exit whose score reaches the threshold.
Policy = Callable[[ExitOutputs, np.ndarray], np.ndarray]

_BELOW_ONE = np.nextafter(1.0, 0.0)


def probabilities(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """Softmax of logits / temperature, float64 [R, E, N, C]."""
    scaled = outputs.logits.astype(np.float64) / temperatures[..., None, None]
    return np.exp(log_softmax(scaled, axis=-1))


def confidence(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """Largest probability, below 1: a threshold of 1 sends every example to the last exit.

    So the SWEET paper has it (section 5.1). Rounded to 1, a sure example would leave all the same.
    """
    return np.minimum(probabilities(outputs, temperatures).max(axis=-1), _BELOW_ONE)


def confidence_float32(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """Largest probability in float32, as the release computes it: 1.0 at a logit gap of about 17,
    so that sure examples leave early at a threshold of 1 too.
    """
    scaled = outputs.logits / temperatures[..., None, None].astype(np.float32)
    exponent = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    largest = 1 / exponent.sum(axis=-1)
    return largest.astype(np.float32).astype(np.float64)


def learning_to_exit(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """What each exit's learning-to-exit head says, below 1; temperatures play no part.

    As with confidence, a threshold of 1 sends every example to the last exit. Raises UserError
    where the outputs have no such scores.
    """
    return np.minimum(_learned(outputs), _BELOW_ONE)


def learning_to_exit_min_max(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """The same, min-max normalised for each exit over the rows at hand, as the release does.

    NaN (never answers early) where an exit gives all rows one score. Raises UserError likewise.
    """
    scores = _learned(outputs)
    low, high = scores.min(axis=-1, keepdims=True), scores.max(axis=-1, keepdims=True)
    span = np.where(high > low, high - low, np.nan)
    return (scores - low) / span


def _learned(outputs: ExitOutputs) -> np.ndarray:
    if outputs.exit_scores is None:
        raise UserError(
            "these outputs hold no learning-to-exit scores: train with "
            "--config.learning_to_exit=joint, or choose the policy 'confidence'"
        )
    return outputs.exit_scores.astype(np.float64)


POLICIES: dict[str, Policy] = {
    "confidence": confidence,
    "confidence_float32": confidence_float32,
    "learning_to_exit": learning_to_exit,
    "learning_to_exit_min_max": learning_to_exit_min_max,
}


def grid_thresholds(policy: str, classes: int) -> np.ndarray:
    """The paper's 11 thresholds, float64 [11]: evenly spaced over the range of the policy's scores.

    That is (1/C, 1) for a largest probability (section 5.1), (0, 1) for learning-to-exit.
    """
    low = 0.0 if policy.startswith("learning_to_exit") else 1 / classes
    return np.linspace(low, 1, 11)


def exit_scores(
    outputs: ExitOutputs, policy: str | Policy, temperatures: np.ndarray | None = None
) -> np.ndarray:
    """Scores [R, E, N] of a policy by name, or of the user's own function.

    temperatures: float [R, E], default 1. A score that is not a number counts as -inf: what
    diverged never answers before the last exit. Raises UserError for an unknown name.
    """
    if temperatures is None:
        temperatures = np.ones(outputs.logits.shape[:2])
    if isinstance(policy, str):
        check_choice("policy", policy, POLICIES)
        policy = POLICIES[policy]
    scores = np.asarray(policy(outputs, temperatures), np.float64)
    if scores.shape != outputs.logits.shape[:3]:
        raise ValueError(f"a policy must return [R, E, N]; got {scores.shape}")
    return np.where(np.isnan(scores), -np.inf, scores)
