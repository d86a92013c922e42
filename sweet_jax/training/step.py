"""One training step and one evaluation step of one replica, as pure functions.

Shape letters: E exit, B batch, L length.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.early_exit import ModelOutput, SegmentState
from sweet_jax.models.layers import derive_key
from sweet_jax.optimizers import GradientTransformation
from sweet_jax.training.gradients import Params, Segments, segment_gradients, whole_gradients
from sweet_jax.training.losses import StepMetrics
from sweet_jax.training.optimizer import apply_gradients, learning_rate_share
from sweet_jax.training.settings import StepSettings
from sweet_jax.training.transformations import ADAM


class State(NamedTuple):
    """Holds what training changes in one replica, and what differs between replicas."""

    params: Params
    opt_state: Any  # optax.OptState
    step: jax.Array  # int32 [], number of steps taken
    learning_rate: jax.Array  # float32 [], peak learning rate
    seed: jax.Array  # uint32 []


def init_state(
    params: Params,
    learning_rate: float,
    seed: int,
    optimizer: GradientTransformation = ADAM,
) -> State:
    """Returns the state before the first step.

    Args:
      params: initial parameters.
      learning_rate: peak learning rate.
      seed: seed of the replica.
      optimizer: optimizer of the training.

    """
    return State(
        params,
        optimizer.init(params),
        jnp.zeros((), jnp.int32),
        jnp.asarray(learning_rate, jnp.float32),
        jnp.asarray(seed, jnp.uint32),
    )


def train_step(
    settings: StepSettings, state: State, batch: dict[str, jax.Array]
) -> tuple[State, StepMetrics]:
    """Takes one step of the optimizer on the sum of the exits' losses (SWEET paper, section 3).

    Args:
      settings: constants of the step.
      state: state of one replica.
      batch: input_ids and token_type_ids int32 [B, L]; mask bool [B, L]; labels [B, ...], the
        targets of the objective; row_mask bool [B], False for padding rows, which do not count in
        the loss; and, if some rows have no labels, labeled bool [B], False for the rows that count
        only in distillation.

    Returns:
      The state after the step, and the metrics before it.

    """
    chex.assert_rank((batch["input_ids"], batch["row_mask"]), (2, 1))
    isolation = settings.isolation_at(state.step)
    if all(not isinstance(a, jax.Array) and a == 1 for a in isolation):
        every = tuple(range(len(settings.exits)))
        state, metrics, _ = train_step_segments(settings, every, state, batch, None)
        return state, metrics
    key, loss = dropout_key(state), settings.loss_at(state.step)
    grads, metrics = whole_gradients(settings.graphdef, state.params, batch, isolation, key, loss)
    return _update(settings, state, grads), metrics


def train_step_segments(
    settings: StepSettings,
    numbers: tuple[int, ...],
    state: State,
    batch: dict[str, jax.Array],
    carried: SegmentState | None,
) -> tuple[State, StepMetrics, SegmentState | None]:
    """Takes one step of consecutive segments, between which no gradient flows.

    Args:
      settings: constants of the step.
      numbers: numbers of the segments, from 0.
      state: state of one replica, with at least the parameters of these segments.
      batch: batch as in `train_step`.
      carried: output of the segment before these, None if they include the first.

    Returns:
      The state after the step, the metrics of these segments' exits, and the output of the last of
      these segments for the next one.

    """
    segments = Segments(numbers, carried, settings.frozen)
    grads, metrics, carried = segment_gradients(
        settings.graphdef,
        state.params,
        batch,
        dropout_key(state),
        settings.loss_at(state.step),
        segments,
    )
    return _update(settings, state, grads), metrics, carried


def _update(settings: StepSettings, state: State, grads: Params) -> State:
    """Returns the state after an update with these gradients."""
    rate = state.learning_rate * learning_rate_share(state.step, settings)
    params, opt_state = apply_gradients(state.params, grads, state.opt_state, rate, settings)
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1)


def dropout_key(state: State) -> jax.Array:
    """Returns the key for the dropout masks of a replica's next step."""
    return derive_key(jax.random.key(state.seed), "dropout", state.step)


def evaluate_step(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: dict,
    key: jax.Array | None = None,
    features: bool = False,
) -> ModelOutput:
    """Returns the outputs of every exit, without dropout if `key` is None.

    Boundaries are closed, so that an exit is computed in the same way whether or not others follow
    it: the outputs of a run are then bitwise equal to those of a run that grows from it.

    Args:
      graphdef, params: structure and parameters of the model.
      batch: batch as in `train_step`.
      key: typed key for the dropout masks, or None.
      features: whether to return the inputs of the classifiers too.

    """
    return nnx.merge(graphdef, params).forward(batch, 1.0, key, features)
