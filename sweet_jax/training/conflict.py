"""Conflict between the exits' gradients in the layers they share (SWEET paper, figures 3 and 9).

Shape letters: E exit, B batch, L length, H hidden, F feed-forward.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.early_exit import Isolation
from sweet_jax.objectives.objective import Objective
from sweet_jax.objectives.single_label import SINGLE_LABEL
from sweet_jax.training.losses import labeled_rows
from sweet_jax.training.settings import StepSettings
from sweet_jax.training.step import Params, State, dropout_key


class GradientComparison(NamedTuple):
    """Compares the exits' gradients with respect to W, the last feed-forward matrix of a layer.

    Attributes:
      cosines: cosines between gradients, float32 [E, E, E]. Entry [i, j, k] is for W in exit i's
        layer: the mean over output units (columns of W [F, H], rows of torch's matrix) of the
        cosine between those of dL_j/dW and dL_k/dW. 1 means full agreement, and negative values
        mean conflict. An entry is NaN if exit j or k is below exit i, because its loss does not
        depend on W, or if isolation blocks the gradient. Loss weights do not change a cosine.
      norms: norms of the gradients, float32 [E, E]. Entry [i, j] is the Frobenius norm of dL_j/dW
        in exit i's layer, and is 0 if the loss does not depend on W.
      losses: losses L_j, averaged over the batch, float32 [E].

    """

    cosines: jax.Array
    norms: jax.Array
    losses: jax.Array


def compare_gradients(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: dict[str, jax.Array],
    key: jax.Array | None = None,
    isolation: Isolation = 0.0,
    objective: Objective = SINGLE_LABEL,
) -> GradientComparison:
    """Measures how well the exits' gradients agree in each exit's layer, and how large they are.

    This takes one forward pass, and one backward pass for each exit with respect to only these E
    matrices.

    Args:
      graphdef, params: structure and parameters of an `EarlyExit` model.
      batch, key, isolation: see `whole_gradients`.
      objective: objective that defines the losses.

    """
    exits = nnx.merge(graphdef, params).exits

    def losses(matrices: list[jax.Array]) -> jax.Array:
        logits = nnx.merge(graphdef, _put(params, exits, matrices))(batch, isolation, key)
        return objective.mean_loss(logits, batch["labels"], labeled_rows(batch))  # [E]

    layers = params["encoder"]["layers"]
    values, backward = jax.vjp(losses, [layers[e - 1]["output"]["kernel"] for e in exits])
    # Backward passes run one after the other, not with vmap, so that memory for one is enough.
    grads = [backward(cotangent)[0] for cotangent in jnp.eye(len(exits))]  # [E][E] of [F, H]
    pairs = []
    for i in range(len(exits)):
        units = jnp.stack([_unit_rows(grads[j][i]) for j in range(i, len(exits))])  # [E - i, F, H]
        cosines = jnp.einsum("jfh,kfh->jkh", units, units)  # [E - i, E - i, H]
        pairs.append(jnp.pad(jnp.nanmean(cosines, axis=-1), (i, 0), constant_values=jnp.nan))
    norms = [[jnp.linalg.norm(grads[j][i]) for j in range(len(exits))] for i in range(len(exits))]
    return GradientComparison(jnp.stack(pairs), jnp.asarray(norms), values)


def conflict_step(settings: StepSettings, state: State, batch: dict) -> jax.Array:
    """Returns the cosines between the gradients of a training step, float32 [E, E, E].

    Only the losses on labels are compared: distillation is left out.

    Args:
      settings, state, batch: see `train_step`.

    """
    isolation, key = settings.isolation_at(state.step), dropout_key(state)
    graphdef, objective = settings.graphdef, settings.objective
    return compare_gradients(graphdef, state.params, batch, key, isolation, objective).cosines


def _unit_rows(gradient: jax.Array) -> jax.Array:
    """Returns the gradient [F, H] with columns of norm 1, or NaN if a column is zero.

    The paper's "rows" are taken to be those of torch's matrix [H, F], the weights of one output
    unit (the paper's released code has no code for this). They are columns here.
    """
    norm = jnp.linalg.norm(gradient, axis=0, keepdims=True)  # [1, H]
    return gradient / jnp.where(norm > 0, norm, jnp.nan)


def _put(params: Params, exits: tuple[int, ...], matrices: list[jax.Array]) -> dict[str, Any]:
    """Returns the parameters with these last feed-forward matrices in the exits' layers."""
    layers = dict(params["encoder"]["layers"])
    for e, matrix in zip(exits, matrices, strict=True):
        layer = layers[e - 1]
        layers[e - 1] = layer | {"output": layer["output"] | {"kernel": matrix}}
    return params | {"encoder": params["encoder"] | {"layers": layers}}
