"""Gradients of all exits' losses, computed in one backward pass or segment by segment.

Shape letters: E exit, B batch, L length.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.early_exit import Isolation, SegmentState
from sweet_jax.models.ownership import SHARED, parameter_owners
from sweet_jax.training.losses import (
    StepMetrics,
    TrainingLoss,
    compute_step_metrics,
    distillation_loss,
    total_loss,
)

Params = Any  # pure dict of float32 arrays; None for the arrays outside a part of the model
_EXIT_LOSS = TrainingLoss()


class Segments(NamedTuple):
    """Selects consecutive segments of a model that are trained together."""

    numbers: tuple[int, ...] | None = None  # ascending from 0 or later, without gaps; None for all
    carried: SegmentState | None = None  # output of the segment before, None for the first segment
    frozen: int = 0  # number of segments, counted from the first, that get no gradient


def whole_gradients(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: dict[str, jax.Array],
    isolation: Isolation,
    key: jax.Array | None,
    loss: TrainingLoss = _EXIT_LOSS,
) -> tuple[Params, StepMetrics]:
    """Computes the gradient of the weighted sum of the losses in one backward pass.

    Args:
      graphdef, params: structure and parameters of an `EarlyExit` model.
      batch: batch as in `train_step`.
      isolation: isolation of all boundaries, or a tuple with one value for each.
      key: typed key for the dropout masks, None for no dropout.
      loss: loss to differentiate.

    Returns:
      The gradients, a tree like `params`, and the metrics of the step.

    """

    def total(params: Params) -> tuple[jax.Array, StepMetrics]:
        output = nnx.merge(graphdef, params).forward(batch, isolation, key)
        metrics = compute_step_metrics(output, batch, loss.objective)
        if loss.distillation is not None:
            students, teacher = output.logits[:-1], output.logits[-1]
            losses = distillation_loss(loss, students, teacher, batch["row_mask"])  # [E - 1]
            metrics = metrics._replace(distillation=jnp.append(losses, 0.0))
        return total_loss(metrics, loss), metrics

    return jax.grad(total, has_aux=True)(params)


def segment_gradients(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    loss: TrainingLoss = _EXIT_LOSS,
    segments: Segments = Segments(),  # noqa: B008 - immutable
) -> tuple[Params, StepMetrics, SegmentState | None]:
    """Computes the same as `whole_gradients` with isolation 1, but one segment at a time.

    The backward pass of a segment runs before the forward pass of the next one, so that only one
    segment's activations are in memory. Optimization barriers enforce this order: without them, the
    compiler runs all forward passes first and needs as much memory as Early-Exit. For distillation,
    the last exit's outputs come from a separate forward pass with the same dropout masks.

    Args:
      graphdef, params: structure and parameters of an `EarlyExit` model, with at least the
        parameters of `segments`.
      batch, key, loss: see `whole_gradients`; with distillation, `segments` must select all.
      segments: segments to compute.

    Returns:
      The gradients (None for parameters that none of these segments trains), the metrics of these
      segments' exits, and the output of the last of these segments for the next one.

    """
    model = nnx.merge(graphdef, fill_missing(params))
    exits, carried = model.exits, segments.carried
    config = model.config
    owner_of = parameter_owners(
        params, exits, shared_relative=config.shared_relative, owners=config.owners
    )
    grads_by_segment, metrics_by_segment = [], []
    if loss.distillation is not None:
        teacher = model.forward(batch, 1.0, key).logits[-1]
        # The segments start only after that pass, so that its activations need no memory then.
        params, teacher = jax.lax.optimization_barrier((params, teacher))
        batch = batch | {"teacher": teacher}
    for index in range(len(exits)) if segments.numbers is None else segments.numbers:
        last = index == len(exits) - 1
        segment_loss = _segment_loss(graphdef, batch, key, loss, index, last=last)
        if index < segments.frozen:
            _, (carried, metrics) = segment_loss(jax.lax.stop_gradient(params), carried)
            segment_grads = jax.tree.map(lambda _: None, owner_of)
        else:
            every, (carried, metrics) = jax.grad(segment_loss, has_aux=True)(params, carried)
            # All other gradients are exactly zero; None takes neither memory nor time.
            segment_grads = jax.tree.map(
                lambda o, g, e=exits[index]: g if o in (e, SHARED) else None, owner_of, every
            )
        carried, segment_grads = jax.lax.optimization_barrier((carried, segment_grads))
        grads_by_segment.append(segment_grads)
        metrics_by_segment.append(metrics)
    grads = jax.tree.map(_sum_present, *grads_by_segment, is_leaf=lambda x: x is None)
    return grads, jax.tree.map(lambda *x: jnp.stack(x), *metrics_by_segment), carried


def _segment_loss(
    graphdef: nnx.GraphDef,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    loss: TrainingLoss,
    index: int,
    *,
    last: bool,
) -> Callable:
    """Returns a function (params, carried) → (loss of the segment, (output, metrics))."""
    single_exit_loss = dataclasses.replace(loss, weights=loss.weights[index : index + 1])

    def segment_loss(params: Params, carried: SegmentState | None):
        model = nnx.merge(graphdef, fill_missing(params))
        carried, output = model.segment(index, carried, batch, 1.0, key)
        metrics = compute_step_metrics(output, batch, loss.objective)
        if loss.distillation is not None:
            rows, distillation = batch["row_mask"], jnp.zeros(())
            if not last:
                distillation = distillation_loss(loss, output.logits, batch["teacher"], rows)
            metrics = metrics._replace(distillation=distillation)
        return total_loss(metrics, single_exit_loss), (carried, metrics)

    return segment_loss


def _sum_present(*terms: jax.Array | None) -> jax.Array | None:
    present = [term for term in terms if term is not None]
    return functools.reduce(jnp.add, present) if present else None


def fill_missing(params: Params) -> Params:
    """Returns parameters with scalar zeros in place of None, so that a model can be built."""
    return jax.tree.map(
        lambda x: jnp.zeros(()) if x is None else x, params, is_leaf=lambda x: x is None
    )
