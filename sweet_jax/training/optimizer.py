"""The update of the parameters: clipping by owner, optimizer, learning rate and weight decay."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sweet_jax.errors import UserError, one_line
from sweet_jax.models.ownership import SHARED, encoder_layer, parameter_owners
from sweet_jax.training.gradients import Params
from sweet_jax.training.settings import StepSettings
from sweet_jax.training.transformations import ADAM, LION

_LEARNING_TO_EXIT = jax.tree_util.DictKey("learning_to_exit")  # key in a head's parameters
# Clipping, weight decay and the schedule are written out below because optax's partition,
# clip_by_global_norm, adamw and join_schedules made a step 13% slower (median of 26 alternating
# rounds on 2 CPU cores, MiniLM's shape, 16 rows of 32 tokens, quartiles 9% and 24%), require step
# counts that are constants, and round differently (up to 4e-9 in a parameter after one step).


def apply_gradients(
    params: Params,
    grads: Params,
    opt_state: optax.OptState,
    rate: jax.Array,
    settings: StepSettings,
) -> tuple[Params, optax.OptState]:
    """Returns one replica's parameters and optimizer state after a step.

    Args:
      params: parameters of the replica.
      grads: gradients, a tree like `params`; parameters whose gradient is None are not changed.
      opt_state: state of the optimizer before the step.
      rate: learning rate of this step, float32 [].
      settings: constants of the step.

    """
    trained = jax.tree.map(
        lambda g, p: None if g is None else p, grads, params, is_leaf=lambda x: x is None
    )
    clipped = clip_gradients(grads, settings)
    updates, opt_state = settings.optimizer.update(clipped, opt_state, trained)

    def update(path: tuple, u: jax.Array | None, p: jax.Array) -> jax.Array:
        if u is None:
            return p
        decay = settings.weight_decay if p.ndim > 1 else 0.0  # biases and norms do not decay
        multiple = learning_rate_multiple(tuple(part.key for part in path), settings)
        return p - (rate if multiple == 1 else rate * multiple) * (u + decay * p)

    params = jax.tree.map_with_path(update, updates, params, is_leaf=lambda x: x is None)
    return params, opt_state


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
    """Returns the share of the peak learning rate at a step: linear warm-up, then the schedule.

    step: int32 [...].
    """
    schedule = settings.schedule
    rising = jnp.where(schedule.warmup > 0, (step + 1) * schedule.per_warmup_step, 1.0)
    remaining = jnp.minimum(1.0, (schedule.total - step) * schedule.per_decay_step)
    return jnp.minimum(1.0, rising) * settings.learning_rate_schedule(remaining)


def check_optimizer(name: str, optimizer: optax.GradientTransformation, params: Params) -> bool:
    """Returns whether the state of an optimizer starts with zeros, whatever the parameters are.

    Optimizers of other packages are tried, on parameters of the same structure and ranks whose
    dimensions are 1.

    Args:
      name: name of the optimizer, for messages.
      optimizer: the optimizer.
      params: parameters, of which None are not trained.

    Raises:
      UserError: if the optimizer cannot be used, or if its update points up the gradient.

    """
    if optimizer in (ADAM, LION):
        return True  # the trial takes half a second
    small = jax.tree.map(lambda x: jnp.full((1,) * np.ndim(x), 1.5, jnp.float32), params)
    grads = jax.tree.map(jnp.ones_like, small)
    try:
        state = optimizer.init(small)
        updates, _ = optimizer.update(grads, state, small)
        slope = sum(float(jnp.sum(update)) for update in jax.tree.leaves(updates))
        numbers = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state)]
    except Exception as error:  # a transformation can raise anything
        raise UserError(
            f"optimizer {name!r} cannot be used: {type(error).__name__}: {one_line(error)}"
        ) from error
    if slope < 0:
        raise UserError(
            f"optimizer {name!r} would increase the loss: the training step negates the update and "
            "multiplies it by the learning rate itself, so use optax.scale_by_adam(), for example, "
            "and not optax.adamw(1e-3)"
        )
    return not any(leaf.any() for leaf in numbers)


def map_moments(transform: Callable[..., Any], params: Params, *opt_states: Any) -> Any:
    """Applies a function to the parts of an optimizer state that are trees like the parameters.

    These are, for example, Adam's two moments.

    Args:
      transform: function from such a part of each state to its new value.
      params: parameters, with None or any other leaves.
      opt_states: optimizer states of one structure, which may have None for some parameters.

    Returns:
      The first state with the new values of these parts; its other arrays are unchanged.

    """

    def is_none(x: Any) -> bool:
        return x is None

    like: Any = jax.tree.structure(params, is_leaf=is_none)

    def is_moment(part: Any) -> bool:
        return jax.tree.structure(part, is_leaf=is_none) == like

    def change(part: Any, *others: Any) -> Any:
        return transform(part, *others) if is_moment(part) else part

    return jax.tree.map(change, *opt_states, is_leaf=is_moment)
