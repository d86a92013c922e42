"""Applies exit policies: the confidences of outputs, for evaluation and serving alike.

An example leaves at the first exit whose confidence reaches the threshold; the last exit takes the
rest. `confidences` has the policies.

Shape letters: R replica, E exit, E' exits so far, N examples, C outputs of an exit (classes).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sweet_jax.config import UserError, check_choice
from sweet_jax.exits.calibration import Calibrator, categorical_variables
from sweet_jax.exits.confidences import POLICIES, PolicyInput
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.objectives import SINGLE_LABEL, Objective

# A user's own policy: from outputs and temperatures [R, E'] to exit confidences [R, E', N].
PolicyFunction = Callable[..., np.ndarray]


class UnlabeledOutputs(NamedTuple):
    """Holds the outputs that a user's own policy reads of texts, under ExitOutputs' names.

    Attributes:
      logits: float32 [R, E', N, C].
      layers: int64 [E'], layer numbers.
      exit_scores: float32 [R, E', N] or None, learning-to-exit scores.
      objective: what the logits mean.

    """

    logits: np.ndarray
    layers: np.ndarray
    exit_scores: np.ndarray | None = None
    objective: Objective = SINGLE_LABEL

    @property
    def predictions(self) -> np.ndarray:
        """Returns the objective's predictions of each exit: of classes int64 [R, E', N]."""
        return self.objective.predict(self.logits)


def grid_thresholds(policy: str, outcomes: int, exits: int) -> np.ndarray:
    """Returns 11 thresholds evenly spaced over the range of a policy's confidences, float64 [11].

    That is (1/K, 1) for a largest probability of K outcomes (classes), as in the SWEET paper's
    experimental setup, (0, 1) for most others; patience counts, and has one for each exit.
    """
    rule = POLICIES[policy]
    if policy == "patience":
        return np.arange(1.0, exits + 1)
    low = 1 / outcomes if rule.low is None else rule.low
    return np.linspace(low, exits if rule.by_exits else 1.0, 11)


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
      UserError: an unknown name, or a policy that reads curves, learned scores or probabilities
        where there are none.
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
        check_choice("policy", policy, POLICIES)
        rule, objective = POLICIES[policy], outputs.objective
        if rule.needs_probabilities:
            categorical_variables(objective)
        if not rule.suits(objective):
            raise UserError(
                f"the policy {policy!r} is not for the objective {objective.name!r}: choose "
                f"{', '.join(name for name, other in POLICIES.items() if other.suits(objective))}"
            )
        if rule.curve and any(rule.curve not in c.curves for c in calibrators):
            raise UserError(f"the policy {policy!r} needs calibration rows: give them too")
        learned = [None] * replicas if outputs.exit_scores is None else outputs.exit_scores
        each = zip(outputs.logits, learned, calibrators, strict=True)
        found = np.stack([rule.confidences(PolicyInput(*one, objective)) for one in each])
    if found.shape != outputs.logits.shape[:3]:
        raise ValueError(f"a policy must return [R, E, N]; got {found.shape}")
    return np.where(np.isnan(found), -np.inf, found)
