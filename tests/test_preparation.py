"""Tests of the preparation of a run: what is read, checked and initialized before training."""

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import write_checkpoint, write_rows

from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.models.layers import derive_key
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.preparation import prepare
from sweet_jax.training.initialization import initial_state, make_model, model_specs


def test_models_start_from_weights_read_during_preparation(options, tmp_path):
    folder, rows = write_checkpoint(tmp_path / "tiny"), write_rows(tmp_path / "rows.csv", 60)
    values = options | {"checkpoint": str(folder), "data_files": str(rows), "train_size": 40}
    job = prepare(from_mapping(values | {"method": "multi_model"}))
    assert job.digest == job.dataset.digest()
    weights = open_checkpoint(str(folder)).weights.encoder
    (folder / "model.safetensors").unlink()
    rows.unlink()
    specs = model_specs(job.config)
    assert [spec.exits for spec in specs] == [(1,), (2,), (3,)]
    for spec in specs:
        _, state = initial_state(job.config, job.checkpoint, spec, len(job.dataset.classes))
        actual = jax.tree.map(lambda x: x[0], state.params["encoder"])
        depth = spec.exits[-1]
        assert list(actual["layers"]) == list(range(depth))
        expected = {**weights, "layers": {i: weights["layers"][i] for i in range(depth)}}
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def wrong_shape_policy(outputs, temperatures):
    return np.ones(3)


def test_invalid_policy_is_refused_before_training(options):
    policy = {"confidence": "test_preparation:wrong_shape_policy"}
    with pytest.raises(UserError, match=r"must return confidences .* = \(1, 3, 2\); got \(3,\)"):
        prepare(from_mapping(options | policy))
    regression = from_mapping(options | policy | {"objective": "regression"}).resolved()
    assert regression.policy == policy["confidence"]


@pytest.mark.parametrize("policy", ["entropy", "patience", "pcee"])
def test_builtin_policy_can_be_set_as_the_confidence_of_a_run(options, policy):
    assert prepare(from_mapping(options | {"confidence": policy})).config.policy == policy


def test_initial_state_has_the_random_heads_of_its_seed_and_zero_moments(options):
    job = prepare(from_mapping(options | {"seeds": (3, 5), "learning_rates": (1e-3, 2e-3)}))
    (spec,) = model_specs(job.config)
    _, state = initial_state(job.config, job.checkpoint, spec, 2)
    assert state.seed.tolist() == [3, 3, 5, 5]
    np.testing.assert_allclose(state.learning_rate, [1e-3, 2e-3] * 2)
    for moments in (state.opt_state.mu, state.opt_state.nu):
        assert jax.tree.map(np.shape, moments) == jax.tree.map(np.shape, state.params)
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
    key = derive_key(jax.random.key(5), "parameters")
    model = make_model(job.config, job.checkpoint, spec.exits, 2, key)
    heads = nnx.to_pure_dict(nnx.split(model)[1])["heads"]
    for head in heads.values():
        head.pop("pooler", None)  # which is read from the checkpoint
    initial_heads = {layer: dict(head) for layer, head in state.params["heads"].items()}
    for head in initial_heads.values():
        head.pop("pooler", None)

    def assert_third_replica_equals(actual: np.ndarray, expected: jax.Array) -> None:
        np.testing.assert_allclose(actual[2], expected, rtol=1e-6)

    jax.tree.map(assert_third_replica_equals, initial_heads, heads)
