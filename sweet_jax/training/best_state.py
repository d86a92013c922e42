"""The best state of a training so far, selected by the area under the curve on tuning rows.

Shape letters: R replica, E exit, M tuning rows, C outputs of an exit (classes).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.distributed import broadcast_from_primary
from sweet_jax.exits.analysis import curve_area
from sweet_jax.exits.metrics import compute_metric, jackknife_error
from sweet_jax.exits.outputs import ExitOutputs, RunIdentity, layer_cost
from sweet_jax.exits.simulation import simulate
from sweet_jax.objectives import SINGLE_LABEL, Objective
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.job import TrainingJob
from sweet_jax.training.metrics import MetricsLog
from sweet_jax.training.parallel import ExecutionPlan, gather_params
from sweet_jax.training.sharding import add_replica_axis, drop_replica_axis, mesh_of, reshard
from sweet_jax.training.step import Params, State


class BestState(NamedTuple):
    """Holds the best parameters of every replica so far; checkpoints store it next to the state.

    With a single replica, arrays have no axis R, like those of the state.
    """

    params: Params  # best parameters [R, ...], on the devices
    area: Any  # float32 [R], the largest area so far; minus infinity before the first evaluation
    step: Any  # int32 [R], number of steps after which the best parameters were evaluated


def initial_best_state(params: Params, learning_rate: Any) -> BestState:
    """Returns the best state before the first evaluation, with the shape of learning_rate [R]."""
    shape = np.shape(learning_rate)
    return BestState(params, np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int32))


def update_best_state(
    best: BestState, params: Params, area: np.ndarray, error: np.ndarray, step: int
) -> BestState:
    """Returns the best state after an evaluation of `params`; the memory of `best` is reused.

    A replica's parameters become the best ones unless their area is more than one standard error
    below the largest area so far. Among states that the tuning rows cannot tell apart, this keeps
    the latest: it was trained on the most rows, and at the smallest learning rate. This is the one
    standard error rule (Breiman et al. 1984, section 3.4.3), applied to training instead of
    pruning.

    Args:
      best: best state so far.
      params: parameters [R, ...] after `step` steps, on the same devices as the best ones.
      area: area of `params` on the tuning rows, float [R].
      error: standard error of the area, float [R].
      step: number of steps taken.

    """
    largest, area = np.asarray(best.area), np.asarray(area, np.float32)
    better = area >= largest - error
    return BestState(
        # Leaf by leaf, because parts of a model may be on different devices.
        jax.tree.map(lambda new, old: _choose(better, new, old), params, best.params),
        np.maximum(area, largest),
        np.where(better, np.int32(step), np.asarray(best.step)).astype(np.int32),
    )


@functools.partial(jax.jit, donate_argnums=2)
def _choose(better: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(better.reshape(better.shape + (1,) * (new.ndim - better.ndim)), new, old)


def standard_error(
    area: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    metric: str,
    objective: Objective = SINGLE_LABEL,
) -> np.ndarray:
    """Returns the standard errors of areas on tuning rows, float64 [R].

    The error is computed with the metric's own formula (see `Metric`). For a metric without one, it
    is the error of the exits' mean metric (see `jackknife_error`).

    Args:
      area: areas [R]; the error of an area that is not finite is 0.
      logits, labels, metric, objective: see `tuning_area`.

    """
    chosen, sound = objective.metric(metric), np.isfinite(area)
    if chosen.standard_error is not None:
        errors = chosen.standard_error(np.where(sound, area, 0.0), labels.shape[1])
    else:
        rows = zip(objective.predict(logits), labels, strict=True)
        errors = np.asarray([jackknife_error(chosen, *row, logits.shape[-1]) for row in rows])
    return np.where(sound, errors, 0.0)


class BestStateTracker:
    """Tracks the best state of a training, on the devices and in its checkpoints."""

    def __init__(self, job: TrainingJob, graphdef: nnx.GraphDef, plan: ExecutionPlan, state: State):
        self._job, self._graphdef, self._plan = job, graphdef, plan
        self.best = initial_best_state(state.params, state.learning_rate)
        small = plan.shardings.learning_rate
        self.shardings = BestState(plan.shardings.params, small, small)
        self.log: MetricsLog | None = None  # None in a process that writes no log

    def saved(self, state: State) -> dict[str, Any]:
        """Returns the tree that a checkpoint stores."""
        return {"state": state, "best": reshard(self.best, self.shardings)}

    def evaluate(self, step: int, device_state: Any) -> None:
        """Evaluates a state and updates the best state.

        Args:
          step: number of steps taken.
          device_state: state as the plan's step takes it.

        """
        params = self._plan.from_devices(device_state).params
        area, by_exit, error = self._evaluate(params)
        area, error = broadcast_from_primary((area, error))
        if self.log is not None:
            self.log.add_tuning(step, area, by_exit)
        area, error = drop_replica_axis((area, error), len(area))
        self.best = update_best_state(self.best, params, area, error, step)

    def describe_kept(self, last: int) -> str:
        """Describes which states of a training of `last` steps are kept; "" if all are the last."""
        steps = np.atleast_1d(self.best.step)
        if (steps == last).all():
            return ""
        which = f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(map(str, steps))}"
        message = f"the model of {which} is kept"
        if not steps.any():
            message = "the encoder is kept as it was (step 0): fine-tuning did not help"
        return (
            f"{message}; on the tuning rows, later models, up to step {last}, were more than one "
            "standard error below the best"
        )

    def _evaluate(self, params: Params) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the area on tuning rows [R], each exit's metric [R, E] and the area's error [R].

        All are float64. The standard error is that of the larger area, the one of these parameters
        or the best one so far; for a metric without a formula, it is that of these parameters.
        """
        config, tokens, rows = self._job.config, self._job.tokens, self._job.tuning
        params = add_replica_axis(gather_params(config, params), len(rows))
        program = compile_evaluation(config, self._graphdef, mesh_of(params), features=config.tunes)
        output = evaluate(config, program, params, tokens, rows)
        exits, labels = self._job.model.exits, tokens.labels[rows]
        cost = layer_cost(exits, config.method)
        logits, objective = np.asarray(output.logits), self._job.objective
        metric = self._job.metric
        area = tuning_area(logits, labels, exits, cost, metric, objective)
        largest = np.maximum(area, np.reshape(self.best.area, area.shape), dtype=np.float32)
        error = standard_error(largest, logits, labels, metric, objective)
        return area, tuning_metrics(logits, labels, metric, objective), error


def tuning_area(
    logits: np.ndarray,
    labels: np.ndarray,
    layers: Any,
    cost: Any,
    metric: str,
    objective: Objective = SINGLE_LABEL,
) -> np.ndarray:
    """Returns the area under each replica's exact curve of metric against cost, float64 [R].

    Exits are chosen by the objective's `tuning_policy`, with confidences computed from uncalibrated
    logits, since no temperature has been fitted yet. The area is minus infinity if any logits are
    not finite.

    Args:
      logits: logits, float32 [R, E, M, C].
      labels: targets [R, M, ...].
      layers: layer numbers of the exits [E].
      cost: costs of the exits [E].
      metric: name of one of the objective's metrics.
      objective: objective that defines the meaning of the logits.

    """
    sound = np.isfinite(logits).all(axis=(1, 2, 3))
    identity = RunIdentity(metric=metric, objective=objective.name)
    finite = np.where(sound[:, None, None, None], logits, 0)
    outputs = ExitOutputs(finite, labels, layers, cost, identity=identity)
    curve = simulate(outputs, objective.tuning_policy)
    areas = [curve_area(c, s) for c, s in zip(curve.cost, curve.score, strict=True)]
    return np.where(sound, areas, -np.inf)


def tuning_metrics(
    logits: np.ndarray, labels: np.ndarray, metric: str, objective: Objective = SINGLE_LABEL
) -> np.ndarray:
    """Returns the metric of each exit by itself, float64 [R, E]; see `tuning_area` for the args."""
    chosen, outputs = objective.metric(metric), logits.shape[-1]
    return np.asarray(
        [
            [compute_metric(chosen, objective.predict(exit), targets, outputs) for exit in replica]
            for replica, targets in zip(logits, labels, strict=True)
        ]
    )
