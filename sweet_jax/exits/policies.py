"""Exit policies: pure functions from the logits of the exits so far to exit confidences.

An example leaves at the first exit whose confidence reaches the threshold; the last exit takes the
rest. Evaluation and serving call the same functions.

Shape letters: R replica, E exit, E' exits so far, N examples, C classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax

from sweet_jax.config import UserError, check_choice
from sweet_jax.exits.calibration import (
    BELOW_ONE,
    Calibrator,
    max_probability,
    probabilities,
)
from sweet_jax.exits.outputs import ExitOutputs

# From logits float32 [E', N, C], learned scores float32 [E', N] or None, and the calibrator of one
# replica to exit confidences float64 [E', N]: higher means "answer here", NaN never.
ConfidenceFunction = Callable[[np.ndarray, np.ndarray | None, Calibrator], np.ndarray]

# A user's own policy: from outputs and temperatures [R, E'] to exit confidences [R, E', N].
PolicyFunction = Callable[..., np.ndarray]


class UnlabeledOutputs(NamedTuple):
    """The outputs that a user's own policy reads when texts are served, under ExitOutputs' names.

    Attributes:
      logits: float32 [R, E', N, C].
      layers: int64 [E'], layer numbers.
      exit_scores: float32 [R, E', N] or None, learning-to-exit scores.

    """

    logits: np.ndarray
    layers: np.ndarray
    exit_scores: np.ndarray | None = None

    @property
    def predictions(self) -> np.ndarray:
        """Returns the predicted class of each exit, int64 [R, E', N]."""
        return self.logits.argmax(axis=-1)


def confidence(
    logits: np.ndarray, learned: np.ndarray | None, calibrator: Calibrator
) -> np.ndarray:
    """Computes the largest probability after temperature scaling, below 1, [E', N]."""
    return max_probability(logits, calibrator.temperatures)


def raw_confidence(
    logits: np.ndarray, learned: np.ndarray | None, calibrator: Calibrator
) -> np.ndarray:
    """Computes the largest probability without temperature scaling, below 1, [E', N]."""
    return max_probability(logits, np.ones(len(logits)))


def confidence_float32(
    logits: np.ndarray, learned: np.ndarray | None, calibrator: Calibrator
) -> np.ndarray:
    """Computes the largest probability in float32, as SWEET's release does, [E', N].

    It rounds to 1.0 at a logit gap of about 17, so that examples leave early at a threshold of 1
    too.
    """
    scaled = logits / calibrator.temperatures[:, None, None].astype(np.float32)
    exponent = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    largest = 1 / exponent.sum(axis=-1)
    return largest.astype(np.float32).astype(np.float64)


def entropy(logits: np.ndarray, learned: np.ndarray | None, calibrator: Calibrator) -> np.ndarray:
    """Computes 1 - entropy / log C, below 1, [E', N]: 0 where all classes are equally likely.

    BranchyNet's rule (Teerapittayanon et al. 2016), reversed so that higher means more certain.
    """
    scaled = logits.astype(np.float64) / calibrator.temperatures[:, None, None]
    logs = log_softmax(scaled, axis=-1)  # [E', N, C]
    with np.errstate(invalid="ignore"):  # 0 times -inf, of a probability that is 0
        terms = np.where(np.isneginf(logs), 0, np.exp(logs) * logs)
    share = terms.sum(axis=-1) / np.log(max(2, logs.shape[-1]))
    return np.clip(1 + share, 0, BELOW_ONE)


def margin(logits: np.ndarray, learned: np.ndarray | None, calibrator: Calibrator) -> np.ndarray:
    """Computes the largest probability minus the second largest, below 1, [E', N]."""
    ordered = np.sort(probabilities(logits, calibrator.temperatures), axis=-1)  # [E', N, C]
    second = ordered[..., -2] if ordered.shape[-1] > 1 else 0.0
    return np.minimum(ordered[..., -1] - second, BELOW_ONE)


def patience(logits: np.ndarray, learned: np.ndarray | None, calibrator: Calibrator) -> np.ndarray:
    """Counts the exits in a row, up to this one, that predict this exit's class, 1 to E', [E', N].

    PABEE (Zhou et al. 2020, arXiv 2006.04152): its patience p is a threshold of p + 1.
    """
    predicted, finite = logits.argmax(axis=-1), np.isfinite(logits).all(axis=-1)  # [E', N]
    found = np.ones(predicted.shape)
    for e in range(1, len(predicted)):
        # An exit that diverged agrees with none: it predicts the first class for every text.
        agrees = (predicted[e] == predicted[e - 1]) & finite[e - 1]
        found[e] += np.where(agrees, found[e - 1], 0)
    return np.where(finite, found, np.nan)


def voting(logits: np.ndarray, learned: np.ndarray | None, calibrator: Calibrator) -> np.ndarray:
    """Sums the confidences of the exits so far that predict this exit's class, up to E', [E', N].

    Confidence and patience in one number.
    """
    predicted = logits.argmax(axis=-1)  # [E', N]
    found = max_probability(logits, calibrator.temperatures)  # [E', N]
    agree = predicted[:, None] == predicted[None]  # [E', earlier E', N]
    earlier = np.tri(len(predicted), dtype=bool)[..., None]
    votes = np.where(agree & earlier, np.nan_to_num(found), 0).sum(axis=1)
    return np.where(np.isnan(found), np.nan, votes)


def learning_to_exit(
    logits: np.ndarray, learned: np.ndarray | None, calibrator: Calibrator
) -> np.ndarray:
    """Returns the score of each exit's learning-to-exit head, below 1, [E', N].

    Temperatures are not read. As with confidence, a threshold of 1 sends every example to the last
    exit. Raises UserError where there are no such scores.
    """
    return np.minimum(_learned_scores(learned), BELOW_ONE)


def learning_to_exit_min_max(
    logits: np.ndarray, learned: np.ndarray | None, calibrator: Calibrator
) -> np.ndarray:
    """Normalises learning-to-exit scores of each exit over the N rows, as SWEET's release does.

    NaN (never leaves early) where an exit has one score for all rows. Raises UserError where there
    are no scores.
    """
    scores = _learned_scores(learned)
    low, high = scores.min(axis=-1, keepdims=True), scores.max(axis=-1, keepdims=True)
    span = np.where(high > low, high - low, np.nan)
    return (scores - low) / span


def calibrated_accuracy(
    logits: np.ndarray, learned: np.ndarray | None, calibrator: Calibrator, *, kind: str
) -> np.ndarray:
    """Reads the accuracy that calibration rows of the same confidence had at this exit, [E', N].

    PCEE (Mofakhami et al. 2024, arXiv 2412.19325): the threshold is an accuracy. `kind` is that of
    the reliability curve.
    """
    found = max_probability(logits, calibrator.temperatures)
    pairs = zip(calibrator.curves[kind], found, strict=True)
    return np.stack([curve(row) for curve, row in pairs])


def _learned_scores(learned: np.ndarray | None) -> np.ndarray:
    if learned is None:
        raise UserError(
            "these outputs hold no learning-to-exit scores: train with "
            "--config.learning_to_exit=joint, or choose the policy 'confidence'"
        )
    return learned.astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Describes a named policy.

    Attributes:
      confidences: the function.
      about: one line of help.
      curve: kind of the reliability curve that it reads, if any; then the threshold is an accuracy.
      by_exits: whether its largest value is the number of exits rather than 1.
      low: its smallest value; None = 1 / C.
      needs_all_rows: whether the confidence of a row depends on the rows beside it, so that it can
        neither be served nor certified.

    """

    confidences: ConfidenceFunction
    about: str
    curve: str = ""
    by_exits: bool = False
    low: float | None = 0.0
    needs_all_rows: bool = False


def _pcee(kind: str, about: str) -> Policy:
    return Policy(partial(calibrated_accuracy, kind=kind), about, kind)


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
    "learning_to_exit": Policy(learning_to_exit, "score of the learning-to-exit heads"),
    "learning_to_exit_min_max": Policy(
        learning_to_exit_min_max,
        "that score over its range on these rows, as SWEET's release",
        needs_all_rows=True,
    ),
    "pcee": _pcee("equal_width", "accuracy of calibration rows in bins of equal width"),
    "pcee_equal_mass": _pcee("equal_mass", "accuracy of calibration rows in bins of equal counts"),
    "pcee_isotonic": _pcee("isotonic", "accuracy of calibration rows, rising with confidence"),
    "pcee_ws": _pcee("kernel", "accuracy of calibration rows, smoothed (PCEE-WS)"),
}


def grid_thresholds(policy: str, classes: int, exits: int, points: int = 11) -> np.ndarray:
    """Returns thresholds evenly spaced over the range of a policy's confidences, float64 [points].

    That is (1/C, 1) for a largest probability, the 11 of the SWEET paper's experimental setup,
    (0, 1) for most others; patience counts, and has one for each exit.
    """
    rule = POLICIES[policy]
    if policy == "patience":
        return np.arange(1.0, exits + 1)
    low = 1 / classes if rule.low is None else rule.low
    return np.linspace(low, exits if rule.by_exits else 1.0, points)


def exit_confidences(
    outputs: ExitOutputs | UnlabeledOutputs,
    policy: str | PolicyFunction,
    calibrators: Sequence[Calibrator] | None = None,
) -> np.ndarray:
    """Computes the exit confidences of a policy, float64 [R, E, N].

    A confidence that is not a number becomes -inf: an exit that diverged never answers before the
    last.

    Args:
      outputs: of any rows.
      policy: a name in POLICIES, or the user's own function.
      calibrators: of the replicas [R]; without, temperatures are 1.

    Raises:
      UserError: an unknown name, a policy that reads curves where none are fitted, or one that
        reads learned scores where there are none.
      ValueError: calibrators of other replicas or exits, or a function that returns another shape.

    """
    replicas, exits = outputs.logits.shape[:2]
    if calibrators is None:
        calibrators = [Calibrator.unfitted(exits)] * replicas
    if [c.temperatures.shape for c in calibrators] != [(exits,)] * replicas:
        raise ValueError(
            f"outputs of {replicas} replicas with {exits} exits need calibrators of as many "
            f"replicas and exits; got {[c.temperatures.shape for c in calibrators]}"
        )
    if callable(policy):
        temperatures = np.stack([c.temperatures for c in calibrators])  # [R, E]
        found = np.asarray(policy(outputs, temperatures), np.float64)
    else:
        learned = [None] * replicas if outputs.exit_scores is None else outputs.exit_scores
        each = zip(outputs.logits, learned, calibrators, strict=True)
        found = np.stack([policy_confidences(policy, *replica) for replica in each])
    if found.shape != outputs.logits.shape[:3]:
        raise ValueError(f"a policy must return [R, E, N]; got {found.shape}")
    return np.where(np.isnan(found), -np.inf, found)


def policy_confidences(
    policy: str, logits: np.ndarray, learned: np.ndarray | None, calibrator: Calibrator
) -> np.ndarray:
    """Computes the exit confidences of a named policy for one replica, float64 [E', N].

    Args:
      policy: a name in POLICIES.
      logits: float32 [E', N, C].
      learned: float32 [E', N], learning-to-exit scores, or None.
      calibrator: of these exits.

    Raises UserError as `exit_confidences` does.

    """
    check_choice("policy", policy, POLICIES)
    rule = POLICIES[policy]
    if rule.curve and rule.curve not in calibrator.curves:
        raise UserError(f"the policy {policy!r} needs calibration rows: give them too")
    return rule.confidences(logits, learned, calibrator)
