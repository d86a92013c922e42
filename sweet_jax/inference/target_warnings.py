"""Warns of targets that a saved model accepts but cannot meet, or at which no text exits early."""

import math
from collections.abc import Mapping

from sweet_jax.exits.policies import PolicyFunction, policy_name, policy_rule
from sweet_jax.inference.artifact import ModelArtifact


def target_warning(
    model: ModelArtifact, policy: str | PolicyFunction, target: Mapping[str, float]
) -> str | None:
    """Returns a line on a target that has no effect or is out of reach, None if there is none.

    Args:
      model: saved model, calibrated for the policy.
      policy: the policy that the target applies to.
      target: valid target, see `Target`.

    """
    if "threshold" in target:
        return _unreachable_threshold(model, policy, target["threshold"])
    if "error" in target or "accuracy" in target:
        return _unreachable_metric(model, policy, target)
    return None


def _unreachable_threshold(
    model: ModelArtifact, policy: str | PolicyFunction, threshold: float
) -> str | None:
    """Returns a warning of a finite threshold that no early exit reaches, such as a percentage.

    There is none if the largest confidence is unknown, as for a user's own function.
    """
    rule = policy_rule(policy)
    highest = len(model.layers) - 1 if rule.by_exits else rule.high  # at an early exit
    if highest is None or threshold <= highest or math.isinf(threshold):
        return None
    return (
        f"threshold={threshold:g} is above all values of the policy {policy_name(policy)} at an "
        f"early exit (at most {highest:g}), so no text exits early: set a lower one, or inf, "
        "which computes the full model at once"
    )


def _unreachable_metric(
    model: ModelArtifact, policy: str | PolicyFunction, target: Mapping[str, float]
) -> str | None:
    """Returns a warning of an accuracy or error that is PCEE's threshold, but out of reach.

    Without PCEE such a target cannot be met, which is an error. Metrics such as F1, which are not a
    share of the rows, are not compared with an accuracy.
    """
    if not policy_rule(policy).curve:
        return None
    if "error" in target:
        name, sign, most = "error", -1, "least"
    elif model.objective.metric(model.metric).is_share:
        name, sign, most = "accuracy", 1, "most"
    else:
        return None
    resolution = model.resolver.resolve(policy_name(policy), target)
    if not resolution.reachable < sign * target[name]:
        return None
    return (
        f"{name}={target[name]:g} is out of reach: the calibration rows reach at {most} "
        f"{sign * resolution.reachable:.4f}, but under {policy_name(policy)} it only sets the "
        f"threshold, {resolution.threshold:g}: set a value within reach"
    )
