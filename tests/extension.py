"""A method, an objective, a metric, a policy and a schedule that no table of the package has."""

import dataclasses

import numpy as np

from sweet_jax.exits.confidences import Policy
from sweet_jax.methods import METHODS
from sweet_jax.objectives import SINGLE_LABEL, Metric
from sweet_jax.objectives.objective import CategoricalVariables

SAME = dataclasses.replace(METHODS["sweet"], name="same")
HALF = dataclasses.replace(METHODS["sweet"], name="half", isolation=(0.5,))


def rising(layers):
    """Loss weights that end at the depth of each exit."""
    return np.ones(len(layers)), layers / layers[-1]


def level_logits(outputs):
    """Levels 0, 1, ... are the less likely the farther they are from the first output."""
    xp = outputs.__array_namespace__()
    levels = xp.broadcast_to(xp.arange(outputs.shape[-1]), outputs.shape)
    return -((outputs[..., :1] - levels) ** 2)


def level_loss(outputs, targets):
    import jax

    logs = jax.nn.log_softmax(level_logits(outputs))
    right = jax.numpy.broadcast_to(targets, logs.shape[:-1])[..., None]
    return -jax.numpy.take_along_axis(logs, right, axis=-1)[..., 0]


WITHIN_ONE = Metric(
    "within_one",
    lambda predictions, targets, outputs: (abs(predictions - targets) <= 1)[..., None],
    lambda targets, outputs: np.ones((len(targets), 1), bool),
    lambda sums, totals: sums[..., 0] / totals[..., 0],
    is_share=True,
)
LEVELS = dataclasses.replace(
    SINGLE_LABEL,
    name="levels",
    metrics=(*SINGLE_LABEL.metrics[:1], WITHIN_ONE),
    row_loss=level_loss,
    predict=lambda outputs: level_logits(outputs).argmax(axis=-1),
    probabilities=lambda outputs: SINGLE_LABEL.probabilities(level_logits(outputs)),
    categorical=CategoricalVariables(
        logits=lambda outputs: level_logits(outputs)[..., None, :],
        outcomes=lambda labels: labels[..., None],
    ),
)


def lead(inputs):
    """The gap between the two largest probabilities, times the number of classes."""
    ordered = np.sort(inputs.objective.probabilities(inputs.logits), axis=-1)
    return inputs.logits.shape[-1] * (ordered[..., -1] - ordered[..., -2])


LEAD = Policy(lead, "gap between the two largest probabilities", by_exits=True)
