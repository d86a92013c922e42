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
from sweet_jax.training.gradients import Params, Segments, segment_gradients, whole_gradients
from sweet_jax.training.losses import StepMetrics
from sweet_jax.training.optimizer import ADAM, apply_gradients, learning_rate_share
from sweet_jax.training.settings import StepSettings


class State(NamedTuple):
    """Holds everything of one replica that training changes, or in which replicas differ."""

    params: Params
    adam: Any  # optax.ScaleByAdamState
    step: jax.Array  # int32 [], steps taken
    learning_rate: jax.Array  # float32 [], the peak
    seed: jax.Array  # uint32 []


def init_state(params: Params, learning_rate: float, seed: int, trained: Params = None) -> State:
    """Returns the state before the first step.

    trained: the parameters that will get gradients, None for the others; by default all.
    """
    return State(
        params,
        ADAM.init(params if trained is None else trained),
        jnp.zeros((), jnp.int32),
        jnp.asarray(learning_rate, jnp.float32),
        jnp.asarray(seed, jnp.uint32),
    )


def train_step(
    settings: StepSettings, state: State, batch: dict[str, jax.Array]
) -> tuple[State, StepMetrics]:
    """Takes one step of AdamW on the sum over exits of their losses (SWEET paper, section 3).

    Args:
      settings, state: constants, and what one replica has.
      batch: input_ids, token_type_ids int32 [B, L], mask bool [B, L], labels, the targets [B, ...]
        of the objective, row_mask bool [B] (False: the row is padding, and left out of the loss);
        where some rows have no labels, labeled bool [B]: others count in distillation alone.

    Returns:
      The state after the step, and metrics from before it.

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
    """Takes one step of consecutive segments, where no gradient crosses segments.

    Args:
      settings, batch: as in `train_step`.
      numbers: of the segments, from 0.
      state: of one replica; of the parameters, those of these segments at least.
      carried: the state that the segment before them handed on, None for the first.

    Returns:
      The state, metrics of these segments' exits, and the state that the last of them hands on.

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
    """Returns the state after AdamW's step."""
    rate = state.learning_rate * learning_rate_share(state.step, settings)
    params, adam = apply_gradients(state.params, grads, state.adam, rate, settings)
    return state._replace(params=params, adam=adam, step=state.step + 1)


def dropout_key(state: State) -> jax.Array:
    """Returns the key of the dropout masks of a replica's next step."""
    return derive_key(jax.random.key(state.seed), "dropout", state.step)


def evaluate_step(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: dict,
    key: jax.Array | None = None,
    features: bool = False,
) -> ModelOutput:
    """Returns the outputs of every exit, with `features` what it reads; with a key, under dropout.

    Boundaries are closed, so that an exit is computed in one way, whether others follow it or not:
    the outputs of a run are then those of the run that it grows into, to the last bit.
    """
    return nnx.merge(graphdef, params).forward(batch, 1.0, key, features)
