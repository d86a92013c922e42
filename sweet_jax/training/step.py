"""One training step and one evaluation step of one replica, as pure functions.

Shape letters: E exit, B batch, L length, C classes.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sweet_jax.models.early_exit import SHARED, owners
from sweet_jax.models.layers import derive

Params = Any  # pure dict of float32 arrays
_ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)  # SWEET paper, appendix A


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What a step is besides its state: constants of the compiled program."""

    graphdef: nnx.GraphDef
    exits: tuple[int, ...]
    total_steps: int
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    clip_by_owner: bool
    isolation: tuple[float, ...]  # one number, or from, to
    shared_relative: bool = False  # the model's

    def isolation_at(self, step: jax.Array) -> float | jax.Array:
        """Isolation of a step: a Python number where constant, else linear in the steps."""
        start, end = self.isolation[0], self.isolation[-1]
        if start == end:
            return start
        return start + (end - start) * step / max(1, self.total_steps - 1)


class State(NamedTuple):
    """Everything of one replica that training changes, and what tells replicas apart."""

    params: Params
    adam: Any  # optax.ScaleByAdamState
    step: jax.Array  # int32 [], steps taken
    learning_rate: jax.Array  # float32 [], the peak
    seed: jax.Array  # uint32 []


class Metrics(NamedTuple):
    """What a step reports, measured before its update."""

    loss: jax.Array  # float32 [E], mean cross-entropy
    predicted: jax.Array  # int32 [E], the class if the batch was given one only, else -1


def new_state(params: Params, learning_rate: float, seed: int) -> State:
    """The state before the first step."""
    return State(
        params,
        _ADAM.init(params),
        jnp.zeros((), jnp.int32),
        jnp.asarray(learning_rate, jnp.float32),
        jnp.asarray(seed, jnp.uint32),
    )


def train_step(settings: StepSettings, state: State, batch: dict) -> tuple[State, Metrics]:
    """One step of AdamW on the sum over exits of mean cross-entropy (SWEET paper, section 3).

    Args:
      settings: constants.
      state: of one replica.
      batch: input_ids, token_type_ids int32 [B, L], mask bool [B, L], labels int32 [B] (-1: the
        row is left out).

    """
    chex.assert_rank((batch["input_ids"], batch["labels"]), (2, 1))
    key = derive(jax.random.key(state.seed), "dropout", state.step)

    isolation = settings.isolation_at(state.step)
    separate = not isinstance(isolation, jax.Array) and isolation == 1
    gradients = segment_gradients if separate else whole_gradients
    grads, losses, logits = gradients(settings.graphdef, state.params, batch, isolation, key)
    grads = clip(grads, settings)
    updates, adam = _ADAM.update(grads, state.adam, state.params)
    rate = state.learning_rate * _schedule(state.step, settings)

    def update(p: jax.Array, u: jax.Array) -> jax.Array:
        decay = settings.weight_decay if p.ndim > 1 else 0.0  # none on biases and norms
        return p - rate * (u + decay * p)

    params = jax.tree.map(update, state.params, updates)
    metrics = Metrics(losses, only_class(logits, batch["labels"]))
    return state._replace(params=params, adam=adam, step=state.step + 1), metrics


def whole_gradients(
    graphdef: nnx.GraphDef, params: Params, batch: dict, isolation, key
) -> tuple[Params, jax.Array, jax.Array]:
    """Gradients of the summed loss; with the losses [E] and logits [E, B, C], one backward pass."""

    def total(params: Params):
        logits = nnx.merge(graphdef, params)(batch, isolation, key)  # [E, B, C]
        losses = mean_loss(logits, batch["labels"])
        return losses.sum(), (losses, logits)

    grads, (losses, logits) = jax.grad(total, has_aux=True)(params)
    return grads, losses, logits


def segment_gradients(
    graphdef: nnx.GraphDef, params: Params, batch: dict, isolation, key
) -> tuple[Params, jax.Array, jax.Array]:
    """The same as `whole_gradients` where no gradient crosses segments, one segment at a time.

    Forward and backward through a segment before the next one begins: only one segment's
    activations are alive. The barrier says so to the compiler, which else orders all forward passes
    first and needs as much memory as Early-Exit.
    """
    model = nnx.merge(graphdef, params)
    exits = model.exits
    owner_of = owners(params, exits, shared_relative=model.shared_relative)
    carried, parts, found = None, [], []
    for index, layer in enumerate(exits):

        def loss(params: Params, carried=carried, index=index):
            model = nnx.merge(graphdef, params)
            carried, logits = model.segment(index, carried, batch, isolation, key)
            value = mean_loss(logits, batch["labels"])
            return value, (carried, value, logits)

        own, (carried, *answer) = jax.grad(loss, has_aux=True)(params)
        # All else is exactly zero; None takes neither memory nor time.
        own = jax.tree.map(lambda o, g, e=layer: g if o in (e, SHARED) else None, owner_of, own)
        carried, own = jax.lax.optimization_barrier((carried, own))
        parts.append(own)
        found.append(answer)
    grads = jax.tree.map(
        lambda *g: functools.reduce(jnp.add, [x for x in g if x is not None]),
        *parts,
        is_leaf=lambda x: x is None,
    )
    losses, logits = zip(*found, strict=True)
    return grads, jnp.stack(losses), jnp.stack(logits)


def mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of logits [..., B, C] averaged over the rows of labels [B] that are not -1."""
    labels = jnp.broadcast_to(labels, logits.shape[:-1])  # [..., B]
    present = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.where(present, losses, 0).sum(axis=-1) / jnp.maximum(present.sum(axis=-1), 1)


def evaluate_step(
    graphdef: nnx.GraphDef, params: Params, batch: dict, key: jax.Array | None = None
) -> jax.Array:
    """Logits of every exit, float32 [E, B, C]; with a key, under dropout."""
    return nnx.merge(graphdef, params)(batch, key=key)


def clip(grads: Params, settings: StepSettings) -> Params:
    """Scales gradients down to clip_norm, over each owner's parameters or over all of them.

    One norm over all parameters would let a late exit's gradient shrink the first exit's step;
    the paper does not state its clipping, and per owner keeps SWEET's exits independent.
    """
    if settings.clip_norm == math.inf:
        return grads
    owner_of = owners(grads, settings.exits, shared_relative=settings.shared_relative)
    group_of = owner_of if settings.clip_by_owner else jax.tree.map(lambda _: 0, owner_of)
    squares: dict[int, jax.Array] = {}
    for group, leaf in zip(jax.tree.leaves(group_of), jax.tree.leaves(grads), strict=True):
        squares[group] = squares.get(group, jnp.zeros(())) + jnp.sum(leaf * leaf)
    limit = settings.clip_norm
    scales = {g: limit / jnp.maximum(jnp.sqrt(s), limit) for g, s in squares.items()}
    return jax.tree.map(lambda group, g: g * scales[group], group_of, grads)


def _schedule(step: jax.Array, settings: StepSettings) -> jax.Array:
    """Share of the peak learning rate: linear warm-up, then linear decay to zero."""
    warm, total = settings.warmup_steps, settings.total_steps
    return jnp.minimum((step + 1) / max(1, warm) if warm else 1.0, (total - step) / (total - warm))


def only_class(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The one class that logits [E, B, C] give to all rows, or -1; int32 [E].

    Rows whose label [B] is -1 do not count.
    """
    classes = logits.argmax(axis=-1)  # [E, B]
    present = jnp.broadcast_to(labels, classes.shape) >= 0
    low = jnp.where(present, classes, logits.shape[-1]).min(axis=-1)
    high = jnp.where(present, classes, -1).max(axis=-1)
    return jnp.where(low == high, low, -1).astype(jnp.int32)
