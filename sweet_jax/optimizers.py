"""The optimizers and the learning-rate schedules of a training, defined in two tables.

Importing these tables imports neither JAX nor optax, which their entries need.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from sweet_jax.registry import Registry

# From the share of the steps that remain after warm-up, float32 [...], which falls from 1 to 0, to
# the learning rate as a share of its peak, float32 [...] from 0 to 1: elementwise, with jax.numpy.
LearningRateSchedule = Callable[[Any], Any]


@runtime_checkable
class GradientTransformation(Protocol):
    """Turns gradients into the direction of an update; an `optax.GradientTransformation` does.

    The direction is neither multiplied by the learning rate nor negated, as that of optax's
    `scale_by_...` functions. The training step clips the gradients, multiplies the direction by the
    learning rate, and adds the decoupled weight decay. So that exits stay independent of each
    other, the update of a parameter must not depend on the gradients of others: clipping by a
    global norm, for example, would make it so.
    """

    init: Callable[..., Any]  # from parameters to the optimizer state
    update: Callable[..., Any]  # (gradients, state, parameters) → (direction, state)


OPTIMIZERS: Registry[GradientTransformation] = Registry(
    "optimizer",
    GradientTransformation,
    {},
    "sweet_jax.optimizers",
    {
        "adamw": "sweet_jax.training.transformations:ADAM",
        "lion": "sweet_jax.training.transformations:LION",
    },
)
LEARNING_RATE_SCHEDULES: Registry[LearningRateSchedule] = Registry(
    "learning_rate_schedule",
    Callable,
    {},
    "sweet_jax.learning_rate_schedules",
    {
        "linear": "sweet_jax.training.transformations:linear",
        "cosine": "sweet_jax.training.transformations:cosine",
        "constant": "sweet_jax.training.transformations:constant",
    },
)
