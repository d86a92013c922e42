"""The update against a plain AdamW, clipping, schedule, padding rows and memory."""

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


def test_steps_are_adamw_with_linear_decay():
    """Other decays, warm-ups and schedules are those of test_optimizers.py."""
    warmup, decay = 4, 0.1
    graphdef, params = build()
    chosen = settings(graphdef, warmup_steps=warmup, weight_decay=decay)
    state = init_state(params, 1e-2, seed=3)
    step = jax.jit(lambda state: train_step(chosen, state, BATCH))
    gradient = jax.jit(lambda p, key: whole_gradients(graphdef, p, BATCH, 0.0, key)[0])
    ours = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
    first, second = ([np.zeros_like(p) for p in ours] for _ in range(2))
    for number in range(3):
        key = derive_key(jax.random.key(jnp.uint32(3)), "dropout", number)
        grads = jax.tree.leaves(gradient(state.params, key))
        share = (10 - number) / (10 - warmup)
        rate = 1e-2 * min((number + 1) / warmup, share)
        for i, g in enumerate(np.asarray(g, np.float64) for g in grads):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g * g
            change = first[i] / (1 - 0.9 ** (number + 1))
            change /= np.sqrt(second[i] / (1 - 0.999 ** (number + 1))) + 1e-8
            ours[i] -= rate * (change + (decay * ours[i] if ours[i].ndim > 1 else 0))
        state, _ = step(state)
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        for (path, p), wanted in zip(leaves, ours, strict=True):
            if not untrained(path):  # a gradient of rounding noise, which Adam scales up
                np.testing.assert_allclose(p, wanted, atol=1e-5, err_msg=str(path))
    assert int(state.step) == 3


@pytest.mark.parametrize("kind", ["bert", "albert", "mpnet"])
def test_a_layer_learns_slower_than_the_one_above_it(kind):
    """By layer_decay, from the last layer down; heads by a multiple of their own."""
    graphdef, params = build(kind=kind)
    zeros = jax.tree.map(jnp.zeros_like, params)
    adam = ADAM.init(params)
    changed = settings(graphdef, layer_decay=0.5, head_learning_rate=3.0)
    ones = jax.tree.map(jnp.ones_like, params)
    moved = jax.jit(lambda: apply_gradients(zeros, ones, adam, jnp.float32(1), changed)[0])()
    found: dict = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        names = tuple(part.key for part in path)
        place = names[:3] if names[:2] == ("encoder", "layers") else names[:2]
        np.testing.assert_allclose(leaf, leaf.ravel()[0], rtol=1e-6)
        found.setdefault(place, set()).add(round(-float(leaf.ravel()[0]), 3))
    layers = {("encoder", "layers", i): {0.5 ** (2 - i)} for i in range(3)}
    if kind == "albert":
        layers = {("encoder", "shared_layer"): {1.0}}
    if kind == "mpnet":
        layers |= {("encoder", "relative"): {0.125}}
    heads = {("heads", str(layer)): {3.0} for layer in EXITS}
    below = {place: {0.125} for place in found if place[:2] == ("encoder", "embeddings")}
    assert below
    assert found == layers | below | heads


def test_dropout_differs_from_step_to_step_and_from_seed_to_seed():
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
def isolated():
    """(structure, gradients of the exits in isolation)."""
    graphdef, params = build()
    return graphdef, jax.jit(lambda p: whole_gradients(graphdef, p, BATCH, 1.0, None)[0])(params)


def test_clipping_per_owner_leaves_small_owners_alone(isolated):
    graphdef, grads = isolated
    small = norms(grads)[3] * 0.5
    scaled = jax.tree.map(lambda g: g, grads)
    clipped = norms(clip_gradients(scaled, settings(graphdef, clip_norm=small)))
    assert clipped[3] == pytest.approx(small, rel=1e-5)
    assert clipped[1] == pytest.approx(min(small, norms(grads)[1]), rel=1e-5)
    loose = clip_gradients(grads, settings(graphdef, clip_norm=1e6))
    jax.tree.map(np.testing.assert_array_equal, loose, grads)


def test_global_clipping_couples_the_exits(isolated):
    graphdef, grads = isolated
    clipped = norms(clip_gradients(grads, settings(graphdef, clip_norm=0.1, clip_by_owner=False)))
    assert math.hypot(*clipped.values()) == pytest.approx(0.1, rel=1e-5)
    before = norms(grads)
    assert clipped[1] / clipped[3] == pytest.approx(before[1] / before[3], rel=1e-4)


@pytest.mark.slow
def test_spread_moments_give_the_steps_of_whole_ones():
    """Two replicas, the rows of each on two devices: moments in parts, parameters whole.

    Equal to rounding: norms of gradients, and the word table's gradient, are summed in another
    order. Key biases, whose gradients are rounding noise, have the ends of their steps alone.
    """
    graphdef, params = build(exits=(3,))
    chosen = settings(graphdef, exits=(3,), clip_norm=1.0, weight_decay=0.01)
    states = [jax.tree.map(np.asarray, init_state(params, rate, 0)) for rate in (1e-3, 3e-3)]
    host = jax.tree.map(lambda *x: np.stack(x), *states)
    batch = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), BATCH)
    mesh = make_mesh(2, 4)
    spread = state_shardings(mesh, host)
    whole = jax.tree.map(lambda _: replica_sharding(mesh), host)

    def after(shardings, steps: int = 3):
        state, step = reshard(host, shardings), compile_step(chosen, 2, shardings)
        for _ in range(steps):
            state, _ = step(state, batch, chosen.schedule)
        return state

    ours, theirs = after(spread), after(whole)
    moment = ours.opt_state.nu["encoder"]["layers"][0]["intermediate"]
    held = {x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(moment)}
    assert held == {1 / 4, 1 / 2}  # matrices; biases, of one of two replicas
    assert all(
        x.addressable_shards[0].data.size * 2 == x.size for x in jax.tree.leaves(ours.params)
    )

    def close(path: tuple, a: np.ndarray, b: np.ndarray) -> None:
        if [part.key for part in path[-2:]] != ["key", "bias"]:
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-7, err_msg=str(path))

    jax.tree.map_with_path(close, ours.params, theirs.params)


def test_empty_rows_are_left_out_of_the_loss():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 3))
    labels = jnp.array([2, 0, 1, 1])
    half = SINGLE_LABEL.mean_loss(logits, labels, jnp.arange(4) < 2)
    wanted = SINGLE_LABEL.mean_loss(logits[:, :2], labels[:2], jnp.ones(2, bool))
    np.testing.assert_allclose(half, wanted, rtol=1e-6)
    assert np.all(np.asarray(SINGLE_LABEL.mean_loss(logits, labels, jnp.zeros(4, bool))) == 0)


def test_metrics_name_the_only_class_of_a_batch():
    right = jnp.eye(3)[jnp.array([[1, 1, 1], [1, 2, 1], [2, 1, 2]])]  # [E, B, C]
    assert single_predicted_class(right, jnp.ones(3, bool)).tolist() == [1, -1, -1]
    assert single_predicted_class(right, jnp.array([True, False, True])).tolist() == [1, 1, 2]


@functools.partial(jax.jit, static_argnames="graphdef")  # compiled once for both isolations
def weighted_gradient(params, isolation, key, graphdef):
    """(gradient of the sum of the exits' losses, weighted by 0.25 and 3, logits [E, B, C])."""

    def weighted(params):
        output = nnx.merge(graphdef, params).forward(BATCH, isolation, key)
        labels, right = BATCH["labels"], output.logits.argmax(-1) == BATCH["labels"][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            output.logits, jnp.broadcast_to(labels, (2, 4))
        )
        first, second = (losses + (output.exit_scores - right) ** 2).mean(axis=-1)
        return 0.25 * first + 3 * second, output.logits

    return jax.grad(weighted, has_aux=True)(params)


@pytest.mark.parametrize("by_segment", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_gradient_is_that_of_the_weighted_losses(by_segment):
    """With learning-to-exit, whose squared error is a part of its exit's loss."""
    graphdef, params = build(learning_to_exit="joint")
    key, isolation = jax.random.key(5), float(by_segment)

    def ours(params):
        loss = TrainingLoss(weights=(0.25, jnp.asarray(3.0)))
        if by_segment:
            return segment_gradients(graphdef, params, BATCH, key, loss)[:2]
        return whole_gradients(graphdef, params, BATCH, isolation, key, loss)

    found, metrics = jax.jit(ours)(params)
    wanted, logits = weighted_gradient(params, jnp.asarray(isolation), key, graphdef)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # The weights do not touch what is logged.
    plain = SINGLE_LABEL.mean_loss(logits, BATCH["labels"], BATCH["row_mask"])
    np.testing.assert_allclose(metrics.loss, plain, rtol=1e-5)


@pytest.mark.parametrize("isolation", [(0.0,), (1.0,)])
def test_uniform_weights_are_no_operation_of_the_program(isolation):
    graphdef, params = build(dropout=False, learning_to_exit="joint")
    state = init_state(params, 1e-2, 0)

    def program(**changes) -> str:
        chosen = settings(graphdef, isolation=isolation, **changes)
        return jax.jit(functools.partial(train_step, chosen)).lower(state, BATCH).as_text()

    uniform = program(loss_weights=loss_weights("uniform", EXITS))
    assert uniform == program()
    assert uniform != program(loss_weights=loss_weights("depth", EXITS))


def test_weights_of_losses_may_move_during_training():
    chosen = settings(None, total_steps=5, loss_weights=((0.0, 1.0), (2.0, 2.0)))
    weights = [chosen.loss_at(jnp.asarray(step)).weights for step in range(5)]
    np.testing.assert_allclose([w[0] for w in weights], [0, 0.25, 0.5, 0.75, 1])
    assert {w[1] for w in weights} == {2.0}


def test_isolation_may_move_during_training():
    chosen = settings(None, isolation=(0.0, 1.0), total_steps=5)
    values = [float(chosen.isolation_at(jnp.asarray(step))[0]) for step in range(5)]
    np.testing.assert_allclose(values, [0, 0.25, 0.5, 0.75, 1])
    assert settings(None, isolation=(1.0,)).isolation_at(jnp.asarray(2)) == (1.0,)


@pytest.mark.parametrize(
    ("total", "wanted"), [(4, [0.2, 0.2, 0.8, 0.8]), (5, [0.2, 0.2, 0.2, 0.8, 0.8]), (1, [0.2])]
)
def test_isolation_may_change_at_half_time(total, wanted):
    chosen = settings(
        None, isolation=(0.2, 0.8), isolation_schedule="step", total_steps=total, exits=(1, 2, 3)
    )
    for step, value in enumerate(wanted):
        np.testing.assert_allclose(chosen.isolation_at(jnp.asarray(step)), [value] * 2)


def test_isolation_of_each_boundary_is_literal_where_it_is_constant():
    three = {"exits": (1, 2, 3, 4), "boundary_isolation": (1.0, 0.5, 0.0)}
    fixed = settings(None, isolation=(1.0, 1.0), **three).isolation_at(jnp.asarray(3))
    assert fixed == (1.0, 0.5, 0.0)
    assert all(isinstance(a, float) for a in fixed)
    moving = settings(None, isolation=(0.0, 1.0), total_steps=5, **three)
    now = moving.isolation_at(jnp.asarray(2))
    np.testing.assert_allclose(now, [0.5, 0.25, 0.0])
    assert [isinstance(a, jax.Array) for a in now] == [True, True, False]


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
def test_only_constant_full_isolation_is_trained_segment_by_segment(values, by_segment):
    """The path that holds one segment's activations at a time: a barrier ends each segment."""
    graphdef, params = build(dropout=False)
    step = functools.partial(train_step, settings(graphdef, **values))
    program = jax.jit(step).lower(init_state(params, 1, 0), BATCH).as_text()
    assert program.count("optimization_barrier") == (len(EXITS) if by_segment else 0)


@pytest.mark.slow
def test_a_step_uses_the_isolation_of_its_own_number():
    """Isolation follows the step in the state, so that a resumed run continues the schedule."""
    graphdef, params = build(dropout=False)
    moving = settings(graphdef, isolation=(0.0, 1.0), total_steps=5)
    fixed = dataclasses.replace(moving, isolation=(0.25,))
    state = init_state(params, 1e-2, 0)
    first = lambda s, number: jax.tree.leaves(
        s(state._replace(step=jnp.asarray(number)))[0].opt_state.mu
    )
    ours = jax.jit(lambda state: train_step(moving, state, BATCH))
    theirs = jax.jit(lambda state: train_step(fixed, state, BATCH))
    for a, b in zip(first(ours, 1), first(theirs, 1), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    pairs = zip(first(ours, 3), first(theirs, 3), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("isolation", [0.0, 1.0])
def test_what_is_computed_again_is_the_same(isolation):
    gradients = []
    for remat in (False, True):
        graphdef, params = build(kind="deberta-v2", remat=remat)
        key = jax.random.key(5)
        part = segment_gradients if isolation else whole_gradients
        rest = (key,) if isolation else (isolation, key)
        step = jax.jit(lambda p, g=graphdef, f=part, r=rest: f(g, p, BATCH, *r)[0])
        gradients.append(step(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), gradients[0], gradients[1]
    )


def test_evaluation_is_the_same_program_with_remat_or_without():
    programs = []
    for remat in (False, True):
        graphdef, params = build(remat=remat)
        lowered = jax.jit(lambda p, g=graphdef: evaluate_step(g, p, BATCH)).lower(params)
        programs.append(lowered.as_text())
    assert programs[0] == programs[1]


def temporaries(
    method_isolation: tuple[float, ...],
    layers: int = 6,
    exits: tuple[int, ...] = (1, 2, 4, 6),
    remat: bool = False,
) -> int:
    """Bytes of temporaries of the compiled step: MiniLM's proportions, 16 x 128."""
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
    chosen = settings(nnx.split(model)[0], exits=exits, isolation=method_isolation, clip_norm=1.0)
    batch = {
        "input_ids": jax.ShapeDtypeStruct((16, 128), jnp.int32),
        "token_type_ids": jax.ShapeDtypeStruct((16, 128), jnp.int32),
        "mask": jax.ShapeDtypeStruct((16, 128), bool),
        "labels": jax.ShapeDtypeStruct((16,), jnp.int32),
        "row_mask": jax.ShapeDtypeStruct((16,), bool),
    }
    step = jax.jit(lambda s, b: train_step(chosen, s, b), donate_argnums=0)
    return step.lower(shapes, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_sweet_needs_about_half_of_early_exit_s_memory():
    assert temporaries((1.0,)) <= 0.55 * temporaries((0.0,))


@pytest.mark.slow
def test_remat_needs_less_memory():
    deep = ((0.0,), 8, (1, 8))
    assert temporaries(*deep, remat=True) < 0.6 * temporaries(*deep)
