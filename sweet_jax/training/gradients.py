"""Gradients of all exits' losses: in one backward pass, or segment by segment.

Shape letters: B batch, L length.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.early_exit import Isolation, SegmentState
from sweet_jax.models.ownership import SHARED, parameter_owners
from sweet_jax.training.losses import StepMetrics, compute_step_metrics, total_loss

Params = Any  # pure dict of float32 arrays; of a part of the model, None for all other arrays


def whole_gradients(
    graphdef: nnx.GraphDef, params: Params, batch: dict, isolation: Isolation, key
) -> tuple[Params, StepMetrics]:
    """Gradients of the summed loss, shaped like the parameters, and metrics: one backward pass.

    Args:
      graphdef, params: a model of early_exit.py.
      batch: input_ids, token_type_ids int32 [B, L], mask bool [B, L], labels int32 [B] (-1: the
        row is left out).
      isolation: of all boundaries, or of each.
      key: typed key of the dropout masks, None for none.

    """

    def total(params: Params):
        answer = nnx.merge(graphdef, params).forward(batch, isolation, key)
        metrics = compute_step_metrics(answer, batch["labels"])
        return total_loss(metrics), metrics

    return jax.grad(total, has_aux=True)(params)


def segment_gradients(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: dict,
    isolation: float,
    key,
    segments: tuple[int, ...] | None = None,
    carried: SegmentState | None = None,
    frozen: int = 0,
) -> tuple[Params, StepMetrics, SegmentState | None]:
    """The same as `whole_gradients` where no gradient crosses segments, one segment at a time.

    Forward and backward through a segment before the next one begins: only one segment's
    activations are alive. The barrier says so to the compiler, which else orders all forward passes
    first and needs as much memory as Early-Exit.

    Args:
      graphdef, params: a model of early_exit.py; of the parameters, those of `segments` at least.
      batch, key: as in `whole_gradients`.
      isolation: of every boundary.
      segments: their numbers, ascending, without a gap; None for all.
      carried: what the segment before them handed on, None for the first.
      frozen: so many first segments get no gradient.

    Returns:
      Gradients (None for what no one of these segments trains), their metrics, what they hand on.

    """
    model = nnx.merge(graphdef, fill_missing(params))
    exits, parts, found = model.exits, [], []
    owner_of = parameter_owners(params, exits, shared_relative=model.shared_relative)
    for index in range(len(exits)) if segments is None else segments:

        def loss(params: Params, carried=carried, index=index):
            model = nnx.merge(graphdef, fill_missing(params))
            carried, answer = model.segment(index, carried, batch, isolation, key)
            metrics = compute_step_metrics(answer, batch["labels"])
            return total_loss(metrics), (carried, metrics)

        if index < frozen:
            _, (carried, metrics) = loss(jax.lax.stop_gradient(params))
            own = jax.tree.map(lambda _: None, owner_of)
        else:
            every, (carried, metrics) = jax.grad(loss, has_aux=True)(params)
            # All else is exactly zero; None takes neither memory nor time.
            own = jax.tree.map(
                lambda o, g, e=exits[index]: g if o in (e, SHARED) else None, owner_of, every
            )
        carried, own = jax.lax.optimization_barrier((carried, own))
        parts.append(own)
        found.append(metrics)
    grads = jax.tree.map(_total, *parts, is_leaf=lambda x: x is None)
    return grads, jax.tree.map(lambda *x: jnp.stack(x), *found), carried


def _total(*parts: jax.Array | None) -> jax.Array | None:
    present = [part for part in parts if part is not None]
    return functools.reduce(jnp.add, present) if present else None


def fill_missing(params: Params) -> Params:
    """Parameters that a model can be made of: a zero stands where a part of them has None."""
    return jax.tree.map(
        lambda x: jnp.zeros(()) if x is None else x, params, is_leaf=lambda x: x is None
    )
