"""Applies exit policies: computes confidences from outputs, for both evaluation and serving.

An example leaves at the first exit whose confidence reaches the threshold; the last exit takes the
rest. `confidences` defines the named policies. A user-defined policy is a function, or the name
"module:OBJECT" of a function or Policy, by which it is saved.

Shape letters: R replica, E exit, E' exits so far, N examples, C outputs of an exit (classes).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.errors import UnknownNameError, UserError, one_line
from sweet_jax.exits.calibration import Calibrator, categorical_variables
from sweet_jax.exits.certificates import LARGEST
from sweet_jax.exits.confidences import POLICIES, Policy, PolicyInput
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.objectives import SINGLE_LABEL, Objective
from sweet_jax.registry import import_object

# A user-defined policy: function of (outputs, temperatures [R, E']) that returns exit confidences
# [R, E', N].
PolicyFunction = Callable[..., np.ndarray]


class UnlabeledOutputs(NamedTuple):
    """Holds the outputs that a user-defined policy reads, named as in ExitOutputs, without labels.

    Attributes:
      logits: logits of the exits so far, float32 [R, E', N, C].
      layers: layer numbers of the exits, int64 [E'].
      exit_scores: learning-to-exit scores, float32 [R, E', N], or None.
      objective: objective that defines what the logits mean.

    """

    logits: np.ndarray
    layers: np.ndarray
    exit_scores: np.ndarray | None = None
    objective: Objective = SINGLE_LABEL

    @property
    def predictions(self) -> np.ndarray:
        """Returns the predictions of each exit; for single-label models int64 [R, E', N]."""
        return self.objective.predict(self.logits)


def policy_name(policy: str | PolicyFunction) -> str:
    """Returns a policy's name, which is "module:function" for a function."""
    if isinstance(policy, str):
        return policy
    return f"{policy.__module__}:{getattr(policy, '__qualname__', type(policy).__qualname__)}"


def policy_reference(function: PolicyFunction) -> str:
    """Returns the name that a function is saved by.

    Raises UserError if the function cannot be imported by that name, for example because it is
    defined inside another function or in a notebook.
    """
    name = policy_name(function)
    if function.__module__ == "__main__" or load_policy(name) is not function:
        raise UserError(
            f"the policy {name!r} cannot be saved by its name: define it at the top level of an "
            'importable module, or pass "module:function" as a string'
        )
    return name


def load_policy(reference: str) -> PolicyFunction | Policy:
    """Imports the function or Policy "module:OBJECT", also from modules of the working directory.

    Raises UserError if it cannot be imported.
    """
    policy = import_object("policy", reference)
    if not (isinstance(policy, Policy) or callable(policy)):
        raise UserError(f"policy {reference!r} is neither a function nor a Policy")
    return policy


def policy_rule(policy: str | PolicyFunction) -> Policy:
    """Returns the properties of a policy.

    A function is assumed to read no curve, and the range of its confidences is unknown. Raises
    UserError for an unknown name, and for what is neither a name nor a function.
    """
    if not isinstance(policy, str) and not callable(policy):
        raise UserError(f"policy must be a name or a function; got {policy!r:.80}")
    if isinstance(policy, str):
        found = load_policy(policy) if ":" in policy else POLICIES[policy]
        if isinstance(found, Policy):
            return found
    about = f"user-defined policy {policy_name(policy)}"
    return Policy(_read_outputs, about, high=None, needs_probabilities=False)


def check_default_policy(policy: str, owner: str) -> None:
    """Checks the policy of a run or a saved model, which applies if the user names none.

    Args:
      policy: its name.
      owner: the run or the saved model, in words.

    Raises UserError if it cannot be found, for example in a package that is not installed.

    """
    try:
        policy_rule(policy)
    except UnknownNameError as error:
        raise UserError(
            f"{owner} needs the policy {policy!r}, {error.reason}: install or import the package "
            "that defines it, or pass another --policy"
        ) from error


def _read_outputs(inputs: PolicyInput) -> np.ndarray:
    """Takes the place of a user-defined function, which `exit_confidences` calls instead."""
    raise TypeError("a user-defined policy is a function of (outputs, temperatures)")


def grid_thresholds(
    policy: str | PolicyFunction, outcomes: int, exits: int, breakpoints: np.ndarray | None = None
) -> np.ndarray:
    """Returns 11 thresholds evenly spaced over the range of a policy's confidences, float64 [11].

    The range is [1/K, 1] for the largest probability of K outcomes (classes), as in the SWEET
    paper's experimental setup, and [0, 1] for most other policies. If it is unknown, it is that of
    the finite breakpoints, or [0, 1] without any. Patience, which counts exits, has E thresholds
    instead: 1, 2, ..., E.

    Args:
      policy: name of a policy, or user-defined function.
      outcomes: number of outcomes K.
      exits: number of exits E.
      breakpoints: thresholds at which some row changes its exit, float64 of any shape.

    """
    rule = policy_rule(policy)
    if rule.by_exits and rule.low == 1:
        return np.arange(1.0, exits + 1)
    high = float(exits) if rule.by_exits else rule.high
    if high is None:
        values = np.zeros(0) if breakpoints is None else breakpoints
        finite = values[np.abs(values) < LARGEST]  # which stands for +inf
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        share = np.linspace(0, 1, 11)
        return (1 - share) * low + share * high  # the difference of large values could overflow
    low = 1 / outcomes if rule.low is None else rule.low
    return np.linspace(low, high, 11)


def exit_confidences(
    outputs: ExitOutputs | UnlabeledOutputs,
    policy: str | PolicyFunction,
    calibrators: Sequence[Calibrator] | None = None,
) -> np.ndarray:
    """Computes the exit confidences of a policy, float64 [R, E, N].

    NaN becomes -inf, so that an exit that diverged does not answer unless it is the last. +inf
    becomes `LARGEST`, so that certificates can test it and an infinite threshold still sends all
    examples to the last exit.

    Args:
      outputs: outputs of any rows.
      policy: name in POLICIES, user-defined function, or "module:OBJECT".
      calibrators: calibrator of each replica [R]; if None, temperatures are 1.

    Raises:
      UserError: the name is unknown, the policy reads curves, learned scores or probabilities that
        are not available, or a function that is not of this package fails or returns another shape.
      ValueError: the calibrators are for other numbers of replicas or exits.

    """
    replicas, exits = outputs.logits.shape[:2]
    if calibrators is None:
        calibrators = [Calibrator.unfitted(exits)] * replicas
    if [c.temperatures.shape for c in calibrators] != [(exits,)] * replicas:
        raise ValueError(
            f"outputs of {replicas} replicas with {exits} exits need calibrators for as many "
            f"replicas and exits; got shapes {[c.temperatures.shape for c in calibrators]}"
        )
    rule, objective = policy_rule(policy), outputs.objective
    if rule.confidences is _read_outputs:
        temperatures = np.stack([c.temperatures for c in calibrators])  # [R, E]
        confidences = _call_function(policy, outputs, temperatures)
    else:
        if rule.needs_probabilities:
            categorical_variables(objective)
        if not rule.suits(objective):
            raise UserError(
                f"the policy {policy!r} does not apply to objective={objective.name!r}: choose one "
                "of "
                f"{', '.join(name for name, other in POLICIES.items() if other.suits(objective))}"
            )
        if rule.curve and any(rule.curve not in c.curves for c in calibrators):
            raise UserError(f"the policy {policy!r} needs calibration rows: pass them as well")
        learned = [None] * replicas if outputs.exit_scores is None else outputs.exit_scores
        each = zip(outputs.logits, learned, calibrators, strict=True)
        inputs = [PolicyInput(*one, objective) for one in each]
        confidences = _call_rule(policy, rule, inputs)
    if confidences.shape != outputs.logits.shape[:3]:
        raise UserError(
            f"the policy {policy_name(policy)!r} must return confidences [R, E, N] = "
            f"{outputs.logits.shape[:3]}; got {confidences.shape}"
        )
    return np.minimum(np.where(np.isnan(confidences), -np.inf, confidences), LARGEST)


def _call_function(
    policy: str | PolicyFunction,
    outputs: ExitOutputs | UnlabeledOutputs,
    temperatures: np.ndarray,
) -> np.ndarray:
    """Returns the result of a user-defined policy, float64.

    The function gets the same read-only fields for saved outputs and for new texts. Raises
    UserError if it fails, for example because it tries to write to the outputs.
    """
    function: Any = load_policy(policy) if isinstance(policy, str) else policy
    scores = outputs.exit_scores
    read_only = UnlabeledOutputs(
        _read_only(outputs.logits),
        _read_only(outputs.layers),
        None if scores is None else _read_only(scores),
        outputs.objective,
    )
    try:
        return np.asarray(function(read_only, temperatures), np.float64)
    except Exception as error:  # the function can raise anything
        raise _failure(policy, error, "(outputs, temperatures)") from error


def _call_rule(
    policy: str | PolicyFunction, rule: Policy, inputs: Sequence[PolicyInput]
) -> np.ndarray:
    """Returns the confidences of a `Policy` for each replica, float64 [R, E, N].

    Raises UserError if it is not one of this package and fails.
    """
    try:
        return np.stack([np.asarray(rule.confidences(one), np.float64) for one in inputs])
    except UserError:
        raise
    except Exception as error:  # the function can raise anything
        if POLICIES.is_own(policy):
            raise
        raise _failure(policy, error, "a PolicyInput") from error


def _failure(policy: str | PolicyFunction, error: Exception, arguments: str) -> UserError:
    return UserError(
        f"the policy {policy_name(policy)!r} failed ({type(error).__name__}: {one_line(error)}): "
        f"fix it: it must take {arguments} and return an array"
    )


def _read_only(values: np.ndarray) -> np.ndarray:
    """Returns a view that cannot be written to."""
    view = values.view()
    view.flags.writeable = False
    return view
