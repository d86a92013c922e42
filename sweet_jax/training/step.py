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

from sweet_jax.models.early_exit import SHARED, Answer, Isolation, owners
from sweet_jax.models.layers import derive

Params = Any  # pure dict of float32 arrays
_LEARNING_TO_EXIT = jax.tree_util.DictKey("learning_to_exit")  # of a head's parameters
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
    isolation_schedule: str = "linear"  # from, to: "linear" in the steps, or a "step" at half time
    boundary_isolation: tuple[float, ...] = ()  # factors of the E - 1 boundaries; () = all 1
    learning_to_exit: str = ""  # "", "joint" or "detached"
    shared_relative: bool = False  # the model's

    def isolation_at(self, step: jax.Array) -> tuple[float | jax.Array, ...]:
        """Isolation of each of the E - 1 boundaries at a step (int32 []).

        A Python number where it is constant: `isolate` takes 0 and 1 literally then, so that a
        boundary that is closed throughout lets exactly nothing through.
        """
        factors = self.boundary_isolation or (1.0,) * (len(self.exits) - 1)
        start, end = self.isolation[0], self.isolation[-1]
        if start == end:
            return tuple(start * factor for factor in factors)
        if self.isolation_schedule == "step":
            now = jnp.where(2 * step < self.total_steps, start, end)
        else:
            now = start + (end - start) * step / max(1, self.total_steps - 1)
        return tuple(now * factor if factor else 0.0 for factor in factors)


class State(NamedTuple):
    """Everything of one replica that training changes, and what tells replicas apart."""

    params: Params
    adam: Any  # optax.ScaleByAdamState
    step: jax.Array  # int32 [], steps taken
    learning_rate: jax.Array  # float32 [], the peak
    seed: jax.Array  # uint32 []


class Metrics(NamedTuple):
    """What a step reports, measured before its update; of one exit, arrays without E."""

    loss: jax.Array  # float32 [E], mean cross-entropy
    predicted: jax.Array  # int32 [E], the class if the batch was given one only, else -1
    exit_loss: jax.Array | None = None  # float32 [E], learning-to-exit's mean squared error
    conflict: jax.Array | None = None  # float32 [E, E, E], where measured: see conflict.py


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

    Learning-to-exit's mean squared errors are added with weight 1, as the release does.

    Args:
      settings: constants.
      state: of one replica.
      batch: input_ids, token_type_ids int32 [B, L], mask bool [B, L], labels int32 [B] (-1: the
        row is left out).

    """
    chex.assert_rank((batch["input_ids"], batch["labels"]), (2, 1))
    key = dropout_key(state)
    isolation = settings.isolation_at(state.step)
    separate = all(not isinstance(a, jax.Array) and a == 1 for a in isolation)
    inputs = (settings.graphdef, state.params, batch)
    if separate:
        grads, metrics = segment_gradients(*inputs, 1.0, key)
    else:
        grads, metrics = whole_gradients(*inputs, isolation, key)
    grads = clip(grads, settings)
    updates, adam = _ADAM.update(grads, state.adam, state.params)
    rate = state.learning_rate * _schedule(state.step, settings)

    def update(p: jax.Array, u: jax.Array) -> jax.Array:
        decay = settings.weight_decay if p.ndim > 1 else 0.0  # none on biases and norms
        return p - rate * (u + decay * p)

    params = jax.tree.map(update, state.params, updates)
    return state._replace(params=params, adam=adam, step=state.step + 1), metrics


def dropout_key(state: State) -> jax.Array:
    """The key of the dropout masks of a replica's next step."""
    return derive(jax.random.key(state.seed), "dropout", state.step)


def whole_gradients(
    graphdef: nnx.GraphDef, params: Params, batch: dict, isolation: Isolation, key
) -> tuple[Params, Metrics]:
    """Gradients of the summed loss, and what it was: one backward pass."""

    def total(params: Params):
        answer = nnx.merge(graphdef, params).answers(batch, isolation, key)
        metrics = measure(answer, batch["labels"])
        return summed(metrics), metrics

    return jax.grad(total, has_aux=True)(params)


def segment_gradients(
    graphdef: nnx.GraphDef, params: Params, batch: dict, isolation: float, key
) -> tuple[Params, Metrics]:
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
            carried, answer = model.segment(index, carried, batch, isolation, key)
            metrics = measure(answer, batch["labels"])
            return summed(metrics), (carried, metrics)

        own, (carried, metrics) = jax.grad(loss, has_aux=True)(params)
        # All else is exactly zero; None takes neither memory nor time.
        own = jax.tree.map(lambda o, g, e=layer: g if o in (e, SHARED) else None, owner_of, own)
        carried, own = jax.lax.optimization_barrier((carried, own))
        parts.append(own)
        found.append(metrics)
    grads = jax.tree.map(
        lambda *g: functools.reduce(jnp.add, [x for x in g if x is not None]),
        *parts,
        is_leaf=lambda x: x is None,
    )
    return grads, jax.tree.map(lambda *x: jnp.stack(x), *found)


def measure(answer: Answer, labels: jax.Array) -> Metrics:
    """Losses and predictions of answers [E, ...] (or of one exit's) to labels int32 [B]."""
    logits, scores = answer
    exit_loss = None if scores is None else mean_exit_loss(logits, scores, labels)
    return Metrics(mean_loss(logits, labels), only_class(logits, labels), exit_loss)


def summed(metrics: Metrics) -> jax.Array:
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


def evaluate_step(
    graphdef: nnx.GraphDef, params: Params, batch: dict, key: jax.Array | None = None
) -> Answer:
    """What every exit says; with a key, under dropout."""
    return nnx.merge(graphdef, params).answers(batch, key=key)


def clip(grads: Params, settings: StepSettings) -> Params:
    """Scales gradients down to clip_norm, over each owner's parameters or over all of them.

    One norm over all parameters would let a late exit's gradient shrink the first exit's step;
    the paper does not state its clipping, and per owner keeps SWEET's exits independent. Detached
    learning-to-exit heads are groups of their own: in an owner's norm, they would shrink its step.
    """
    if settings.clip_norm == math.inf:
        return grads

    def group(path: tuple, owner: int) -> int:
        if settings.learning_to_exit == "detached" and path[2:3] == (_LEARNING_TO_EXIT,):
            return -owner
        return owner if settings.clip_by_owner else SHARED

    owner_of = owners(grads, settings.exits, shared_relative=settings.shared_relative)
    groups = jax.tree.map_with_path(group, owner_of)
    squares: dict[int, jax.Array] = {}
    for number, leaf in zip(jax.tree.leaves(groups), jax.tree.leaves(grads), strict=True):
        squares[number] = squares.get(number, jnp.zeros(())) + jnp.sum(leaf * leaf)
    limit = settings.clip_norm
    scales = {g: limit / jnp.maximum(jnp.sqrt(s), limit) for g, s in squares.items()}
    return jax.tree.map(lambda number, g: g * scales[number], groups, grads)


def _schedule(step: jax.Array, settings: StepSettings) -> jax.Array:
    """Share of the peak learning rate: linear warm-up, then linear decay to zero."""
    warm, total = settings.warmup_steps, settings.total_steps
    return jnp.minimum((step + 1) / max(1, warm) if warm else 1.0, (total - step) / (total - warm))


def only_class(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The one class that logits [..., B, C] give to all rows, or -1; int32 [...].

    Rows whose label [B] is -1 do not count.
    """
    classes = logits.argmax(axis=-1)  # [..., B]
    present = jnp.broadcast_to(labels, classes.shape) >= 0
    low = jnp.where(present, classes, logits.shape[-1]).min(axis=-1)
    high = jnp.where(present, classes, -1).max(axis=-1)
    return jnp.where(low == high, low, -1).astype(jnp.int32)
