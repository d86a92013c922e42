"""The constants of a compiled training step, and the schedules that depend on the step.

Shape letters: E exit.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.config import Config
from sweet_jax.methods import loss_weights
from sweet_jax.models.ownership import Owners
from sweet_jax.objectives.objective import Objective
from sweet_jax.objectives.single_label import SINGLE_LABEL
from sweet_jax.optimizers import (
    LEARNING_RATE_SCHEDULES,
    OPTIMIZERS,
    GradientTransformation,
    LearningRateSchedule,
)
from sweet_jax.training.losses import Distillation, TrainingLoss
from sweet_jax.training.schedule import search_steps, training_steps
from sweet_jax.training.transformations import ADAM, linear


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Holds the constants of a compiled training step."""

    graphdef: nnx.GraphDef  # structure of the model
    exits: tuple[int, ...]  # layer numbers of the E exits
    total_steps: int  # number of steps of the whole training
    warmup_steps: int
    weight_decay: float  # decoupled weight decay, applied to matrices only
    clip_norm: float  # maximum norm of a gradient; infinity for no gradient clipping
    clip_by_owner: bool  # one norm for each owner of parameters, instead of one for all parameters
    isolation: tuple[float, ...]  # isolation of the boundaries: (value,) or (start, end)
    isolation_schedule: str = "linear"  # or "step", which switches halfway through training
    boundary_isolation: tuple[float, ...] = ()  # factors for the E - 1 boundaries; () means 1
    # Weight of each exit's loss at the first and at the last step, linear in between; () means 1.
    loss_weights: tuple[tuple[float, float], ...] = ()
    # Share of the steps, at the start, that train only the last exit, with all boundaries open.
    last_exit_first: float = 0.0
    distillation: Distillation | None = None  # what the other exits learn from the last one
    objective: Objective = SINGLE_LABEL  # training objective of the exits
    learning_to_exit: str = ""  # or "joint", "detached"
    shared_relative: bool = False  # whether every exit trains the table of relative positions
    owners: Owners = ()  # exits that train the groups of parameters that the family declares
    frozen: int = 0  # number of segments, counted from the first, that are not trained
    optimizer: GradientTransformation = ADAM
    learning_rate_schedule: LearningRateSchedule = linear
    head_learning_rate: float = 1.0  # learning rate of the heads, relative to the base rate
    layer_decay: float = 1.0  # learning rate of a layer, relative to the layer above it
    # The step counts as arguments of the compiled program, replacing the constants above.
    traced: "Schedule | None" = None

    @property
    def schedule(self) -> "Schedule":
        """Returns the step counts that the training step uses."""
        return self.traced or make_schedule(self.total_steps, self.warmup_steps)

    def isolation_at(self, step: jax.Array) -> tuple[float | jax.Array, ...]:
        """Returns the isolation of each of the E - 1 boundaries at a step (int32 []).

        A constant isolation is returned as a Python number. `isolate` handles the Python numbers 0
        and 1 exactly, so a boundary that is always closed lets no gradient through at all.
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
        """Returns the isolation of each boundary according to `isolation` and its schedule."""
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
        """Returns the loss at a step (int32 []); constant weights are Python numbers."""
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
        """Returns whether only the last exit is trained at a step (int32 []), bool []."""
        return step < self.last_exit_first * self.schedule.total

    def _linear(self, start: float, end: float, step: jax.Array) -> jax.Array:
        return start + (end - start) * step * self.schedule.per_step


class Schedule(NamedTuple):
    """Holds step counts as arguments of a compiled program, which then serves runs of any length.

    Divisors are stored as reciprocals because XLA turns a division by a constant into a
    multiplication. Results are therefore the same whether the counts are arguments or constants.
    """

    total: Any  # int32 []
    warmup: Any  # int32 []
    per_step: Any  # float32 [], 1 / (total - 1)
    per_warmup_step: Any  # float32 []
    per_decay_step: Any  # float32 []


def make_schedule(total: int, warmup: int) -> Schedule:
    """Returns the schedule of a run with `total` steps, of which the first `warmup` are warm-up."""
    lengths = (total - 1, warmup, total - warmup)
    reciprocals = (np.float32(1) / np.float32(max(1, length)) for length in lengths)
    return Schedule(np.int32(total), np.int32(warmup), *reciprocals)


def step_settings(
    config: Config,
    graphdef: nnx.GraphDef,
    exits: tuple[int, ...],
    rows: int,
    *,
    short: bool = False,
    frozen: int = 0,
    owners: Owners = (),
) -> StepSettings:
    """Returns the constants of the training step.

    Args:
      config: resolved config.
      graphdef: structure of the model.
      exits: layer numbers of the exits.
      rows: number of training rows.
      short: see `TrainingJob`.
      frozen, owners: see `StepSettings`.

    """
    total = training_steps(config.epochs, rows, config.batch_size)
    if short:
        total = search_steps(total)
    weights = loss_weights(config.loss_weights, config.exits)
    of_exit = dict(zip(config.exits, weights, strict=True))
    distillation = None
    if config.distillation:
        distillation = Distillation(config.distillation, config.distillation_temperature)
    return StepSettings(
        graphdef=graphdef,
        exits=exits,
        total_steps=total,
        warmup_steps=int(config.warmup_fraction * total),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        clip_by_owner=config.clipping == "owner",
        isolation=config.isolation,
        isolation_schedule=config.isolation_schedule,
        boundary_isolation=config.boundary_isolation,
        loss_weights=tuple(of_exit[e] for e in exits),
        last_exit_first=config.last_exit_first,
        distillation=distillation,
        learning_to_exit=config.learning_to_exit,
        shared_relative=config.relative == "shared",
        owners=owners,
        frozen=frozen,
        head_learning_rate=config.head_learning_rate,
        layer_decay=config.layer_decay,
        optimizer=OPTIMIZERS[config.optimizer],
        learning_rate_schedule=LEARNING_RATE_SCHEDULES[config.learning_rate_schedule],
    )
