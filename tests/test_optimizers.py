"""Optimizers and learning-rate schedules: their formulas, the parts of their states, own ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_early_exit import BATCH, EXITS, build, untrained
from test_step import settings

from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.optimizers import LEARNING_RATE_SCHEDULES, OPTIMIZERS
from sweet_jax.preparation import prepare
from sweet_jax.training.fit import step_settings
from sweet_jax.training.gradients import whole_gradients
from sweet_jax.training.initialization import initial_state, model_specs
from sweet_jax.training.optimizer import learning_rate_share, map_moments
from sweet_jax.training.parallel import compile_step
from sweet_jax.training.segment_parallel import DeviceGroup, join_state, split_state
from sweet_jax.training.sharding import make_mesh, reshard, state_shardings
from sweet_jax.training.step import init_state, train_step

ADAGRAD = optax.scale_by_rss(initial_accumulator_value=0.5)
NO_OPTIMIZER = lambda gradients: gradients


def square_root(remaining):
    return jnp.sqrt(remaining)


def test_steps_of_lion():
    """The update of Chen et al. 2023 (arXiv 2302.06675), algorithm 2, in NumPy."""
    graphdef, params = build(dropout=False)
    chosen = settings(graphdef, optimizer="lion", weight_decay=0.1)
    state = init_state(params, 1e-3, seed=0, optimizer="lion")
    step = jax.jit(lambda state: train_step(chosen, state, BATCH))
    gradient = jax.jit(lambda p: whole_gradients(graphdef, p, BATCH, 0.0, None)[0])
    ours = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
    moments = [np.zeros_like(p) for p in ours]
    for number in range(3):
        grads = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient(state.params))]
        rate = 1e-3 * (10 - number) / 10
        for i, g in enumerate(grads):
            direction = np.sign(0.9 * moments[i] + 0.1 * g)
            moments[i] = 0.99 * moments[i] + 0.01 * g
            ours[i] -= rate * (direction + (0.1 * ours[i] if ours[i].ndim > 1 else 0))
        state, _ = step(state)
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        for (path, p), wanted, g in zip(leaves, ours, grads, strict=True):
            if not untrained(path):  # whose gradients are rounding noise, with any sign
                same = np.abs(g) > 1e-7
                np.testing.assert_allclose(p[same], wanted[same], atol=1e-6, err_msg=str(path))
        ours = [np.asarray(p, np.float64) for p in jax.tree.leaves(state.params)]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("linear", optax.linear_schedule(1.0, 0.0, 10)),
        ("cosine", optax.cosine_decay_schedule(1.0, 10)),
        ("constant", optax.constant_schedule(1.0)),
        ("test_optimizers:square_root", lambda step: np.sqrt(1 - step / 10)),
    ],
)
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_learning_rate_rises_and_follows_its_schedule(name, schedule, warmup):
    graphdef, _ = build()
    total = 10 + warmup
    chosen = settings(graphdef, total_steps=total, warmup_steps=warmup, learning_rate_schedule=name)
    ours = learning_rate_share(jnp.arange(total), chosen)
    theirs = [(step + 1) / warmup for step in range(warmup)]
    theirs += [float(schedule(step)) for step in range(10)]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "test_optimizers:ADAGRAD"])
def test_a_state_is_split_among_groups_of_devices_and_joined(optimizer):
    _, params = build()
    host = jax.tree.map(np.asarray, init_state(params, 1e-3, 0, optimizer=optimizer))
    groups = [DeviceGroup((0,), make_mesh(1, 1)), DeviceGroup((1,), make_mesh(1, 1))]
    parts = split_state(host, groups, EXITS)
    sizes = [sum(x.size for x in jax.tree.leaves(part.opt_state)) for part in parts]
    assert all(0 < size < sum(x.size for x in jax.tree.leaves(host.opt_state)) for size in sizes)
    whole = join_state(parts)
    assert jax.tree.structure(whole) == jax.tree.structure(host)
    jax.tree.map(np.testing.assert_array_equal, whole, host)


@pytest.mark.parametrize(
    "optimizer", ["lion", pytest.param("test_optimizers:ADAGRAD", marks=pytest.mark.slow)]
)
def test_moments_of_any_optimizer_are_spread_over_the_devices(optimizer):
    graphdef, params = build(dropout=False)
    chosen = settings(graphdef, optimizer=optimizer)
    host = jax.tree.map(np.asarray, init_state(params, 1e-3, 0, optimizer=optimizer))
    shardings = state_shardings(make_mesh(1, 4), host, 1)
    compiled = compile_step(chosen, 1, shardings)
    spread, _ = compiled(reshard(host, shardings), BATCH, chosen.schedule)
    whole, _ = jax.jit(lambda state: train_step(chosen, state, BATCH))(host)
    moments: list = []
    map_moments(moments.append, spread.params, spread.opt_state)
    (moment,) = moments
    matrix = moment["encoder"]["layers"][0]["intermediate"]["kernel"]
    assert matrix.addressable_shards[0].data.size * 4 == matrix.size
    for x in jax.tree.leaves(spread.params):
        assert x.is_fully_replicated

    def close(path, ours, theirs):
        if not untrained(path):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)

    jax.tree.map_with_path(close, moment, _only_moment(whole))


def _only_moment(state):
    moments: list = []
    map_moments(moments.append, state.params, state.opt_state)
    return moments[0]


def test_a_state_need_not_start_with_zeros(options):
    own = {"optimizer": "test_optimizers:ADAGRAD", "seeds": (0, 1)}
    own["learning_rate_schedule"] = "test_optimizers:square_root"
    job = prepare(from_mapping(options | own))
    (spec,) = model_specs(job.config)
    graphdef, state = initial_state(job.config, job.checkpoint, spec, 2)
    for accumulator, param in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(state.params), strict=True
    ):
        assert accumulator.shape == param.shape
        assert (accumulator == 0.5).all()
    chosen = step_settings(job.config, graphdef, spec.exits, 160)
    assert chosen.optimizer == own["optimizer"]
    assert chosen.learning_rate_schedule == own["learning_rate_schedule"]


def test_an_optimizer_or_schedule_that_will_not_do_is_named_before_training(options):
    with pytest.raises(UserError, match="unknown optimizer 'adam': did you mean 'adamw'"):
        from_mapping(options | {"optimizer": "adam"})
    with pytest.raises(UserError, match="unknown learning_rate_schedule 'poly'"):
        from_mapping(options | {"learning_rate_schedule": "poly"})
    with pytest.raises(UserError, match="'test_optimizers:NO_OPTIMIZER' is of type function, not"):
        prepare(from_mapping(options | {"optimizer": "test_optimizers:NO_OPTIMIZER"}))
    with pytest.raises(UserError, match="learning_rate_schedule 'absent:FUNCTION': ModuleNotFound"):
        prepare(from_mapping(options | {"learning_rate_schedule": "absent:FUNCTION"}))
    assert set(LEARNING_RATE_SCHEDULES) == {"linear", "cosine", "constant"}
