"""The best state of a training so far, by the area under the curve on tuning rows.

Shape letters: R replica, E exit, M tuning rows, C classes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sweet_jax.exits.analysis import area
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.simulation import simulate
from sweet_jax.training.step import Params


class Best(NamedTuple):
    """The best parameters so far of every replica; a part of what checkpoints hold.

    Of a single replica, arrays without the axis R, as its state is.

    Attributes:
      params: [R, ...] that are kept.
      area: float32 [R], the largest so far on tuning rows; minus infinity before the first
        evaluation.
      step: int32 [R], steps taken by the parameters that are kept.

    """

    params: Params
    area: jax.Array
    step: jax.Array


def first_best(params: Params, learning_rate: jax.Array) -> Best:
    """Returns what stands before the first evaluation; learning_rate [R] gives the shapes."""
    shape = np.shape(learning_rate)
    return Best(params, jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32))


def compile_update(shardings: Best, rows: int) -> Callable[[Best, Params, Any, Any], Best]:
    """Returns (best, params, area, step) → best, jitted, the old best donated.

    A replica's parameters replace those kept unless their area is more than a standard error below
    the largest so far. Of states that so few rows cannot tell apart the latest is kept: it has seen
    most of the training rows, and at the smallest learning rate. This is the rule of one standard
    error (Breiman et al. 1984, section 3.4.3), with training in the place of pruning.

    rows: how many tuning rows.
    """

    def update(best: Best, params: Params, area: jax.Array, step: jax.Array) -> Best:
        better = area >= best.area - standard_error(best.area, rows)

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(
                better.reshape(better.shape + (1,) * (new.ndim - better.ndim)), new, old
            )

        return Best(
            jax.tree.map(choose, params, best.params),
            jnp.maximum(area, best.area),
            choose(jnp.broadcast_to(step, best.step.shape), best.step),
        )

    return jax.jit(update, out_shardings=shardings, donate_argnums=0)


def standard_error(area: Any, rows: int) -> Any:
    """Returns the standard error of an area on so many rows, as if it were a share of them.

    0 where the area is not a share between 0 and 1.
    """
    share = jnp.clip(area, 0, 1)
    return jnp.sqrt(share * (1 - share) / rows)


def tuning_area(
    logits: np.ndarray, labels: np.ndarray, layers: Any, cost: Any, identity: Mapping[str, Any]
) -> np.ndarray:
    """Returns the area under each replica's exact curve by confidence, float64 [R].

    Confidences are those of the logits as they are: no temperature is fitted yet. Minus infinity
    where logits are not finite.

    Args:
      logits: float32 [R, E, M, C].
      labels: int [R, M].
      layers, cost: of the exits [E].
      identity: with the metric, as in ExitOutputs.

    """
    sound = np.isfinite(logits).all(axis=(1, 2, 3))
    outputs = ExitOutputs(
        np.where(sound[:, None, None, None], logits, 0), labels, layers, cost, identity=identity
    )
    curve = simulate(outputs, "raw_confidence")
    areas = [area(c, s) for c, s in zip(curve.cost, curve.score, strict=True)]
    return np.where(sound, areas, -np.inf)
