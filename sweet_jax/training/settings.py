"""The constants of a compiled training step, and schedules over its steps.

Shape letters: E exit.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.objectives.objective import Objective
from sweet_jax.objectives.single_label import SINGLE_LABEL
from sweet_jax.training.losses import Distillation, TrainingLoss


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Holds the constants of a compiled training step."""

    graphdef: nnx.GraphDef  # structure of the model
    exits: tuple[int, ...]  # layer numbers, E of them
    total_steps: int  # of the whole training
    warmup_steps: int
    weight_decay: float  # AdamW's, of matrices
    clip_norm: float  # largest norm of a gradient, infinity for no clipping
    clip_by_owner: bool  # one norm for each owner of parameters; otherwise one for all
    isolation: tuple[float, ...]  # of the boundaries: one number, or from, to
    isolation_schedule: str = "linear"  # in the steps, or "step": at half time
    boundary_isolation: tuple[float, ...] = ()  # factors of the E - 1 boundaries; () for 1
    # Of each exit at the first and at the last step, linear in between; () for 1.
    loss_weights: tuple[tuple[float, float], ...] = ()
    # Of the steps, the share in which the last exit alone is trained, all boundaries open.
    last_exit_first: float = 0.0
    distillation: Distillation | None = None  # what the exits learn from the last one
    objective: Objective = SINGLE_LABEL  # what the outputs of an exit are trained for
    learning_to_exit: str = ""  # or "joint", "detached"
    shared_relative: bool = False  # the model's
    frozen: int = 0  # so many first segments stay as they are: no exit trains them
    head_learning_rate: float = 1.0  # of the heads, a multiple of the learning rate
    layer_decay: float = 1.0  # learning rate of a layer, a multiple of that of the layer above it
    # The numbers of steps as arguments of a compiled program, in place of its constants.
    traced: "Schedule | None" = None

    @property
    def schedule(self) -> "Schedule":
        """Returns what the step reads of the numbers of steps."""
        return self.traced or make_schedule(self.total_steps, self.warmup_steps)

    def isolation_at(self, step: jax.Array) -> tuple[float | jax.Array, ...]:
        """Returns the isolation of each of the E - 1 boundaries at a step (int32 []).

        A Python number where it is constant: `isolate` takes 0 and 1 literally then, so that a
        boundary that is closed throughout lets exactly nothing through.
        """
        values = self._scheduled_isolation(step)
        if not self.last_exit_first:
            return values
        alone = self._last_exit_alone(step)
        # A boundary that is open throughout stays a Python number.
        moving = [isinstance(value, jax.Array) or value > 0 for value in values]
        return tuple(
            jnp.where(alone, 0.0, value) if moves else 0.0
            for value, moves in zip(values, moving, strict=True)
        )

    def _scheduled_isolation(self, step: jax.Array) -> tuple[float | jax.Array, ...]:
        """Returns the isolation of each boundary as `isolation` and its schedule say."""
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
        if self.last_exit_first:
            alone = self._last_exit_alone(step)
            *others, last = weights or (1.0,) * len(self.exits)
            weights = (*(jnp.where(alone, 0.0, weight) for weight in others), last)
        return TrainingLoss(self.objective, weights, self.distillation)

    def _last_exit_alone(self, step: jax.Array) -> jax.Array:
        """Returns whether the last exit alone is trained at a step (int32 []), bool []."""
        return step < self.last_exit_first * self.schedule.total

    def _linear(self, start: float, end: float, step: jax.Array) -> jax.Array:
        return start + (end - start) * step * self.schedule.per_step


class Schedule(NamedTuple):
    """Holds the numbers of steps as arguments of a compiled program, for runs of any length.

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
