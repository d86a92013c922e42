"""Layer scaling: which share of what training changed each layer keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_early_exit import build

from sweet_jax.config import from_mapping
from sweet_jax.pipeline import run
from sweet_jax.training.checkpoint import read_params
from sweet_jax.training.layer_scaling import scale_layer_updates


def shares(kind: str, first: float, exits=(1, 3)) -> dict:
    """The share that each part of a model with two replicas keeps of a change of 2 and of 4."""
    _, params = build(exits, kind)
    start = jax.tree.map(np.asarray, params)
    trained = jax.tree.map(lambda x: jnp.stack([x + 2, x + 4]), params)
    scaled = scale_layer_updates(trained, start["encoder"], exits[-1], first)
    found: dict = {}
    for (path, after), before in zip(
        jax.tree_util.tree_leaves_with_path(scaled), jax.tree.leaves(start), strict=True
    ):
        names = tuple(part.key for part in path)
        place = names[2] if names[:2] == ("encoder", "layers") else names[:2]
        share = (np.asarray(after) - before) / np.reshape([2, 4], (2, *[1] * before.ndim))
        found.setdefault(place, set()).update(np.round(share.ravel(), 4).tolist())
    return found


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_the_share_rises_from_the_first_layer_to_the_last(kind):
    found = shares(kind, 0.4)
    assert {place: found.pop(place) for place in (0, 1, 2)} == {0: {0.4}, 1: {0.7}, 2: {1.0}}
    heads = {place for place in found if place[0] == "heads"}
    below = found.keys() - heads
    assert (("encoder", "relative") in below) == (kind == "mpnet")
    assert {place: found[place] for place in heads} == {key: {1.0} for key in heads}
    assert {place: found[place] for place in below} == {key: {0.1} for key in below}


def test_one_layer_keeps_all_and_so_does_albert_s_but_for_its_embeddings():
    assert shares("bert", 0.4, exits=(1,))[0] == {1.0}
    found = shares("albert", 0.4)
    assert found[("encoder", "shared_layer")] == {1.0}
    assert found[("encoder", "embeddings")] == {0.1}
    assert shares("bert", 0.1)[("encoder", "embeddings")] == {0.0}


def test_what_keeps_all_is_the_same_to_the_last_bit():
    _, params = build()
    trained = jax.tree.map(lambda x: (x * 1.1)[None], params)
    scaled = scale_layer_updates(trained, params["encoder"], 3, 0.0)
    for name, same in ((2, True), (1, False)):
        pairs = [jax.tree.leaves(tree["encoder"]["layers"][name]) for tree in (trained, scaled)]
        assert all(np.array_equal(a, b) for a, b in zip(*pairs, strict=True)) == same
    # The first layer is the pretrained one again, and one that diverged stays so.
    first = scaled["encoder"]["layers"][0], params["encoder"]["layers"][0]
    for a, b in zip(*map(jax.tree.leaves, first), strict=True):
        np.testing.assert_array_equal(a[0], b)
    bad = jax.tree.map(lambda x: x * jnp.nan, trained)
    leaves = jax.tree.leaves(scale_layer_updates(bad, params["encoder"], 3, 0.0)["encoder"])
    assert all(np.isnan(leaf).all() for leaf in leaves)


def test_a_run_saves_the_scaled_layers(options, tmp_path, one_device):
    """Its checkpoint has them as they were trained."""
    fitted = {"epochs": 1, "head_refit": True, "tuning_fraction": 0.2, "baselines": "none"}
    run(from_mapping(options | fitted | {"layer_scaling": 0.25}), tmp_path)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    start = load_file(f"{options['checkpoint']}/model.safetensors")
    trained = read_params(tmp_path / "checkpoints" / "exits_1_2_3")
    for layer, share in ((0, 0.25), (1, 0.625), (2, 1.0)):
        name = next(n for n in saved if f"layer.{layer}.output.dense.bias" in n)
        begin = next(value for other, value in start.items() if other.endswith(name))
        bias = trained["encoder"]["layers"][str(layer)]["output"]["bias"]
        assert np.abs(bias - begin).max() > 1e-5
        np.testing.assert_allclose(saved[name], begin + share * (bias - begin), atol=1e-7)
