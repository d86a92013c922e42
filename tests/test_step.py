"""Tests of the training step: update, clipping, schedules, padding rows and memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_early_exit import BATCH, EXITS, build, untrained

from sweet_jax.methods import loss_weights
from sweet_jax.models.bert import Bert, BertConfig
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.layers import derive_key
from sweet_jax.models.ownership import leaves_by_owner
from sweet_jax.objectives.single_label import SINGLE_LABEL, single_predicted_class
from sweet_jax.training.gradients import segment_gradients, whole_gradients
from sweet_jax.training.losses import TrainingLoss
from sweet_jax.training.optimizer import apply_gradients, clip_gradients
from sweet_jax.training.parallel import compile_step
from sweet_jax.training.settings import StepSettings
from sweet_jax.training.sharding import make_mesh, replica_sharding, reshard, state_shardings
from sweet_jax.training.step import evaluate_step, init_state, train_step
from sweet_jax.training.transformations import ADAM


def settings(graphdef, **changes) -> StepSettings:
    values = {
        "graphdef": graphdef,
        "exits": EXITS,
        "total_steps": 10,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "clip_norm": math.inf,
        "clip_by_owner": True,
        "isolation": (0.0,),
    }
    return StepSettings(**{**values, **changes})


def assert_parameters_close(actual, expected, atol: float) -> None:
    """Asserts that parameters are equal except for rounding.

    Skips key biases, which softmax cancels: their gradients are rounding noise, which Adam scales
    up to whole steps.
    """

    def assert_close(path: tuple, a: np.ndarray, b: np.ndarray) -> None:
        if [part.key for part in path[-2:]] != ["key", "bias"]:
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))

    jax.tree.map_with_path(assert_close, actual, expected)


def test_training_steps_equal_adamw_with_linear_decay():
    """Other decays, warm-ups and schedules are tested in test_optimizers.py."""
    warmup, decay = 4, 0.1
    graphdef, params = build()
    step_settings = settings(graphdef, warmup_steps=warmup, weight_decay=decay)
    state = init_state(params, 1e-2, seed=3)
    step = jax.jit(lambda state: train_step(step_settings, state, BATCH))
    gradient = jax.jit(lambda p, key: whole_gradients(graphdef, p, BATCH, 0.0, key)[0])
    expected = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
    first_moments, second_moments = ([np.zeros_like(p) for p in expected] for _ in range(2))
    for count in range(3):
        key = derive_key(jax.random.key(jnp.uint32(3)), "dropout", count)
        grads = jax.tree.leaves(gradient(state.params, key))
        share = (10 - count) / (10 - warmup)
        rate = 1e-2 * min((count + 1) / warmup, share)
        for i, g in enumerate(np.asarray(g, np.float64) for g in grads):
            first_moments[i] = 0.9 * first_moments[i] + 0.1 * g
            second_moments[i] = 0.999 * second_moments[i] + 0.001 * g * g
            update = first_moments[i] / (1 - 0.9 ** (count + 1))
            update /= np.sqrt(second_moments[i] / (1 - 0.999 ** (count + 1))) + 1e-8
            expected[i] -= rate * (update + (decay * expected[i] if expected[i].ndim > 1 else 0))
        state, _ = step(state)
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        for (path, p), value in zip(leaves, expected, strict=True):
            if not untrained(path):  # its gradient is rounding noise, which Adam scales up
                np.testing.assert_allclose(p, value, atol=1e-5, err_msg=str(path))
    assert int(state.step) == 3


@pytest.mark.parametrize("kind", ["bert", "albert", "mpnet"])
def test_layer_decay_scales_the_learning_rate_of_each_layer(kind):
    """The last layer has the factor 1, and the heads have a factor of their own."""
    graphdef, params = build(kind=kind)
    zeros = jax.tree.map(jnp.zeros_like, params)
    adam = ADAM.init(params)
    decayed = settings(graphdef, layer_decay=0.5, head_learning_rate=3.0)
    ones = jax.tree.map(jnp.ones_like, params)
    updated = jax.jit(lambda: apply_gradients(zeros, ones, adam, jnp.float32(1), decayed)[0])()
    rates: dict = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(updated):
        names = tuple(part.key for part in path)
        group = names[:3] if names[:2] == ("encoder", "layers") else names[:2]
        np.testing.assert_allclose(leaf, leaf.ravel()[0], rtol=1e-6)
        rates.setdefault(group, set()).add(round(-float(leaf.ravel()[0]), 3))
    layers = {("encoder", "layers", i): {0.5 ** (2 - i)} for i in range(3)}
    if kind == "albert":
        layers = {("encoder", "shared_layer"): {1.0}}
    if kind == "mpnet":
        layers |= {("encoder", "relative"): {0.125}}
    heads = {("heads", str(layer)): {3.0} for layer in EXITS}
    below = {group: {0.125} for group in rates if group[:2] == ("encoder", "embeddings")}
    assert below
    assert rates == layers | below | heads


def test_dropout_differs_between_steps_and_seeds():
    graphdef, params = build()
    step = jax.jit(functools.partial(train_step, settings(graphdef)))
    losses = []
    for seed, number in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        state = init_state(params, 0.0, seed)._replace(step=jnp.asarray(number))
        losses.append(float(step(state, BATCH)[1].loss.sum()))
    assert len(set(losses[:3])) == 3
    assert losses[0] == losses[3]


def norms(grads) -> dict:
    squares: dict = {}
    for owner, leaf in leaves_by_owner(grads, EXITS):
        squares[owner] = squares.get(owner, 0) + float((leaf**2).sum())
    return {owner: math.sqrt(square) for owner, square in squares.items()}


@pytest.fixture(scope="module")
def isolated_gradients():
    """Returns (graphdef, gradients of the exits in isolation)."""
    graphdef, params = build()
    return graphdef, jax.jit(lambda p: whole_gradients(graphdef, p, BATCH, 1.0, None)[0])(params)


def test_clipping_by_owner_scales_each_owner_separately(isolated_gradients):
    graphdef, grads = isolated_gradients
    clip_norm = norms(grads)[3] * 0.5
    clipped = norms(clip_gradients(grads, settings(graphdef, clip_norm=clip_norm)))
    assert clipped[3] == pytest.approx(clip_norm, rel=1e-5)
    assert clipped[1] == pytest.approx(min(clip_norm, norms(grads)[1]), rel=1e-5)
    unclipped = clip_gradients(grads, settings(graphdef, clip_norm=1e6))
    jax.tree.map(np.testing.assert_array_equal, unclipped, grads)


def test_global_clipping_scales_all_exits_equally(isolated_gradients):
    graphdef, grads = isolated_gradients
    clipped = norms(clip_gradients(grads, settings(graphdef, clip_norm=0.1, clip_by_owner=False)))
    assert math.hypot(*clipped.values()) == pytest.approx(0.1, rel=1e-5)
    before = norms(grads)
    assert clipped[1] / clipped[3] == pytest.approx(before[1] / before[3], rel=1e-4)


@pytest.mark.nightly
def test_sharded_moments_give_same_steps_as_replicated_ones():
    """Two replicas, each on two devices; the moments are sharded, the parameters are not.

    The results differ by rounding: norms of gradients, and the gradient of the word embeddings, are
    summed in another order.
    """
    graphdef, params = build(exits=(3,))
    step_settings = settings(graphdef, exits=(3,), clip_norm=1.0, weight_decay=0.01)
    states = [jax.tree.map(np.asarray, init_state(params, rate, 0)) for rate in (1e-3, 3e-3)]
    host = jax.tree.map(lambda *x: np.stack(x), *states)
    batch = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), BATCH)
    mesh = make_mesh(2, 4)
    sharded = state_shardings(mesh, host)
    replicated = jax.tree.map(lambda _: replica_sharding(mesh), host)

    def state_after(shardings, steps: int = 3):
        state, step = reshard(host, shardings), compile_step(step_settings, 2, shardings)
        for _ in range(steps):
            state, _ = step(state, batch, step_settings.schedule)
        return state

    actual, expected = state_after(sharded), state_after(replicated)
    moment = actual.opt_state.nu["encoder"]["layers"][0]["intermediate"]
    shares = {x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(moment)}
    assert shares == {1 / 4, 1 / 2}  # of matrices; of biases, which only the replicas divide
    assert all(
        x.addressable_shards[0].data.size * 2 == x.size for x in jax.tree.leaves(actual.params)
    )
    assert_parameters_close(actual.params, expected.params, atol=2e-7)


def test_padding_rows_do_not_change_loss():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 3))
    labels = jnp.array([2, 0, 1, 1])
    masked = SINGLE_LABEL.mean_loss(logits, labels, jnp.arange(4) < 2)
    expected = SINGLE_LABEL.mean_loss(logits[:, :2], labels[:2], jnp.ones(2, bool))
    np.testing.assert_allclose(masked, expected, rtol=1e-6)
    assert np.all(np.asarray(SINGLE_LABEL.mean_loss(logits, labels, jnp.zeros(4, bool))) == 0)


def test_single_predicted_class_is_minus_one_for_several_classes():
    logits = jnp.eye(3)[jnp.array([[1, 1, 1], [1, 2, 1], [2, 1, 2]])]  # [E, B, C]
    assert single_predicted_class(logits, jnp.ones(3, bool)).tolist() == [1, -1, -1]
    assert single_predicted_class(logits, jnp.array([True, False, True])).tolist() == [1, 1, 2]


@functools.partial(jax.jit, static_argnames="graphdef")  # compiled once for both isolations
def weighted_gradient(params, isolation, key, graphdef):
    """Returns (gradient of the exits' losses weighted by 0.25 and 3, logits [E, B, C])."""

    def weighted(params):
        output = nnx.merge(graphdef, params).forward(BATCH, isolation, key)
        labels, correct = BATCH["labels"], output.logits.argmax(-1) == BATCH["labels"][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            output.logits, jnp.broadcast_to(labels, (2, 4))
        )
        first, second = (losses + (output.exit_scores - correct) ** 2).mean(axis=-1)
        return 0.25 * first + 3 * second, output.logits

    return jax.grad(weighted, has_aux=True)(params)


@pytest.mark.parametrize("by_segment", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradient_is_that_of_weighted_exit_losses(by_segment):
    """With learning-to-exit, whose squared error is part of the exit's loss."""
    graphdef, params = build(learning_to_exit="joint")
    key, isolation = jax.random.key(5), float(by_segment)

    def gradient(params):
        loss = TrainingLoss(weights=(0.25, jnp.asarray(3.0)))
        if by_segment:
            return segment_gradients(graphdef, params, BATCH, key, loss)[:2]
        return whole_gradients(graphdef, params, BATCH, isolation, key, loss)

    actual, metrics = jax.jit(gradient)(params)
    expected, logits = weighted_gradient(params, jnp.asarray(isolation), key, graphdef)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # The logged losses are unweighted.
    unweighted = SINGLE_LABEL.mean_loss(logits, BATCH["labels"], BATCH["row_mask"])
    np.testing.assert_allclose(metrics.loss, unweighted, rtol=1e-5)


@pytest.mark.parametrize("isolation", [(0.0,), (1.0,)])
def test_uniform_loss_weights_do_not_change_the_program(isolation):
    graphdef, params = build(dropout=False, learning_to_exit="joint")
    state = init_state(params, 1e-2, 0)

    def program(**changes) -> str:
        step_settings = settings(graphdef, isolation=isolation, **changes)
        return jax.jit(functools.partial(train_step, step_settings)).lower(state, BATCH).as_text()

    uniform = program(loss_weights=loss_weights("uniform", EXITS))
    assert uniform == program()
    assert uniform != program(loss_weights=loss_weights("depth", EXITS))


def test_loss_weights_are_interpolated_over_training():
    step_settings = settings(None, total_steps=5, loss_weights=((0.0, 1.0), (2.0, 2.0)))
    weights = [step_settings.loss_at(jnp.asarray(step)).weights for step in range(5)]
    np.testing.assert_allclose([w[0] for w in weights], [0, 0.25, 0.5, 0.75, 1])
    assert {w[1] for w in weights} == {2.0}


def test_isolation_is_interpolated_over_training():
    step_settings = settings(None, isolation=(0.0, 1.0), total_steps=5)
    values = [float(step_settings.isolation_at(jnp.asarray(step))[0]) for step in range(5)]
    np.testing.assert_allclose(values, [0, 0.25, 0.5, 0.75, 1])
    assert settings(None, isolation=(1.0,)).isolation_at(jnp.asarray(2)) == (1.0,)


@pytest.mark.parametrize(
    ("total", "expected"), [(4, [0.2, 0.2, 0.8, 0.8]), (5, [0.2, 0.2, 0.2, 0.8, 0.8]), (1, [0.2])]
)
def test_step_isolation_schedule_switches_halfway(total, expected):
    step_settings = settings(
        None, isolation=(0.2, 0.8), isolation_schedule="step", total_steps=total, exits=(1, 2, 3)
    )
    for step, value in enumerate(expected):
        np.testing.assert_allclose(step_settings.isolation_at(jnp.asarray(step)), [value] * 2)


def test_constant_boundary_isolation_is_a_python_float():
    boundaries = {"exits": (1, 2, 3, 4), "boundary_isolation": (1.0, 0.5, 0.0)}
    constant = settings(None, isolation=(1.0, 1.0), **boundaries).isolation_at(jnp.asarray(3))
    assert constant == (1.0, 0.5, 0.0)
    assert all(isinstance(a, float) for a in constant)
    scheduled = settings(None, isolation=(0.0, 1.0), total_steps=5, **boundaries)
    isolation = scheduled.isolation_at(jnp.asarray(2))
    np.testing.assert_allclose(isolation, [0.5, 0.25, 0.0])
    assert [isinstance(a, jax.Array) for a in isolation] == [True, True, False]


@pytest.mark.parametrize(
    ("values", "by_segment"),
    [
        ({"isolation": (1.0,)}, True),
        ({"isolation": (1.0, 1.0)}, True),
        ({"isolation": (1.0,), "boundary_isolation": (1.0,)}, True),
        ({"isolation": (1.0,), "boundary_isolation": (0.5,)}, False),
        ({"isolation": (0.5, 1.0)}, False),
    ],
)
def test_only_constant_full_isolation_trains_segment_by_segment(values, by_segment):
    """An optimization barrier ends each segment, so that only one has its activations in memory."""
    graphdef, params = build(dropout=False)
    step = functools.partial(train_step, settings(graphdef, **values))
    program = jax.jit(step).lower(init_state(params, 1, 0), BATCH).as_text()
    assert program.count("optimization_barrier") == (len(EXITS) if by_segment else 0)


@pytest.mark.slow
def test_isolation_schedule_follows_the_step_of_the_state():
    """So that a resumed run continues the schedule."""
    graphdef, params = build(dropout=False)
    scheduled = settings(graphdef, isolation=(0.0, 1.0), total_steps=5)
    constant = dataclasses.replace(scheduled, isolation=(0.25,))
    state = init_state(params, 1e-2, 0)
    moments_after = lambda s, number: jax.tree.leaves(
        s(state._replace(step=jnp.asarray(number)))[0].opt_state.mu
    )
    scheduled_step = jax.jit(lambda state: train_step(scheduled, state, BATCH))
    constant_step = jax.jit(lambda state: train_step(constant, state, BATCH))
    for a, b in zip(moments_after(scheduled_step, 1), moments_after(constant_step, 1), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    pairs = zip(moments_after(scheduled_step, 3), moments_after(constant_step, 3), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) > 1e-3


@pytest.mark.parametrize(
    "isolation",
    [pytest.param(0.0, marks=pytest.mark.nightly), pytest.param(1.0, marks=pytest.mark.slow)],
)
def test_remat_does_not_change_gradients(isolation):
    gradients = []
    for remat in (False, True):
        graphdef, params = build(kind="deberta-v2", remat=remat)
        key = jax.random.key(5)
        compute = segment_gradients if isolation else whole_gradients
        arguments = (key,) if isolation else (isolation, key)
        step = jax.jit(lambda p, g=graphdef, f=compute, r=arguments: f(g, p, BATCH, *r)[0])
        gradients.append(step(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), gradients[0], gradients[1]
    )


def test_remat_does_not_change_the_evaluation_program():
    programs = []
    for remat in (False, True):
        graphdef, params = build(remat=remat)
        lowered = jax.jit(lambda p, g=graphdef: evaluate_step(g, p, BATCH)).lower(params)
        programs.append(lowered.as_text())
    assert programs[0] == programs[1]


def temporary_bytes(
    isolation: tuple[float, ...],
    layers: int = 6,
    exits: tuple[int, ...] = (1, 2, 4, 6),
    remat: bool = False,
) -> int:
    """Returns the bytes of temporaries of a compiled step on 16 rows of 128 tokens.

    The encoder has the proportions of MiniLM.
    """
    config = BertConfig(
        vocab_size=100,
        hidden_size=96,
        num_hidden_layers=layers,
        num_attention_heads=6,
        intermediate_size=384,
    )
    key = jax.random.key(0)

    def state():
        model = EarlyExit(Bert(config, key), exits, 2, key)
        return init_state(nnx.to_pure_dict(nnx.split(model)[1]), 1e-3, 0)

    shapes = jax.eval_shape(state)
    model = nnx.eval_shape(
        lambda: EarlyExit(Bert(config, key), exits, 2, key, ExitConfig(remat=remat))
    )
    step_settings = settings(nnx.split(model)[0], exits=exits, isolation=isolation, clip_norm=1.0)
    batch = {
        "input_ids": jax.ShapeDtypeStruct((16, 128), jnp.int32),
        "token_type_ids": jax.ShapeDtypeStruct((16, 128), jnp.int32),
        "mask": jax.ShapeDtypeStruct((16, 128), bool),
        "labels": jax.ShapeDtypeStruct((16,), jnp.int32),
        "row_mask": jax.ShapeDtypeStruct((16,), bool),
    }
    step = jax.jit(lambda s, b: train_step(step_settings, s, b), donate_argnums=0)
    return step.lower(shapes, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_sweet_step_needs_about_half_the_memory_of_early_exit():
    assert temporary_bytes((1.0,)) <= 0.55 * temporary_bytes((0.0,))


@pytest.mark.slow
def test_remat_reduces_memory_of_step():
    deep = ((0.0,), 5, (1, 5))
    assert temporary_bytes(*deep, remat=True) < 0.6 * temporary_bytes(*deep)
