"""The methods of training an encoder with early exits, defined in one table.

Shape letters: E exit.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from sweet_jax.registry import Registry

# From layer numbers [E] to the loss weights at the first and at the last step, float64 [E] each.
LossWeightSchedule = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Method:
    """Describes a training method."""

    name: str  # value of the config key `method`
    # Whether every exit has a model of its own, as deep as that exit; else one model has all exits.
    model_per_exit: bool
    # Default of the config key: one number, or from, to. 1 stops the whole gradient at a boundary.
    isolation: tuple[float, ...]
    loss_weights: str  # default of the config key, a name in LOSS_WEIGHTS
    # From the layers of the exits [E] to the layers computed until each exit, float64 [E].
    cost: Callable[[np.ndarray], np.ndarray]

    @property
    def trains_exits_independently(self) -> bool:
        """Returns whether, by default, exits share a model but never train each other's layers."""
        return not self.model_per_exit and set(self.isolation) == {1.0}


def shared_layers(layers: np.ndarray) -> np.ndarray:
    """Returns the layers computed until each exit if each exit continues from the one before."""
    return layers


def summed_layers(layers: np.ndarray) -> np.ndarray:
    """Returns the layers computed until each exit if every model starts again from the text."""
    return np.cumsum(layers)


# The three methods of the SWEET paper (Rotem et al. 2023, arXiv 2306.02307), sections 3 and 4.
METHODS = Registry(
    "method",
    Method,
    {
        method.name: method
        for method in (
            Method("sweet", False, (1.0,), "uniform", shared_layers),
            Method("early_exit", False, (0.0,), "uniform", shared_layers),
            Method("multi_model", True, (0.0,), "uniform", summed_layers),
        )
    },
    "sweet_jax.methods",
)


def uniform(layers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a weight of 1 for every exit at every step (SWEET paper, section 3)."""
    return np.ones(len(layers)), np.ones(len(layers))


def by_depth(layers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns weights proportional to the layer numbers, at every step.

    This is PABEE's weighted average of the exits' losses (Zhou et al. 2020, arXiv 2006.04152),
    times E, so that the weights have the same sum as uniform ones.
    """
    weights = layers / layers.mean()
    return weights, weights


def shallow_deep(layers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns weights that rise from 0.01 to the exit's cost; the last exit's is always 1.

    Shallow-Deep Networks that are trained from scratch use them (Kaya et al. 2019, arXiv
    1810.07052).
    """
    end = layers / layers[-1]
    return np.where(end < 1, 0.01, 1.0), end


LOSS_WEIGHTS: Registry[LossWeightSchedule] = Registry(
    "loss_weights",
    Callable,
    {"uniform": uniform, "depth": by_depth, "shallow_deep": shallow_deep},
    "sweet_jax.loss_weights",
)


def loss_weights(
    chosen: str | Sequence[float], layers: Sequence[int]
) -> tuple[tuple[float, float], ...]:
    """Returns the weight of each exit's loss at the first and at the last step, E pairs.

    chosen: a name in LOSS_WEIGHTS, or one number for each exit.
    """
    if isinstance(chosen, str):
        start, end = LOSS_WEIGHTS[chosen](np.asarray(layers, np.float64))
    else:
        start = end = np.asarray(chosen, np.float64)
    return tuple(zip(start.tolist(), end.tolist(), strict=True))
