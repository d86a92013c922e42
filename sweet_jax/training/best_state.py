"""The best state of a training so far, by the area under the curve on tuning rows.

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
    """Holds the best parameters so far of every replica; checkpoints have it beside the state.

    Of a single replica, arrays without the axis R, as its state is.
    """

    params: Params  # [R, ...] that are kept, on the devices
    area: Any  # float32 [R], the largest so far; minus infinity before the first evaluation
    step: Any  # int32 [R], steps taken by the parameters that are kept


def initial_best_state(params: Params, learning_rate: Any) -> BestState:
    """Returns the best before the first evaluation; learning_rate [R] gives the shapes."""
    shape = np.shape(learning_rate)
    return BestState(params, np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int32))


def update_best_state(
    best: BestState, params: Params, area: np.ndarray, error: np.ndarray, step: int
) -> BestState:
    """Returns the best after an evaluation of `params`; the old best's memory is taken.

    A replica's parameters replace those kept unless their area is more than a standard error below
    the largest so far. Of states that so few rows cannot tell apart the latest is kept: it has seen
    most of the training rows, and at the smallest learning rate. This is the rule of one standard
    error (Breiman et al. 1984, section 3.4.3), with training in the place of pruning.

    Args:
      best: so far.
      params: [R, ...] after so many steps, on the devices of the best's.
      area, error: float [R], theirs on tuning rows, and its standard error.
      step: number of steps.

    """
    largest, area = np.asarray(best.area), np.asarray(area, np.float32)
    better = area >= largest - error
    return BestState(
        # Leaf by leaf: parts of a model may be on devices of their own.
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
    """Returns the standard errors of areas on tuning rows, float64 [R]; 0 for minus infinity.

    As the metric's own formula says, see `Metric`; where it has none, that of the mean of the exits
    by themselves, see `jackknife_error`. Arguments as in `tuning_area`, and the areas [R].
    """
    chosen, sound = objective.metric(metric), np.isfinite(area)
    if chosen.standard_error is not None:
        found = chosen.standard_error(np.where(sound, area, 0.0), labels.shape[1])
    else:
        rows = zip(objective.predict(logits), labels, strict=True)
        found = np.asarray([jackknife_error(chosen, *row, logits.shape[-1]) for row in rows])
    return np.where(sound, found, 0.0)


class BestStateTracker:
    """Keeps the best state of a training, on the devices and in its checkpoints."""

    def __init__(self, job: TrainingJob, graphdef: nnx.GraphDef, plan: ExecutionPlan, state: State):
        self._job, self._graphdef, self._plan = job, graphdef, plan
        self.best = initial_best_state(state.params, state.learning_rate)
        small = plan.shardings.learning_rate
        self.shardings = BestState(plan.shardings.params, small, small)
        self.log: MetricsLog | None = None  # None where this process writes none

    def saved(self, state: State) -> dict[str, Any]:
        """Returns the tree that a checkpoint holds."""
        return {"state": state, "best": reshard(self.best, self.shardings)}

    def evaluate(self, step: int, parts: Any) -> None:
        """Evaluates the state after so many steps, and keeps it where it is the best.

        parts: the state as the plan's step takes it.
        """
        params = self._plan.from_devices(parts).params
        area, by_exit, error = self._evaluate(params)
        area, error = broadcast_from_primary((area, error))
        if self.log is not None:
            self.log.add_tuning(step, area, by_exit)
        area, error = drop_replica_axis((area, error), len(area))
        self.best = update_best_state(self.best, params, area, error, step)

    def describe_kept(self, last: int) -> str:
        """Says which states of a training of `last` steps are kept; "" where all are the last."""
        steps = np.atleast_1d(self.best.step)
        if (steps == last).all():
            return ""
        which = f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(map(str, steps))}"
        kept = f"the model of {which} is kept"
        if not steps.any():
            kept = "the encoder is kept as it was (step 0): fine-tuning was no gain"
        return (
            f"{kept}; on the tuning rows later ones, of {last} steps in all, were below the best "
            "by more than a standard error"
        )

    def _evaluate(self, params: Params) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the area on tuning rows, each exit's metric and the standard error of an area.

        float64 [R], [R, E] and [R]; the error of the larger area, of these parameters or the best.
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
    """Returns the area under each replica's exact curve by confidence, float64 [R].

    Confidences are those of the logits as they are, by the objective's `tuning_policy`: no
    temperature is fitted yet. Minus infinity where logits are not finite.

    Args:
      logits, labels: float32 [R, E, M, C], and the targets [R, M, ...].
      layers, cost: of the exits [E].
      metric: name of one of the objective's.
      objective: what the logits mean.

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
    """Returns the metric of every exit by itself, float64 [R, E]; arguments as in `tuning_area`."""
    chosen, outputs = objective.metric(metric), logits.shape[-1]
    return np.asarray(
        [
            [compute_metric(chosen, objective.predict(exit), own, outputs) for exit in replica]
            for replica, own in zip(logits, labels, strict=True)
        ]
    )
