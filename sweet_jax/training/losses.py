"""The loss that training minimises, and the metrics of a step: pure functions of one replica.

Shape letters: E exit, B batch.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sweet_jax.models.early_exit import ModelOutput
from sweet_jax.objectives.objective import Objective, masked_mean
from sweet_jax.objectives.single_label import SINGLE_LABEL

Weight = float | jax.Array  # of one exit's loss


@dataclasses.dataclass(frozen=True)
class TrainingLoss:
    """Defines the loss that is differentiated: the weighted sum of the exits' losses."""

    objective: Objective = SINGLE_LABEL  # compares the outputs of an exit with targets
    # E of them; () for 1 throughout. Python numbers where they are constant: a weight of 1 is then
    # no operation of the program.
    weights: tuple[Weight, ...] = ()


class StepMetrics(NamedTuple):
    """Holds a step's logged values, unweighted and before its update; of one exit, without E."""

    loss: jax.Array  # float32 [E], mean over the rows
    predicted: jax.Array  # int32 [E], the one prediction of all rows, or -1: see Objective
    exit_loss: jax.Array | None = None  # float32 [E], learning-to-exit's mean squared error
    conflict: jax.Array | None = None  # float32 [E, E, E], where measured: see conflict.py


def compute_step_metrics(
    output: ModelOutput, batch: dict[str, jax.Array], objective: Objective = SINGLE_LABEL
) -> StepMetrics:
    """Returns the metrics of the outputs [E, ...] of a batch (or of one exit's).

    batch: labels, the targets [B, ...] of the objective, and row_mask bool [B]: which rows are no
    padding.
    """
    logits, scores = output.logits, output.exit_scores
    labels, row_mask = batch["labels"], batch["row_mask"]
    exit_loss = None
    if scores is not None:
        judge = objective.exit_target or objective.is_correct
        exit_loss = mean_exit_loss(judge(logits, labels), scores, row_mask)
    loss = objective.mean_loss(logits, labels, row_mask)
    return StepMetrics(loss, objective.constant_prediction(logits, row_mask), exit_loss)


def total_loss(metrics: StepMetrics, weights: tuple[Weight, ...] = ()) -> jax.Array:
    """Returns what training minimises, float32 []: the weighted sum over exits of their losses.

    Learning-to-exit's squared error is a part of its exit's loss, with a weight of 1 in it (Xin et
    al. 2021). Of metrics of one exit, without the axis E, weights has one number.
    """
    loss, exit_loss = metrics.loss, metrics.exit_loss
    if not all(isinstance(w, float) and w == 1 for w in weights):
        factors = jnp.stack([jnp.asarray(w, jnp.float32) for w in weights])  # [E]
        factors = factors.reshape(loss.shape)
        loss = factors * loss
        exit_loss = None if exit_loss is None else factors * exit_loss
    return loss.sum() if exit_loss is None else loss.sum() + exit_loss.sum()


def mean_exit_loss(correct: jax.Array, scores: jax.Array, row_mask: jax.Array) -> jax.Array:
    """Returns the squared error of scores [..., B] against 1 where the exit is right, else 0.

    Averaged over the rows of row_mask bool [B] (learning to exit, Xin et al. 2021). No gradient
    goes through `correct`, bool [..., B] (of regression float, see `Objective.exit_target`), which
    follows from the exit's own logits.
    """
    return masked_mean((scores - jax.lax.stop_gradient(correct)) ** 2, row_mask)
