"""Layer scaling: the share of its trained update that each layer keeps."""

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


def kept_shares(kind: str, first: float, exits=(1, 3)) -> dict:
    """Returns the shares that each part keeps of updates of 2 and 4 in two replicas."""
    _, params = build(exits, kind)
    pretrained = jax.tree.map(np.asarray, params)
    trained = jax.tree.map(lambda x: jnp.stack([x + 2, x + 4]), params)
    scaled = scale_layer_updates(trained, pretrained["encoder"], exits[-1], first)
    shares: dict = {}
    for (path, after), before in zip(
        jax.tree_util.tree_leaves_with_path(scaled), jax.tree.leaves(pretrained), strict=True
    ):
        names = tuple(entry.key for entry in path)
        part = names[2] if names[:2] == ("encoder", "layers") else names[:2]
        share = (np.asarray(after) - before) / np.reshape([2, 4], (2, *[1] * before.ndim))
        shares.setdefault(part, set()).update(np.round(share.ravel(), 4).tolist())
    return shares


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_kept_share_rises_linearly_from_first_to_last_layer(kind):
    kept = kept_shares(kind, 0.4)
    assert {part: kept.pop(part) for part in (0, 1, 2)} == {0: {0.4}, 1: {0.7}, 2: {1.0}}
    heads = {part for part in kept if part[0] == "heads"}
    others = kept.keys() - heads
    assert (("encoder", "relative") in others) == (kind == "mpnet")
    assert {part: kept[part] for part in heads} == {part: {1.0} for part in heads}
    assert {part: kept[part] for part in others} == {part: {0.1} for part in others}


def test_single_and_shared_layers_keep_the_whole_update():
    assert kept_shares("bert", 0.4, exits=(1,))[0] == {1.0}
    kept = kept_shares("albert", 0.4)
    assert kept[("encoder", "shared_layer")] == {1.0}
    assert kept[("encoder", "embeddings")] == {0.1}
    assert kept_shares("bert", 0.1)[("encoder", "embeddings")] == {0.0}


def test_share_one_is_bitwise_identity_and_share_zero_restores_start():
    _, params = build()
    trained = jax.tree.map(lambda x: (x * 1.1)[None], params)
    scaled = scale_layer_updates(trained, params["encoder"], 3, 0.0)
    for layer, same in ((2, True), (1, False)):
        pairs = [jax.tree.leaves(tree["encoder"]["layers"][layer]) for tree in (trained, scaled)]
        assert all(np.array_equal(a, b) for a, b in zip(*pairs, strict=True)) == same
    # The first layer is the pretrained one again; a diverged model stays NaN.
    first_layers = scaled["encoder"]["layers"][0], params["encoder"]["layers"][0]
    for a, b in zip(*map(jax.tree.leaves, first_layers), strict=True):
        np.testing.assert_array_equal(a[0], b)
    diverged = jax.tree.map(lambda x: x * jnp.nan, trained)
    leaves = jax.tree.leaves(scale_layer_updates(diverged, params["encoder"], 3, 0.0)["encoder"])
    assert all(np.isnan(leaf).all() for leaf in leaves)


def test_saved_model_has_scaled_layers_and_checkpoint_unscaled_ones(options, tmp_path, one_device):
    changes = {"epochs": 1, "head_refit": True, "tuning_fraction": 0.2, "baselines": "none"}
    run(from_mapping(options | changes | {"layer_scaling": 0.25}), tmp_path)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    pretrained = load_file(f"{options['checkpoint']}/model.safetensors")
    trained = read_params(tmp_path / "checkpoints" / "exits_1_2_3")
    for layer, share in ((0, 0.25), (1, 0.625), (2, 1.0)):
        name = next(n for n in saved if f"layer.{layer}.output.dense.bias" in n)
        before = next(value for key, value in pretrained.items() if key.endswith(name))
        bias = trained["encoder"]["layers"][str(layer)]["output"]["bias"]
        assert np.abs(bias - before).max() > 1e-5
        np.testing.assert_allclose(saved[name], before + share * (bias - before), atol=1e-7)
