"""One training step and one evaluation step of one replica, as pure functions.

Shape letters: E exit, B batch, L length, C classes.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sweet_jax.models.early_exit import ModelOutput, SegmentState
from sweet_jax.models.layers import derive_key
from sweet_jax.models.ownership import SHARED, parameter_owners
from sweet_jax.objectives.objective import Objective
from sweet_jax.objectives.single_label import SINGLE_LABEL
from sweet_jax.training.gradients import Params, Segments, segment_gradients, whole_gradients
from sweet_jax.training.losses import StepMetrics, TrainingLoss

_ENCODER = jax.tree_util.DictKey("encoder")  # of a model's parameters; all else is heads
_LEARNING_TO_EXIT = jax.tree_util.DictKey("learning_to_exit")  # of a head's parameters
# SWEET paper, appendix A. Clipping, decay and schedule are written out below: optax's partition,
# clip_by_global_norm, adamw and join_schedules made a step 13% longer (median of 26 alternating
# rounds on 2 CPU cores, MiniLM's shape, 16 rows of 32 tokens, quartiles 9% and 24%), want the
# numbers of steps as constants, and round otherwise (up to 4e-9 in a parameter after one step).
_ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The constants of a compiled training step.

    Attributes:
      graphdef: structure of the model.
      exits: layer numbers, E of them.
      total_steps, warmup_steps: of the whole training.
      weight_decay: AdamW's, of matrices.
      clip_norm: largest norm of a gradient, infinity for no clipping.
      clip_by_owner: one norm for each owner of parameters; otherwise one for all.
      isolation: of the boundaries: one number, or from, to.
      isolation_schedule: from, to: "linear" in the steps, or a "step" at half time.
      boundary_isolation: factors of the E - 1 boundaries; () for 1 throughout.
      loss_weights: of each exit at the first and at the last step, linear in between; () for 1.
      objective: what the outputs of an exit are trained for.
      learning_to_exit: "", "joint" or "detached".
      shared_relative: the model's.
      frozen: so many first segments stay as they are: no exit trains them.
      head_learning_rate: of the heads, a multiple of the learning rate.
      traced: the numbers of steps as arguments of a compiled program, in place of its constants.

    """

    graphdef: nnx.GraphDef
    exits: tuple[int, ...]
    total_steps: int
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    clip_by_owner: bool
    isolation: tuple[float, ...]
    isolation_schedule: str = "linear"
    boundary_isolation: tuple[float, ...] = ()
    loss_weights: tuple[tuple[float, float], ...] = ()
    objective: Objective = SINGLE_LABEL
    learning_to_exit: str = ""
    shared_relative: bool = False
    frozen: int = 0
    head_learning_rate: float = 1.0
    traced: "Schedule | None" = None

    @property
    def schedule(self) -> "Schedule":
        """What the step reads of the numbers of steps."""
        return self.traced or make_schedule(self.total_steps, self.warmup_steps)

    def isolation_at(self, step: jax.Array) -> tuple[float | jax.Array, ...]:
        """Returns the isolation of each of the E - 1 boundaries at a step (int32 []).

        A Python number where it is constant: `isolate` takes 0 and 1 literally then, so that a
        boundary that is closed throughout lets exactly nothing through.
        """
        factors = self.boundary_isolation or (1.0,) * (len(self.exits) - 1)
        start, end = self.isolation[0], self.isolation[-1]
        if start == end:
            return tuple(start * factor for factor in factors)
        if self.isolation_schedule == "step":
            now = jnp.where(2 * step < self.schedule.total, start, end)
        else:
            now = self._linear(start, end, step)
        return tuple(now * factor if factor else 0.0 for factor in factors)

    def loss_at(self, step: jax.Array) -> TrainingLoss:
        """Returns the loss at a step (int32 []); Python numbers for weights that are constant."""
        weights = tuple(
            start if start == end else self._linear(start, end, step)
            for start, end in self.loss_weights
        )
        return TrainingLoss(self.objective, weights)

    def _linear(self, start: float, end: float, step: jax.Array) -> jax.Array:
        return start + (end - start) * step * self.schedule.per_step


class Schedule(NamedTuple):
    """The numbers of steps as arguments of a compiled program, so that runs of any length share it.

    Reciprocals, which is what XLA makes of a division by a constant: a run has the same numbers
    whether these are arguments or constants.
    """

    total: Any  # int32 []
    warmup: Any  # int32 []
    per_step: Any  # float32 [], 1 / (total - 1)
    per_warmup_step: Any  # float32 []
    per_decay_step: Any  # float32 []


def make_schedule(total: int, warmup: int) -> Schedule:
    """Returns the schedule of so many steps, the first of them a warm-up."""
    lengths = (total - 1, warmup, total - warmup)
    each = (np.float32(1) / np.float32(max(1, length)) for length in lengths)
    return Schedule(np.int32(total), np.int32(warmup), *each)


class State(NamedTuple):
    """Everything of one replica that training changes, and in which replicas differ."""

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
        _ADAM.init(params if trained is None else trained),
        jnp.zeros((), jnp.int32),
        jnp.asarray(learning_rate, jnp.float32),
        jnp.asarray(seed, jnp.uint32),
    )


def train_step(
    settings: StepSettings, state: State, batch: dict[str, jax.Array]
) -> tuple[State, StepMetrics]:
    """Takes one step of AdamW on the sum over exits of their losses (SWEET paper, section 3).

    Args:
      settings: constants.
      state: of one replica.
      batch: input_ids, token_type_ids int32 [B, L], mask bool [B, L], labels [B], row_mask bool
        [B] (False: the row is padding, and left out of the loss).

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
    """Returns the state after AdamW's step; parameters without a gradient (None) keep theirs."""
    updates, adam = _ADAM.update(clip_gradients(grads, settings), state.adam)
    rate = state.learning_rate * _schedule(state.step, settings)

    def update(path: tuple, u: jax.Array | None, p: jax.Array) -> jax.Array:
        if u is None:
            return p
        decay = settings.weight_decay if p.ndim > 1 else 0.0  # none on biases and norms
        multiple = settings.head_learning_rate if path[0] != _ENCODER else 1.0
        return p - (rate if multiple == 1 else rate * multiple) * (u + decay * p)

    params = jax.tree.map_with_path(update, updates, state.params, is_leaf=lambda x: x is None)
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


def _schedule(step: jax.Array, settings: StepSettings) -> jax.Array:
    """Returns the share of the peak learning rate: linear warm-up, then linear decay to zero."""
    schedule = settings.schedule
    rising = jnp.where(schedule.warmup > 0, (step + 1) * schedule.per_warmup_step, 1.0)
    return jnp.minimum(rising, (schedule.total - step) * schedule.per_decay_step)
