"""The loss that training minimises, and the metrics of a step: pure functions of one replica.

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

Weight = float | jax.Array  # of one exit's loss


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Defines what every exit but the last learns from the last exit's answer."""

    weight: float  # of the divergence in the loss of its exit
    temperature: float = 1.0  # of both answers


@dataclasses.dataclass(frozen=True)
class TrainingLoss:
    """Defines the loss that is differentiated: the weighted sum of the exits' losses."""

    objective: Objective = SINGLE_LABEL  # compares the outputs of an exit with targets
    # E of them; () for 1 throughout. Python numbers where they are constant: a weight of 1 is then
    # no operation of the program.
    weights: tuple[Weight, ...] = ()
    distillation: Distillation | None = None


class StepMetrics(NamedTuple):
    """Holds a step's logged values, unweighted and before its update; of one exit, without E."""

    loss: jax.Array  # float32 [E], mean over the rows
    predicted: jax.Array  # int32 [E], the one prediction of all rows, or -1: see Objective
    exit_loss: jax.Array | None = None  # float32 [E], learning-to-exit's mean squared error
    conflict: jax.Array | None = None  # float32 [E, E, E], where measured: see conflict.py
    distillation: jax.Array | None = None  # float32 [E], the divergence from the last exit's answer


def compute_step_metrics(
    output: ModelOutput, batch: dict[str, jax.Array], objective: Objective = SINGLE_LABEL
) -> StepMetrics:
    """Returns the metrics of the outputs [E, ...] of a batch (or of one exit's).

    batch: labels, the targets [B, ...] of the objective, and which rows count: see `labeled_rows`.
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
    """Returns the rows of a batch that have labels, bool [B]: all but padding where none lacks one.

    batch: row_mask bool [B], which rows are no padding; labeled bool [B] where some have no label.
    """
    return batch.get("labeled", batch["row_mask"])


def distillation_loss(
    loss: TrainingLoss, logits: jax.Array, teacher: jax.Array, row_mask: jax.Array
) -> jax.Array:
    """Computes how far exits are from the last exit's answer, float32 [...], the mean over rows.

    T^2 KL(softmax(teacher / T) || softmax(logits / T)) at the temperature T (Phuong and Lampert
    2019, ICCV, whose cross-entropy has the same gradient), averaged over the categorical variables
    of the objective: C of two outcomes where a row has several labels. Where outputs are numbers,
    the objective's loss against the last exit's prediction. No gradient reaches the teacher.

    Args:
      loss: with a distillation.
      logits, teacher: of exits [..., B, C], and of the last exit [B, C].
      row_mask: bool [B], which rows are no padding; they need no labels.

    """
    assert loss.distillation is not None
    objective, temperature = loss.objective, loss.distillation.temperature
    teacher = jax.lax.stop_gradient(teacher)
    if objective.categorical is None:
        rows = objective.row_loss(logits, objective.predict(teacher))
    else:
        variables = objective.categorical.logits
        teacher = jnp.broadcast_to(teacher, logits.shape)
        wanted, own = (
            jax.nn.log_softmax(variables(x / temperature)) for x in (teacher, logits)
        )  # [..., B, V, K]
        divergence = (jnp.exp(wanted) * (wanted - own)).sum(axis=-1)  # [..., B, V]
        rows = temperature**2 * divergence.mean(axis=-1)
    return masked_mean(rows, row_mask)


def total_loss(metrics: StepMetrics, loss: TrainingLoss) -> jax.Array:
    """Returns what training minimises, float32 []: the weighted sum over exits of their losses.

    Learning-to-exit's squared error is a part of its exit's loss, with a weight of 1 in it (Xin et
    al. 2021), and so is distillation, with its own. Of metrics of one exit, without the axis E,
    loss.weights has one number.
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
    """Returns the squared error of scores [..., B] against 1 where the exit is right, else 0.

    Averaged over the rows of row_mask bool [B] (learning to exit, Xin et al. 2021). No gradient
    goes through `correct`, bool [..., B] (of regression float, see `Objective.exit_target`), which
    follows from the exit's own logits.
    """
    return masked_mean((scores - jax.lax.stop_gradient(correct)) ** 2, row_mask)
