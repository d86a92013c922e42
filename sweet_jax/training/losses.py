"""The training loss and the metrics of a step, as pure functions of one replica.

Shape letters: E exit, B batch, C outputs of an exit (classes), V categorical variables with K
outcomes each.
"""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sweet_jax.models.early_exit import ModelOutput
from sweet_jax.objectives.objective import Objective, masked_mean
from sweet_jax.objectives.single_label import SINGLE_LABEL

Weight = float | jax.Array  # weight of one exit's loss


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Defines what every exit except the last learns from the last exit's outputs."""

    weight: float  # weight of the divergence in the loss of its exit
    temperature: float = 1.0  # temperature of both exits' outputs


@dataclasses.dataclass(frozen=True)
class TrainingLoss:
    """Defines the training loss: the weighted sum of the exits' losses."""

    objective: Objective = SINGLE_LABEL  # compares the outputs of an exit with the targets
    # One weight for each of the E exits; () means 1. Constant weights are Python numbers, so that a
    # weight of 1 adds no operation to the program.
    weights: tuple[Weight, ...] = ()
    distillation: Distillation | None = None


class StepMetrics(NamedTuple):
    """Holds a step's logged values, unweighted and before its update; one exit has no axis E."""

    loss: jax.Array  # float32 [E], mean over the rows
    predicted: jax.Array  # int32 [E], the only prediction for all rows, or -1: see Objective
    exit_loss: jax.Array | None = None  # float32 [E], mean squared error of learning-to-exit
    conflict: jax.Array | None = None  # float32 [E, E, E], if measured: see conflict.py
    distillation: jax.Array | None = None  # float32 [E], divergence from the last exit's outputs


def compute_step_metrics(
    output: ModelOutput, batch: dict[str, jax.Array], objective: Objective = SINGLE_LABEL
) -> StepMetrics:
    """Returns the metrics of a batch.

    Args:
      output: outputs of all exits [E, ...], or of one exit without the axis E.
      batch: labels [B, ...], the targets of the objective, and the masks that `labeled_rows` reads.
      objective: objective that compares outputs with targets.

    """
    logits, scores = output.logits, output.exit_scores
    labels, row_mask = batch["labels"], labeled_rows(batch)
    exit_loss = None
    if scores is not None:
        judge = objective.exit_target or objective.is_correct
        exit_loss = mean_exit_loss(judge(logits, labels), scores, row_mask)
    loss = objective.mean_loss(logits, labels, row_mask)
    return StepMetrics(loss, objective.constant_prediction(logits, row_mask), exit_loss)


def labeled_rows(batch: dict[str, jax.Array]) -> jax.Array:
    """Returns which rows of a batch have labels, bool [B].

    Args:
      batch: row_mask bool [B], False for padding rows; and, if some rows have no labels, labeled
        bool [B]. Without it, all rows except padding have labels.

    """
    return batch.get("labeled", batch["row_mask"])


def distillation_loss(
    loss: TrainingLoss, logits: jax.Array, teacher: jax.Array, row_mask: jax.Array
) -> jax.Array:
    """Returns the divergence of exits from the last exit, averaged over rows, float32 [...].

    The divergence is T^2 KL(softmax(teacher / T) || softmax(logits / T)) at temperature T (Phuong
    and Lampert 2019, ICCV, whose cross-entropy has the same gradient), averaged over the
    categorical variables of the objective; a multi-label objective has C variables with two
    outcomes each. For regression, it is the objective's loss with the last exit's prediction as the
    target. No gradient reaches the teacher.

    Args:
      loss: training loss that includes distillation.
      logits: logits of the exits [..., B, C].
      teacher: logits of the last exit [B, C].
      row_mask: False for padding rows, bool [B]; rows need no labels.

    """
    assert loss.distillation is not None
    objective, temperature = loss.objective, loss.distillation.temperature
    teacher = jax.lax.stop_gradient(teacher)
    if objective.categorical is None:
        rows = objective.row_loss(logits, objective.predict(teacher))
    else:
        variables = objective.categorical.logits
        teacher = jnp.broadcast_to(teacher, logits.shape)
        log_target, log_pred = (
            jax.nn.log_softmax(variables(x / temperature)) for x in (teacher, logits)
        )  # [..., B, V, K]
        divergence = (jnp.exp(log_target) * (log_target - log_pred)).sum(axis=-1)  # [..., B, V]
        rows = temperature**2 * divergence.mean(axis=-1)
    return masked_mean(rows, row_mask)


def total_loss(metrics: StepMetrics, loss: TrainingLoss) -> jax.Array:
    """Returns the training loss, float32 []: the weighted sum of the exits' losses.

    The loss of an exit includes the squared error of learning-to-exit, with a weight of 1 (Xin et
    al. 2021), and distillation, with its own weight. If `metrics` are those of one exit, without
    the axis E, `loss.weights` has at most one element.
    """
    terms = [metrics.loss]
    if metrics.exit_loss is not None:
        terms.append(metrics.exit_loss)
    if loss.distillation is not None and metrics.distillation is not None:
        terms.append(loss.distillation.weight * metrics.distillation)
    if not all(isinstance(w, float) and w == 1 for w in loss.weights):
        factors = jnp.stack([jnp.asarray(w, jnp.float32) for w in loss.weights])  # [E]
        factors = factors.reshape(metrics.loss.shape)
        terms = [factors * term for term in terms]
    return functools.reduce(operator.add, [term.sum() for term in terms])


def mean_exit_loss(correct: jax.Array, scores: jax.Array, row_mask: jax.Array) -> jax.Array:
    """Returns the mean squared error of learning-to-exit (Xin et al. 2021).

    No gradient flows through `correct`, which is computed from the exit's own logits.

    Args:
      correct: target of the scores, bool [..., B]: whether the exit is right. For regression it is
        a float, see `Objective.exit_target`.
      scores: scores of learning-to-exit [..., B].
      row_mask: rows to average over, bool [B].

    """
    return masked_mean((scores - jax.lax.stop_gradient(correct)) ** 2, row_mask)
