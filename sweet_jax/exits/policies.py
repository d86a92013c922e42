"""Exit policies: a policy is a score, a dial is a threshold.

Shape letters: R replica, E exit, N examples, C classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax

from sweet_jax.config import UserError, check_choice
from sweet_jax.exits.calibration import BELOW_ONE, confidence, probabilities
from sweet_jax.exits.calibrator import Calibrator, fit_calibrator
from sweet_jax.exits.outputs import ExitOutputs

# A policy maps outputs and temperatures [R, E] to scores float64 [R, E, N]; higher means "answer
# here". An example leaves at the first exit whose score reaches the threshold.
PolicyFunction = Callable[[ExitOutputs, np.ndarray], np.ndarray]


def cross_fitted_confidences(
    calibration: ExitOutputs, policy: str | PolicyFunction, folds: int = 5
) -> np.ndarray:
    """Scores [R, E, N] of calibration rows, each by what the rows of the other folds say.

    A threshold chosen on scores that were read off the same rows' own curve would promise too much.
    The folds are drawn by a fixed seed; a single row is left to its own fit.
    """
    count = calibration.labels.shape[1]
    kinds: list[str] = []
    if isinstance(policy, str):
        check_choice("policy", policy, POLICIES)
        kinds = [POLICIES[policy].curve] if POLICIES[policy].curve else []
    part = np.random.default_rng(0).permutation(count) % folds  # [N]
    scores = np.empty(calibration.logits.shape[:3])
    for fold in np.unique(part):
        own = np.flatnonzero(part == fold)
        others = np.flatnonzero(part != fold)
        fitted = fit_calibrator(calibration.rows(others if len(others) else own), kinds)
        scores[..., own] = exit_confidences(calibration.rows(own), policy, fitted)
    return scores


def raw_confidence(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """The same of the logits as they are, whatever the temperatures."""
    return confidence(outputs, np.ones_like(temperatures))


def confidence_float32(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """Largest probability in float32, as the release computes it: 1.0 at a logit gap of about 17,
    so that sure examples leave early at a threshold of 1 too.
    """
    scaled = outputs.logits / temperatures[..., None, None].astype(np.float32)
    exponent = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    largest = 1 / exponent.sum(axis=-1)
    return largest.astype(np.float32).astype(np.float64)


def entropy(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """1 - entropy / log C, below 1: 0 where all classes are equally likely (BranchyNet's rule,
    Teerapittayanon et al. 2016, turned round so that higher means sure).
    """
    scaled = outputs.logits.astype(np.float64) / temperatures[..., None, None]
    logs = log_softmax(scaled, axis=-1)  # [R, E, N, C]
    with np.errstate(invalid="ignore"):  # 0 times -inf, of a probability that is 0
        terms = np.where(np.isneginf(logs), 0, np.exp(logs) * logs)
    share = terms.sum(axis=-1) / np.log(max(2, logs.shape[-1]))
    return np.clip(1 + share, 0, BELOW_ONE)


def margin(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """Largest probability less the second largest, below 1."""
    ordered = np.sort(probabilities(outputs, temperatures), axis=-1)  # [R, E, N, C]
    second = ordered[..., -2] if ordered.shape[-1] > 1 else 0.0
    return np.minimum(ordered[..., -1] - second, BELOW_ONE)


def patience(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """How many exits in a row, this one the last, give this exit's class: 1 to E (PABEE, Zhou et
    al. 2020, arXiv 2006.04152, whose patience p is a threshold of p + 1).
    """
    given, sound = outputs.predictions, np.isfinite(outputs.logits).all(axis=-1)  # [R, E, N]
    score = np.ones(given.shape)
    for e in range(1, given.shape[1]):
        # What diverged agrees with nobody: its answer is the first class whatever the text.
        agrees = (given[:, e] == given[:, e - 1]) & sound[:, e - 1]
        score[:, e] += np.where(agrees, score[:, e - 1], 0)
    return np.where(sound, score, np.nan)


def voting(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """Confidences of the exits so far that give this exit's class, summed: confidence and patience
    in one number, up to E.
    """
    given, sure = outputs.predictions, confidence(outputs, temperatures)
    agree = given[:, :, None] == given[:, None]  # [R, E, earlier E, N]
    earlier = np.tri(given.shape[1], dtype=bool)[..., None]
    votes = np.where(agree & earlier, np.nan_to_num(sure)[:, None], 0).sum(axis=2)
    return np.where(np.isnan(sure), np.nan, votes)


def learning_to_exit(outputs: ExitOutputs, temperatures: np.ndarray) -> np.ndarray:
    """What each exit's learning-to-exit head says, below 1; temperatures play no part.

    As with confidence, a threshold of 1 sends every example to the last exit. Raises UserError
    where the outputs have no such scores.
    """
    return np.minimum(_learned(outputs), BELOW_ONE)


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


class Policy(NamedTuple):
    """A policy that has a name."""

    score: PolicyFunction
    about: str
    curve: str = ""  # the kind of reliability curve that the score is read through, if any
    by_exits: bool = False
    low: float | None = 0.0  # its smallest score; None = 1 / C


# PCEE (Mofakhami et al. 2024, arXiv 2412.19325): the accuracy that calibration rows of the same
# confidence had at this exit, so that the threshold is an accuracy.
POLICIES: dict[str, Policy] = {
    "confidence": Policy(confidence, "largest probability, after temperature", low=None),
    "raw_confidence": Policy(raw_confidence, "largest probability, no temperature", low=None),
    "confidence_float32": Policy(
        confidence_float32, "largest probability in float32, as SWEET's release", low=None
    ),
    "entropy": Policy(entropy, "1 - entropy / log C, after temperature"),
    "margin": Policy(margin, "largest probability less the second, after temperature"),
    "patience": Policy(patience, "exits in a row that agree: 1, 2, ...", by_exits=True, low=1.0),
    "voting": Policy(voting, "summed confidence of the exits that agree", by_exits=True),
    "learning_to_exit": Policy(learning_to_exit, "what the learning-to-exit heads say"),
    "learning_to_exit_min_max": Policy(
        learning_to_exit_min_max, "the same over its range on these rows, as SWEET's release"
    ),
    "pcee": Policy(
        confidence, "accuracy of calibration rows in bins of equal width", "equal_width"
    ),
    "pcee_equal_mass": Policy(
        confidence, "accuracy of calibration rows in bins of equal counts", "equal_mass"
    ),
    "pcee_isotonic": Policy(
        confidence, "accuracy of calibration rows, rising with confidence", "isotonic"
    ),
    "pcee_ws": Policy(confidence, "accuracy of calibration rows, smoothed (PCEE-WS)", "kernel"),
}


def grid_thresholds(policy: str, classes: int, exits: int, points: int = 11) -> np.ndarray:
    """Thresholds evenly spaced over the range of the policy's scores, float64 [points].

    That is (1/C, 1) for a largest probability, the 11 of the SWEET paper's experimental setup,
    (0, 1) for most others; patience counts, and has one for each exit.
    """
    rule = POLICIES[policy]
    if policy == "patience":
        return np.arange(1.0, exits + 1)
    low = 1 / classes if rule.low is None else rule.low
    return np.linspace(low, exits if rule.by_exits else 1.0, points)


def exit_confidences(
    outputs: ExitOutputs, policy: str | PolicyFunction, fitted: Calibrator | None = None
) -> np.ndarray:
    """Scores [R, E, N] of a policy by name, or of the user's own function.

    Without `fitted`, temperatures are 1. A score that is not a number counts as -inf: what diverged
    never answers before the last exit. Raises UserError for an unknown name, or a policy that
    reads curves where none are fitted.
    """
    if fitted is None:
        fitted = Calibrator(np.ones(outputs.logits.shape[:2]))
    if fitted.temperatures.shape != outputs.logits.shape[:2]:
        raise ValueError(
            f"outputs of {outputs.logits.shape[:2]} replicas and exits need what was fitted on as "
            f"many; got {fitted.temperatures.shape}"
        )
    curves = None
    if isinstance(policy, str):
        check_choice("policy", policy, POLICIES)
        rule = POLICIES[policy]
        if rule.curve:
            curves = fitted.curves.get(rule.curve)
            if curves is None:
                raise UserError(f"the policy {policy!r} needs calibration rows: give them too")
        policy = rule.score
    scores = np.asarray(policy(outputs, fitted.temperatures), np.float64)
    if scores.shape != outputs.logits.shape[:3]:
        raise ValueError(f"a policy must return [R, E, N]; got {scores.shape}")
    if curves is not None:
        pairs = zip(curves, scores, strict=True)
        scores = np.stack([[c(s) for c, s in zip(*pair, strict=True)] for pair in pairs])
    return np.where(np.isnan(scores), -np.inf, scores)
