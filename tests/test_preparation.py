"""What is prepared is read once: a run needs the files of its config no more."""

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


def test_models_start_from_the_weights_that_were_prepared(options, tmp_path):
    folder, path = write_checkpoint(tmp_path / "tiny"), write_rows(tmp_path / "rows.csv", 60)
    values = options | {"checkpoint": str(folder), "data_files": str(path), "train_size": 40}
    job = prepare(from_mapping(values | {"method": "multi_model"}))
    assert job.digest == job.dataset.digest()
    wanted = open_checkpoint(str(folder)).weights.encoder
    (folder / "model.safetensors").unlink()
    path.unlink()
    specs = model_specs(job.config)
    assert [spec.exits for spec in specs] == [(1,), (2,), (3,)]
    for spec in specs:
        _, state = initial_state(job.config, job.checkpoint, spec, len(job.dataset.classes))
        found = jax.tree.map(lambda x: x[0], state.params["encoder"])
        depth = spec.exits[-1]
        assert list(found["layers"]) == list(range(depth))
        expected = {**wanted, "layers": {i: wanted["layers"][i] for i in range(depth)}}
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def constant(outputs, temperatures):
    return np.ones(3)


def test_a_policy_that_fails_is_found_before_training(options):
    own = {"confidence": "test_preparation:constant"}
    with pytest.raises(UserError, match=r"must return confidences .* = \(1, 3, 2\); got \(3,\)"):
        prepare(from_mapping(options | own))
    number = from_mapping(options | own | {"objective": "regression"}).resolved()
    assert number.policy == own["confidence"]


@pytest.mark.parametrize("policy", ["entropy", "patience", "pcee"])
def test_every_policy_of_classes_can_be_a_run_s_own(options, policy):
    assert prepare(from_mapping(options | {"confidence": policy})).config.policy == policy


def test_heads_are_those_that_a_whole_random_model_has_and_moments_are_zero(options):
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
        head.pop("pooler", None)  # the checkpoint's
    drawn = {layer: dict(head) for layer, head in state.params["heads"].items()}
    for head in drawn.values():
        head.pop("pooler", None)

    def equal(ours: np.ndarray, theirs: jax.Array) -> None:
        np.testing.assert_allclose(ours[2], theirs, rtol=1e-6)

    jax.tree.map(equal, drawn, heads)
