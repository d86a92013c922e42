"""What training minimises, and what a step reports: pure functions of one replica's answers.

Shape letters: E exit, B batch, C classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sweet_jax.models.early_exit import ModelOutput


class StepMetrics(NamedTuple):
    """What a step reports, measured before its update; of one exit, arrays without E."""

    loss: jax.Array  # float32 [E], mean cross-entropy
    predicted: jax.Array  # int32 [E], the class if the batch was given one only, else -1
    exit_loss: jax.Array | None = None  # float32 [E], learning-to-exit's mean squared error
    conflict: jax.Array | None = None  # float32 [E, E, E], where measured: see conflict.py


def compute_step_metrics(answer: ModelOutput, labels: jax.Array) -> StepMetrics:
    """Losses and predictions of answers [E, ...] (or of one exit's) to labels int32 [B]."""
    logits, scores = answer.logits, answer.exit_scores
    exit_loss = None if scores is None else mean_exit_loss(logits, scores, labels)
    return StepMetrics(mean_loss(logits, labels), single_predicted_class(logits, labels), exit_loss)


def total_loss(metrics: StepMetrics) -> jax.Array:
    """What training minimises, float32 []: the sum of all losses, of every exit."""
    total = metrics.loss.sum()
    return total if metrics.exit_loss is None else total + metrics.exit_loss.sum()


def mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of logits [..., B, C] averaged over the rows of labels [B] that are not -1."""
    labels = jnp.broadcast_to(labels, logits.shape[:-1])  # [..., B]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return _mean_of_present(losses, labels)


def mean_exit_loss(logits: jax.Array, scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Squared error of scores [..., B] against 1 where the logits' class is right, else 0.

    Averaged over the rows of labels [B] that are not -1 (learning to exit, Xin et al. 2021). The
    target follows from the exit's own logits [..., B, C], and no gradient goes through it.
    """
    labels = jnp.broadcast_to(labels, scores.shape)  # [..., B]
    right = jax.lax.stop_gradient(logits.argmax(axis=-1) == labels)
    return _mean_of_present((scores - right) ** 2, labels)


def _mean_of_present(values: jax.Array, labels: jax.Array) -> jax.Array:
    present = labels >= 0
    return jnp.where(present, values, 0).sum(axis=-1) / jnp.maximum(present.sum(axis=-1), 1)


def single_predicted_class(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The one class that logits [..., B, C] give to all rows, or -1; int32 [...].

    Rows whose label [B] is -1 do not count.
    """
    classes = logits.argmax(axis=-1)  # [..., B]
    present = jnp.broadcast_to(labels, classes.shape) >= 0
    low = jnp.where(present, classes, logits.shape[-1]).min(axis=-1)
    high = jnp.where(present, classes, -1).max(axis=-1)
    return jnp.where(low == high, low, -1).astype(jnp.int32)
