"""Applies exit policies: the confidences of outputs, for evaluation and serving alike.

An example leaves at the first exit whose confidence reaches the threshold; the last exit takes the
rest. `confidences` has the named policies; a policy of the user's own is a function, or the name
"module:function" of one, by which it is saved.

Shape letters: R replica, E exit, E' exits so far, N examples, C outputs of an exit (classes).
"""

import functools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.config import UserError, check_choice
from sweet_jax.exits.calibration import Calibrator, categorical_variables
from sweet_jax.exits.certificates import LARGEST
from sweet_jax.exits.confidences import POLICIES, Policy, PolicyInput
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.files import one_line
from sweet_jax.objectives import SINGLE_LABEL, Objective

# A user's own policy: from outputs and temperatures [R, E'] to exit confidences [R, E', N].
PolicyFunction = Callable[..., np.ndarray]


class UnlabeledOutputs(NamedTuple):
    """Holds the outputs that a user's own policy reads, under ExitOutputs' names, without labels.

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


def policy_name(policy: str | PolicyFunction) -> str:
    """Returns a policy's name; of a function "module:function"."""
    if isinstance(policy, str):
        return policy
    return f"{policy.__module__}:{getattr(policy, '__qualname__', type(policy).__qualname__)}"


def policy_reference(function: PolicyFunction) -> str:
    """Returns the name that a function is saved by. Raises UserError where it does not lead back.

    As of a function within a function, or of a notebook.
    """
    name = policy_name(function)
    if function.__module__ == "__main__" or load_policy(name) is not function:
        raise UserError(
            f"the policy {name!r} cannot be saved by its name: define it as a function at the top "
            'of a module, or give "module:name" as text'
        )
    return name


def load_policy(name: str) -> PolicyFunction:
    """Imports the function "module:function"; modules of the working directory are found too.

    Raises UserError where there is none.
    """
    module, _, place = name.partition(":")
    if "" not in sys.path:  # not there in an installed command
        sys.path.append("")
    try:
        found: Any = functools.reduce(getattr, place.split("."), import_module(module))
        if not callable(found):
            raise TypeError(f"{place} is no function")
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(
            f"policy {name!r}: {type(error).__name__}: {one_line(error)}; give module:function, "
            "importable from here"
        ) from error
    return found


def policy_rule(policy: str | PolicyFunction) -> Policy:
    """Returns what is known of a policy; a user's own may have any confidence, and reads no curve.

    Raises UserError for an unknown name.
    """
    if isinstance(policy, str) and ":" not in policy:
        check_choice("policy", policy, POLICIES)
        return POLICIES[policy]
    if isinstance(policy, str):
        load_policy(policy)
    about = f"a policy of your own, {policy_name(policy)}"
    return Policy(_read_outputs, about, needs_probabilities=False)


def _read_outputs(given: PolicyInput) -> np.ndarray:
    """Stands for a user's own function, which reads whole outputs: see `exit_confidences`."""
    raise TypeError("a policy of the user's own is a function of outputs and temperatures")


def grid_thresholds(policy: str | PolicyFunction, outcomes: int, exits: int) -> np.ndarray:
    """Returns 11 thresholds evenly spaced over the range of a policy's confidences, float64 [11].

    That is (1/K, 1) for a largest probability of K outcomes (classes), as in the SWEET paper's
    experimental setup, (0, 1) for most others; patience counts, and has one for each exit.
    """
    rule = policy_rule(policy)
    if rule.by_exits and rule.low == 1:
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
    last. One of +inf becomes the largest that a finite threshold is reached by, `LARGEST`: it is
    tested by certificates as others are, and at an infinite threshold all reach the last exit.

    Args:
      outputs: of any rows.
      policy: a name in POLICIES, or the user's own function or its name "module:function".
      calibrators: of the replicas [R]; without, temperatures are 1.

    Raises:
      UserError: an unknown name, or a policy that reads curves, learned scores or probabilities
        where there are none.
      ValueError: calibrators of other replicas or exits, or (a UserError) a function that returns
        another shape.

    """
    replicas, exits = outputs.logits.shape[:2]
    if calibrators is None:
        calibrators = [Calibrator.unfitted(exits)] * replicas
    if [c.temperatures.shape for c in calibrators] != [(exits,)] * replicas:
        raise ValueError(
            f"outputs of {replicas} replicas with {exits} exits need calibrators of as many "
            f"replicas and exits; got {[c.temperatures.shape for c in calibrators]}"
        )
    if not isinstance(policy, str) or ":" in policy:
        temperatures = np.stack([c.temperatures for c in calibrators])  # [R, E]
        found = _call_function(policy, outputs, temperatures)
    else:
        rule, objective = policy_rule(policy), outputs.objective
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
        raise UserError(
            f"the policy {policy_name(policy)!r} must return confidences [R, E, N] = "
            f"{outputs.logits.shape[:3]}; got {found.shape}"
        )
    return np.minimum(np.where(np.isnan(found), -np.inf, found), LARGEST)


def _call_function(
    policy: str | PolicyFunction,
    outputs: ExitOutputs | UnlabeledOutputs,
    temperatures: np.ndarray,
) -> np.ndarray:
    """Returns what a user's own policy does, float64; it reads the same of saved outputs and texts.

    Raises UserError where it fails, as by writing into the outputs, which others read after it.
    """
    function = load_policy(policy) if isinstance(policy, str) else policy
    scores = outputs.exit_scores
    given = UnlabeledOutputs(
        _read_only(outputs.logits),
        _read_only(outputs.layers),
        None if scores is None else _read_only(scores),
        outputs.objective,
    )
    try:
        return np.asarray(function(given, temperatures), np.float64)
    except Exception as error:  # whatever the function does
        raise UserError(
            f"the policy {policy_name(policy)!r} failed ({type(error).__name__}: "
            f"{one_line(error)}): mend it; it reads outputs and temperatures, and returns an array"
        ) from error


def _read_only(values: np.ndarray) -> np.ndarray:
    """Returns a view that cannot be written to."""
    view = values.view()
    view.flags.writeable = False
    return view
