"""AdamW with one learning rate for each replica, and gradients clipped by owner."""

import math

import jax
import jax.numpy as jnp
import optax

from sweet_jax.models.ownership import SHARED, encoder_layer, parameter_owners
from sweet_jax.training.gradients import Params
from sweet_jax.training.settings import StepSettings

_LEARNING_TO_EXIT = jax.tree_util.DictKey("learning_to_exit")  # of a head's parameters
# SWEET paper, appendix A. Clipping, decay and schedule are written out below: optax's partition,
# clip_by_global_norm, adamw and join_schedules made a step 13% longer (median of 26 alternating
# rounds on 2 CPU cores, MiniLM's shape, 16 rows of 32 tokens, quartiles 9% and 24%), want the
# numbers of steps as constants, and round otherwise (up to 4e-9 in a parameter after one step).
ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


def apply_gradients(
    params: Params,
    grads: Params,
    adam: optax.ScaleByAdamState,
    rate: jax.Array,
    settings: StepSettings,
) -> tuple[Params, optax.ScaleByAdamState]:
    """Returns one replica's parameters and moments after AdamW's step.

    grads: like params; parameters with None in the place of a gradient stay as they are.
    rate: the learning rate of this step, float32 [].
    """
    updates, adam = ADAM.update(clip_gradients(grads, settings), adam)

    def update(path: tuple, u: jax.Array | None, p: jax.Array) -> jax.Array:
        if u is None:
            return p
        decay = settings.weight_decay if p.ndim > 1 else 0.0  # none on biases and norms
        multiple = learning_rate_multiple(tuple(part.key for part in path), settings)
        return p - (rate if multiple == 1 else rate * multiple) * (u + decay * p)

    params = jax.tree.map_with_path(update, updates, params, is_leaf=lambda x: x is None)
    return params, adam


def learning_rate_multiple(path: tuple[str | int, ...], settings: StepSettings) -> float:
    """Returns what the learning rate of the parameter at a path is multiplied by.

    A layer's is layer_decay times that of the layer above it, the last layer's is 1 (see
    `encoder_layer`). "Discriminative fine-tuning" of Howard and Ruder 2018 (arXiv 1801.06146,
    section 3.2).
    """
    depth = settings.exits[-1]
    layer = encoder_layer(path, depth)
    if layer is None:
        return settings.head_learning_rate
    return settings.layer_decay ** (depth - layer)


def clip_gradients(grads: Params, settings: StepSettings) -> Params:
    """Scales gradients down to clip_norm, over each owner's parameters or over all of them.

    One norm over all parameters would let a late exit's gradient shrink the first exit's step;
    the paper does not state its clipping, and per owner keeps SWEET's exits independent. Detached
    learning-to-exit heads are groups of their own: in an owner's norm, they would shrink its step.
    """
    if settings.clip_norm == math.inf:
        return grads

    def group(path: tuple, owner: int) -> int:
        if settings.learning_to_exit == "detached" and path[2:3] == (_LEARNING_TO_EXIT,):
            return -owner
        return owner if settings.clip_by_owner else SHARED

    owner_of = parameter_owners(grads, settings.exits, shared_relative=settings.shared_relative)
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
