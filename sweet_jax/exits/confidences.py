"""The named exit policies: functions that map the logits of the exits so far to confidences.

Shape letters: E' exits so far, N examples, C outputs of an exit (classes), V categorical variables
with K outcomes each (single-label classification has one variable with C outcomes).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.calibration import (
    BELOW_ONE,
    Calibrator,
    categorical_variables,
    max_probability,
    outcome_probabilities,
)
from sweet_jax.objectives import SINGLE_LABEL, Objective
from sweet_jax.objectives.objective import log_softmax
from sweet_jax.registry import Registry


class PolicyInput(NamedTuple):
    """Holds what a policy reads from one replica.

    Attributes:
      logits: logits of the exits so far, float32 [E', N, C].
      learned: learning-to-exit scores, float32 [E', N], or None.
      calibrator: calibrator of these exits.
      objective: objective that defines what the logits mean.

    """

    logits: np.ndarray
    learned: np.ndarray | None
    calibrator: Calibrator
    objective: Objective = SINGLE_LABEL


# Returns exit confidences float64 [E', N]: higher means "answer here", and NaN never leaves early.
ConfidenceFunction = Callable[[PolicyInput], np.ndarray]


def confidence(inputs: PolicyInput) -> np.ndarray:
    """Computes the largest probability after temperature scaling, below 1, [E', N]."""
    return max_probability(inputs.logits, inputs.calibrator.temperatures, inputs.objective)


def raw_confidence(inputs: PolicyInput) -> np.ndarray:
    """Computes the largest probability without temperature scaling, below 1, [E', N]."""
    return max_probability(inputs.logits, np.ones(len(inputs.logits)), inputs.objective)


def confidence_float32(inputs: PolicyInput) -> np.ndarray:
    """Computes the largest probability in float32, as SWEET's release does, [E', N].

    In float32 it rounds to 1.0 at a logit gap of about 17, so that examples may leave early even at
    a threshold of 1.
    """
    temperatures = inputs.calibrator.temperatures.astype(np.float32)
    probs = outcome_probabilities(inputs.logits, temperatures, inputs.objective)
    return probs.max(axis=-1).mean(axis=-1).astype(np.float64)


def entropy(inputs: PolicyInput) -> np.ndarray:
    """Computes 1 - entropy / log K, below 1, [E', N]; 0 if all outcomes are equally likely.

    It is averaged over the variables. This is BranchyNet's rule (Teerapittayanon et al. 2016),
    reversed so that higher means more certain.
    """
    scaled = inputs.logits.astype(np.float64) / inputs.calibrator.temperatures[:, None, None]
    logits = categorical_variables(inputs.objective).logits(scaled)
    with np.errstate(invalid="ignore"):  # infinite logits, and 0 times -inf where logs are -inf
        logs = log_softmax(logits)
        terms = np.where(np.isneginf(logs), 0, np.exp(logs) * logs)  # [E', N, V, K]
    share = terms.sum(axis=-1) / np.log(max(2, logs.shape[-1]))
    return np.clip(1 + share.mean(axis=-1), 0, BELOW_ONE)


def min_confidence(inputs: PolicyInput) -> np.ndarray:
    """Computes the largest probability of the least certain variable, below 1, [E', N].

    Temperature scaling is applied. With a single variable it equals `confidence`.
    """
    probs = outcome_probabilities(inputs.logits, inputs.calibrator.temperatures, inputs.objective)
    return np.minimum(probs.max(axis=-1).min(axis=-1), BELOW_ONE)


def stability(inputs: PolicyInput) -> np.ndarray:
    """Computes 1 / (1 + |change|), where the change is from the previous exit, below 1, [E', N].

    The change of the predicted number is in the targets' units: with a threshold t, a text leaves
    where two consecutive exits differ by at most 1 / t - 1. No text leaves at the first exit, which
    has no previous exit. This is PABEE's rule for regression (Zhou et al. 2020, section 3.3) with a
    patience of one.
    """
    values = inputs.objective.predict(inputs.logits).astype(np.float64)  # [E', N]
    change = np.abs(np.diff(values, axis=0))
    first = np.full_like(values[:1], np.nan)
    return np.concatenate([first, np.minimum(1 / (1 + change), BELOW_ONE)])


def margin(inputs: PolicyInput) -> np.ndarray:
    """Computes the difference of the two largest probabilities, below 1, [E', N].

    Temperature scaling is applied, and the difference is averaged over the variables.
    """
    probs = outcome_probabilities(inputs.logits, inputs.calibrator.temperatures, inputs.objective)
    ordered = np.sort(probs, axis=-1)  # [E', N, V, K]
    second = ordered[..., -2] if ordered.shape[-1] > 1 else 0.0
    return np.minimum((ordered[..., -1] - second).mean(axis=-1), BELOW_ONE)


def patience(inputs: PolicyInput) -> np.ndarray:
    """Counts the consecutive exits, up to this one, with the same prediction, 1 to E', [E', N].

    This is PABEE (Zhou et al. 2020, arXiv 2006.04152), whose patience p is a threshold of p + 1.
    """
    predicted, finite = inputs.objective.predict(inputs.logits), np.isfinite(inputs.logits).all(-1)
    counts = np.ones(finite.shape)  # [E', N]
    for e in range(1, len(predicted)):
        # An exit that diverged predicts the first class for every text: it agrees with none.
        agrees = inputs.objective.same(predicted[e], predicted[e - 1]) & finite[e - 1]
        counts[e] += np.where(agrees, counts[e - 1], 0)
    return np.where(finite, counts, np.nan)


def voting(inputs: PolicyInput) -> np.ndarray:
    """Sums the confidences of the exits so far that predict the same as this one, [E', N].

    The sum, at most E', combines confidence and patience in one number.
    """
    predicted = inputs.objective.predict(inputs.logits)  # [E', N, ...]
    agree = inputs.objective.same(predicted[:, None], predicted[None])  # [E', earlier E', N]
    earlier = np.tri(len(predicted), dtype=bool)[..., None]
    confidences = confidence(inputs)
    votes = np.where(agree & earlier, np.nan_to_num(confidences), 0).sum(axis=1)
    return np.where(np.isnan(confidences), np.nan, votes)


def learning_to_exit(inputs: PolicyInput) -> np.ndarray:
    """Returns the score of each exit's learning-to-exit head, below 1, [E', N].

    Temperatures are not used. As with `confidence`, a threshold of 1 sends every example to the
    last exit. Raises UserError if there are no such scores.
    """
    return np.minimum(_learned_scores(inputs), BELOW_ONE)


def learning_to_exit_min_max(inputs: PolicyInput) -> np.ndarray:
    """Normalizes the learning-to-exit scores of each exit over the N rows, as SWEET's release does.

    NaN, which never leaves early, if an exit has the same score for all rows. Raises UserError if
    there are no scores.
    """
    scores = _learned_scores(inputs)
    low, high = scores.min(axis=-1, keepdims=True), scores.max(axis=-1, keepdims=True)
    span = np.where(high > low, high - low, np.nan)
    return (scores - low) / span


def _learned_scores(inputs: PolicyInput) -> np.ndarray:
    if inputs.learned is None:
        raise UserError(
            "these outputs have no learning-to-exit scores: train with "
            "--config.learning_to_exit=joint, or choose the policy 'confidence'"
        )
    return inputs.learned.astype(np.float64)


def calibrated_accuracy(inputs: PolicyInput, *, kind: str) -> np.ndarray:
    """Returns the accuracy of calibration rows with the same confidence at this exit, [E', N].

    This is PCEE (Mofakhami et al. 2024, arXiv 2412.19325): the threshold is an accuracy. `kind` is
    the kind of reliability curve.
    """
    pairs = zip(inputs.calibrator.curves[kind], confidence(inputs), strict=True)
    return np.stack([curve(row) for curve, row in pairs])


@dataclasses.dataclass(frozen=True)
class Policy:
    """Describes a named policy.

    Attributes:
      confidences: function that computes the confidences.
      about: one line of help.
      curve: kind of the reliability curve that it reads, or "". If set, the threshold is an
        accuracy.
      by_exits: whether its largest value is the number of exits rather than `high`.
      low: smallest value; None stands for 1 / K.
      high: largest value; None if the range is unknown, also its lower end.
      needs_all_rows: whether the confidence of a row depends on the other rows, so that the policy
        can neither be served nor certified.
      for_one_row: name of the policy that a saved model has in place of one that needs all rows.
      needs_probabilities: whether it reads probabilities, which not every objective has.
      needs_agreement: whether it compares predictions for equality, which does not apply to
        regression.
      needs_numbers: whether it reads predictions as numbers, as only regression has.
      needs_exit_scores: whether it reads learning-to-exit scores, which few runs have.
      of_several: whether it differs from another policy only for multi-label classification.

    """

    confidences: ConfidenceFunction
    about: str
    curve: str = ""
    by_exits: bool = False
    low: float | None = 0.0
    high: float | None = 1.0
    needs_all_rows: bool = False
    for_one_row: str = ""
    needs_probabilities: bool = True
    needs_agreement: bool = False
    needs_numbers: bool = False
    needs_exit_scores: bool = False
    of_several: bool = False

    def suits(self, objective: Objective) -> bool:
        """Returns whether the policy can be computed from the outputs of an objective."""
        if self.needs_probabilities and objective.categorical is None:
            return False
        numbers = objective.agrees is None
        return not (self.needs_agreement and numbers) and (numbers or not self.needs_numbers)


def _pcee(kind: str, about: str) -> Policy:
    return Policy(partial(calibrated_accuracy, kind=kind), about, kind)


POLICIES = Registry(
    "policy",
    Policy,
    {
        "confidence": Policy(
            confidence, "largest probability, after temperature scaling", low=None
        ),
        "raw_confidence": Policy(raw_confidence, "largest probability, without scaling", low=None),
        "confidence_float32": Policy(
            confidence_float32, "largest probability in float32, as in SWEET's release", low=None
        ),
        "entropy": Policy(entropy, "1 - entropy / log C, after temperature scaling"),
        "margin": Policy(
            margin, "largest minus second largest probability, after temperature scaling"
        ),
        "patience": Policy(
            patience,
            "number of consecutive exits that agree: 1, 2, ...",
            by_exits=True,
            low=1.0,
            needs_probabilities=False,
            needs_agreement=True,
        ),
        "voting": Policy(voting, "summed confidence of the exits that agree", by_exits=True),
        "learning_to_exit": Policy(
            learning_to_exit,
            "score of the learning-to-exit head",
            needs_probabilities=False,
            needs_exit_scores=True,
        ),
        "learning_to_exit_min_max": Policy(
            learning_to_exit_min_max,
            "learning-to-exit score, min-max normalized over these rows, as in SWEET's release",
            needs_all_rows=True,
            for_one_row="learning_to_exit",
            needs_probabilities=False,
            needs_exit_scores=True,
        ),
        "pcee": _pcee("equal_width", "accuracy of calibration rows in bins of equal width"),
        "pcee_equal_mass": _pcee(
            "equal_mass", "accuracy of calibration rows in bins of equal counts"
        ),
        "pcee_isotonic": _pcee("isotonic", "accuracy of calibration rows, by isotonic regression"),
        "pcee_ws": _pcee("kernel", "accuracy of calibration rows, smoothed (PCEE-WS)"),
        "min_confidence": Policy(
            min_confidence,
            "confidence of the least certain label, after temperature scaling (multi_label)",
            low=None,
            of_several=True,
        ),
        "stability": Policy(
            stability,
            "1 / (1 + change from the previous exit) (regression)",
            needs_probabilities=False,
            needs_numbers=True,
        ),
    },
    "sweet_jax.policies",
)
