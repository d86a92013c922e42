"""AdamW with one learning rate for each replica, and gradient clipping by owner."""

import math

import jax
import jax.numpy as jnp
import optax

from sweet_jax.models.ownership import SHARED, encoder_layer, parameter_owners
from sweet_jax.training.gradients import Params
from sweet_jax.training.settings import StepSettings

_LEARNING_TO_EXIT = jax.tree_util.DictKey("learning_to_exit")  # key in a head's parameters
# Values from the SWEET paper, appendix A. Clipping, weight decay and the schedule are written out
# below because optax's partition, clip_by_global_norm, adamw and join_schedules made a step 13%
# slower (median of 26 alternating rounds on 2 CPU cores, MiniLM's shape, 16 rows of 32 tokens,
# quartiles 9% and 24%), require step counts that are constants, and round differently (up to 4e-9
# in a parameter after one step).
ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


def apply_gradients(
    params: Params,
    grads: Params,
    adam: optax.ScaleByAdamState,
    rate: jax.Array,
    settings: StepSettings,
) -> tuple[Params, optax.ScaleByAdamState]:
    """Returns one replica's parameters and Adam moments after a step of AdamW.

    Args:
      params: parameters of the replica.
      grads: gradients, a tree like `params`; parameters whose gradient is None are not changed.
      adam: Adam moments before the step.
      rate: learning rate of this step, float32 [].
      settings: constants of the step.

    """
    updates, adam = ADAM.update(clip_gradients(grads, settings), adam)

    def update(path: tuple, u: jax.Array | None, p: jax.Array) -> jax.Array:
        if u is None:
            return p
        decay = settings.weight_decay if p.ndim > 1 else 0.0  # biases and norms do not decay
        multiple = learning_rate_multiple(tuple(part.key for part in path), settings)
        return p - (rate if multiple == 1 else rate * multiple) * (u + decay * p)

    params = jax.tree.map_with_path(update, updates, params, is_leaf=lambda x: x is None)
    return params, adam


def learning_rate_multiple(path: tuple[str | int, ...], settings: StepSettings) -> float:
    """Returns the factor by which the learning rate of the parameter at a path is multiplied.

    The factor of the last layer is 1; that of each other layer is layer_decay times that of the
    layer above it (see `encoder_layer`). Heads have the factor head_learning_rate. This is the
    "discriminative fine-tuning" of Howard and Ruder 2018 (arXiv 1801.06146, section 3.2).
    """
    depth = settings.exits[-1]
    layer = encoder_layer(path, depth)
    if layer is None:
        return settings.head_learning_rate
    return settings.layer_decay ** (depth - layer)


def clip_gradients(grads: Params, settings: StepSettings) -> Params:
    """Clips the norm of the gradients at clip_norm, by owner or over all parameters.

    With one norm over all parameters, a late exit's gradient could shrink the first exit's step.
    The paper does not state how it clips; clipping by owner keeps SWEET's exits independent.
    Detached learning-to-exit heads form groups of their own, because they would otherwise shrink
    the step of their owner.
    """
    if settings.clip_norm == math.inf:
        return grads

    def group(path: tuple, owner: int) -> int:
        if settings.learning_to_exit == "detached" and path[2:3] == (_LEARNING_TO_EXIT,):
            return -owner
        return owner if settings.clip_by_owner else SHARED

    owner_of = parameter_owners(
        grads,
        settings.exits,
        shared_relative=settings.shared_relative,
        owners=settings.owners,
    )
    groups = jax.tree.map_with_path(group, owner_of)
    squares: dict[int, jax.Array] = {}
    for number, leaf in zip(jax.tree.leaves(groups), jax.tree.leaves(grads), strict=True):
        squares[number] = squares.get(number, jnp.zeros(())) + jnp.sum(leaf * leaf)
    limit = settings.clip_norm
    scales = {g: limit / jnp.maximum(jnp.sqrt(s), limit) for g, s in squares.items()}
    return jax.tree.map(lambda number, g: g * scales[number], groups, grads)


def learning_rate_share(step: jax.Array, settings: StepSettings) -> jax.Array:
    """Returns the share of the peak learning rate: linear warm-up, then linear decay to zero."""
    schedule = settings.schedule
    rising = jnp.where(schedule.warmup > 0, (step + 1) * schedule.per_warmup_step, 1.0)
    return jnp.minimum(rising, (schedule.total - step) * schedule.per_decay_step)
