"""Optimizers and learning-rate schedules: formulas, sharded states, and those of users."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_early_exit import EXITS, build
from test_step import settings

from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.optimizers import LEARNING_RATE_SCHEDULES, OPTIMIZERS
from sweet_jax.preparation import prepare
from sweet_jax.training.checkpoint import Checkpoints, abstract_state
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import initial_state, model_specs
from sweet_jax.training.optimizer import (
    apply_gradients,
    check_optimizer,
    learning_rate_share,
    map_moments,
)
from sweet_jax.training.resumption import restore_newest
from sweet_jax.training.segment_parallel import DeviceGroup, join_state, split_state
from sweet_jax.training.settings import step_settings
from sweet_jax.training.sharding import (
    drop_replica_axis,
    make_mesh,
    replica_sharding,
    state_shardings,
)
from sweet_jax.training.step import init_state

ADAGRAD = optax.scale_by_rss(initial_accumulator_value=0.5)
NO_OPTIMIZER = lambda gradients: gradients
UPHILL = optax.adamw(1e-3)
NEEDS_A_VALUE = optax.scale_by_polyak()
MASKED = optax.masked(optax.scale_by_adam(), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))


def scalar_square_root(remaining):
    return math.sqrt(remaining)


def square_root(remaining):
    return jnp.sqrt(remaining)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_optimizer_updates_follow_their_papers(optimizer, decay):
    """Adam of Kingma and Ba 2015 (arXiv 1412.6980), Lion of Chen et al. 2023 (2302.06675)."""
    graphdef, params = build()
    train_settings = settings(graphdef, optimizer=OPTIMIZERS[optimizer], weight_decay=decay)
    state = init_state(params, 1e-3, 0, OPTIMIZERS[optimizer]).opt_state
    update = jax.jit(
        lambda p, g, state: apply_gradients(p, g, state, jnp.float32(1e-3), train_settings)
    )
    rng = np.random.default_rng(0)
    expected = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
    first, second = ([np.zeros_like(p) for p in expected] for _ in range(2))
    for number in range(3):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        for i, g in enumerate(np.asarray(g, np.float64) for g in jax.tree.leaves(grads)):
            if optimizer == "lion":
                direction = np.sign(0.9 * first[i] + 0.1 * g)
                first[i] = 0.99 * first[i] + 0.01 * g
            else:
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g * g
                direction = first[i] / (1 - 0.9 ** (number + 1))
                direction /= np.sqrt(second[i] / (1 - 0.999 ** (number + 1))) + 1e-8
            expected[i] -= 1e-3 * (direction + (decay * expected[i] if expected[i].ndim > 1 else 0))
        params, state = update(params, grads, state)
        for p, value in zip(jax.tree.leaves(params), expected, strict=True):
            np.testing.assert_allclose(p, value, atol=1e-6)


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
def test_learning_rate_warms_up_and_follows_its_schedule(name, schedule, warmup):
    graphdef, _ = build()
    total = 10 + warmup
    train_settings = settings(
        graphdef,
        total_steps=total,
        warmup_steps=warmup,
        learning_rate_schedule=LEARNING_RATE_SCHEDULES[name],
    )
    actual = learning_rate_share(jnp.arange(total), train_settings)
    expected = [(step + 1) / warmup for step in range(warmup)]
    expected += [float(schedule(step)) for step in range(10)]
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "test_optimizers:ADAGRAD"])
def test_optimizer_state_is_split_among_device_groups_and_joined(optimizer):
    _, params = build()
    host = jax.tree.map(np.asarray, init_state(params, 1e-3, 0, OPTIMIZERS[optimizer]))
    groups = [DeviceGroup((0,), make_mesh(1, 1)), DeviceGroup((1,), make_mesh(1, 1))]
    parts = split_state(host, groups, EXITS)
    sizes = [sum(x.size for x in jax.tree.leaves(part.opt_state)) for part in parts]
    assert all(0 < size < sum(x.size for x in jax.tree.leaves(host.opt_state)) for size in sizes)
    joined = join_state(parts)
    assert jax.tree.structure(joined) == jax.tree.structure(host)
    jax.tree.map(np.testing.assert_array_equal, joined, host)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "test_optimizers:ADAGRAD"])
def test_optimizer_moments_are_sharded_over_devices(optimizer):
    _, params = build()
    host = jax.tree.map(np.asarray, init_state(params, 1e-3, 0, OPTIMIZERS[optimizer]))
    shardings = state_shardings(make_mesh(1, 4), host, 1)
    moments: list = []
    map_moments(moments.append, host.params, shardings.opt_state)
    assert len(moments) == {"adamw": 2}.get(optimizer, 1)
    for moment in moments:
        kernel = moment["encoder"]["layers"][0]["intermediate"]["kernel"]
        assert "data" in kernel.spec
    assert all(x.is_fully_replicated for x in jax.tree.leaves(shardings.params))


def test_initial_optimizer_state_may_be_nonzero(options):
    changes = {"optimizer": "test_optimizers:ADAGRAD", "seeds": (0, 1)}
    changes["learning_rate_schedule"] = "test_optimizers:square_root"
    job = prepare(from_mapping(options | changes))
    (spec,) = model_specs(job.config)
    graphdef, state = initial_state(job.config, job.checkpoint, spec, 2)
    for accumulator, param in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(state.params), strict=True
    ):
        assert accumulator.shape == param.shape
        assert (accumulator == 0.5).all()
    actual = step_settings(job.config, graphdef, spec.exits, 160)
    assert actual.optimizer.update is ADAGRAD.update
    assert actual.learning_rate_schedule(jnp.float32(0.25)) == 0.5


def test_invalid_optimizer_or_schedule_name_is_refused_before_training(options):
    with pytest.raises(UserError, match="unknown optimizer 'adam': did you mean 'adamw'"):
        from_mapping(options | {"optimizer": "adam"})
    with pytest.raises(UserError, match="unknown learning_rate_schedule 'poly'"):
        from_mapping(options | {"learning_rate_schedule": "poly"})
    with pytest.raises(UserError, match="'test_optimizers:NO_OPTIMIZER' is of type function, not"):
        prepare(from_mapping(options | {"optimizer": "test_optimizers:NO_OPTIMIZER"}))
    with pytest.raises(UserError, match="learning_rate_schedule 'absent:FUNCTION': ModuleNotFound"):
        prepare(from_mapping(options | {"learning_rate_schedule": "absent:FUNCTION"}))
    assert set(LEARNING_RATE_SCHEDULES) == {"linear", "cosine", "constant"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("UPHILL", "would increase the loss: .* use optax.scale_by_adam[(][)], for example"),
        ("NEEDS_A_VALUE", "cannot be used: TypeError: .*'value'"),
    ],
)
def test_unusable_optimizer_or_schedule_is_refused_before_training(options, name, words):
    job = prepare(from_mapping(options | {"optimizer": f"test_optimizers:{name}"}))
    (spec,) = model_specs(job.config)
    with pytest.raises(UserError, match=f"optimizer 'test_optimizers:{name}' {words}"):
        initial_state(job.config, job.checkpoint, spec, 2)
    changes = {"learning_rate_schedule": "test_optimizers:scalar_square_root"}
    with pytest.raises(
        UserError, match=r"scalar_square_root' failed: .*; use jax.numpy, and no branches"
    ):
        prepare(from_mapping(options | changes))


def test_state_without_the_structure_of_parameters_is_not_split():
    _, params = build()
    host = jax.tree.map(np.asarray, init_state(params, 1e-3, 0, MASKED))
    groups = [DeviceGroup((0,), make_mesh(1, 1)), DeviceGroup((1,), make_mesh(1, 1))]
    with pytest.raises(UserError, match="cannot be split among groups of devices"):
        split_state(host, groups, EXITS)


def test_step_settings_change_when_optimizer_name_is_reassigned(options, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "mine", ADAGRAD)
    job = prepare(from_mapping(options | {"optimizer": "mine"}))
    first = step_settings(job.config, None, (1,), 160)
    monkeypatch.setitem(OPTIMIZERS, "mine", optax.scale_by_rss())
    assert step_settings(job.config, None, (1,), 160) != first
    assert step_settings(job.config, None, (1,), 160) == step_settings(job.config, None, (1,), 160)


@pytest.mark.nightly
def test_checkpoint_of_older_release_with_adam_state_is_resumed(options, tmp_path):
    """Older releases store the optimizer state under the name "adam"."""
    job = prepare(from_mapping(options | {"max_steps": 2, "checkpoint_every": 1, "epochs": 2}))
    (spec,) = model_specs(job.config)
    fit(job.training_job(spec, tmp_path))
    folder = tmp_path / "checkpoints" / spec.name
    _, state = initial_state(job.config, job.checkpoint, spec, 2)
    state = drop_replica_axis(state, 1)
    checkpoints = Checkpoints(folder)
    abstract = abstract_state(state, replica_sharding(make_mesh(1, 8), 1))
    step, newest = checkpoints.restore(abstract)
    checkpoints.close()
    shutil.rmtree(folder)
    old_format = {"adam" if k == "opt_state" else k: v for k, v in newest._asdict().items()}
    checkpoints = Checkpoints(folder)
    checkpoints.save(step, old_format)
    restored_step, restored_state = restore_newest(checkpoints, abstract)
    checkpoints.close()
    assert restored_step == step == 2
    jax.tree.map(np.testing.assert_array_equal, restored_state, newest)
    lion = abstract_state(
        jax.tree.map(np.asarray, init_state(state.params, 0.0, 0, OPTIMIZERS["lion"])),
        replica_sharding(make_mesh(1, 8), 1),
    )
    checkpoints = Checkpoints(folder)
    with pytest.raises(UserError, match="has the state of another optimizer: set the optimizer"):
        restore_newest(checkpoints, lion)
    checkpoints.close()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_state_of_built_in_optimizers_starts_at_zero(name):
    _, params = build()
    assert check_optimizer(name, OPTIMIZERS[name], params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(OPTIMIZERS[name].init(params)))
