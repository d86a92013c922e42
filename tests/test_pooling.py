"""Tests of mean pooling, and of the choice between mean and first-token pooling."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TINIES, write_checkpoint

from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.families import FAMILIES
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.pooling import declared_pooling, mean_of_tokens
from sweet_jax.models.pretrained import hidden_states
from sweet_jax.preparation import prepare

MASK = np.arange(6)[None] < np.array([6, 3, 1, 0])[:, None]


def test_mean_pooling_averages_the_tokens_of_each_row():
    h = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    pooled = mean_of_tokens(jnp.asarray(h), jnp.asarray(MASK))
    for row, count in enumerate((6, 3, 1)):
        np.testing.assert_allclose(pooled[row], h[row, :count].mean(axis=0), rtol=1e-6, atol=1e-6)
    assert not np.any(pooled[3])  # a row without tokens, which only fills up the batch


def test_mean_pooling_ignores_padding_and_gives_it_no_gradient():
    h = jax.random.normal(jax.random.key(0), (4, 6, 5))
    nan_at_padding = jnp.where(MASK[..., None], h, jnp.nan)
    mask = jnp.asarray(MASK)
    np.testing.assert_array_equal(mean_of_tokens(nan_at_padding, mask), mean_of_tokens(h, mask))
    gradient = jax.grad(lambda h: (mean_of_tokens(h, mask) ** 2).sum())(h)
    assert np.isfinite(gradient).all()
    assert not np.any(np.where(MASK[..., None], 0, gradient))


def test_mean_pooling_of_bfloat16_is_summed_in_float32():
    h = jnp.full((1, 512, 1), 1.0, jnp.bfloat16).at[0, 0].set(256.0)
    pooled = mean_of_tokens(h, jnp.ones((1, 512), bool))
    assert pooled.dtype == jnp.bfloat16
    assert float(pooled[0, 0]) == float(jnp.bfloat16((256 + 511) / 512))


@pytest.mark.parametrize("kind", ["bert", pytest.param("deberta-v2", marks=pytest.mark.slow)])
def test_exits_classify_the_mean_of_their_layer(kind):
    """Compares with hidden states of the encoder by itself, at two padded lengths."""
    key = jax.random.key(3)
    encoder = FAMILIES[kind].encoder(TINIES[kind], key)
    graphdef, values = nnx.split(EarlyExit(encoder, (1, 3), 2, key, ExitConfig("mean")))
    params = nnx.to_pure_dict(values)
    assert all(set(head) == {"classifier"} for head in params["heads"].values())
    ids = jax.random.randint(key, (4, 6), 5, 40)
    outputs = {}
    for length in (6, 9):
        batch = {
            "input_ids": jnp.pad(ids, ((0, 0), (0, length - 6))),
            "token_type_ids": jnp.zeros((4, length), jnp.int32),
            "mask": jnp.pad(jnp.asarray(MASK), ((0, 0), (0, length - 6))),
        }
        run = jax.jit(lambda p, b: nnx.merge(graphdef, p).forward(b, 1.0, features=True))
        outputs[length] = run(params, batch)
        run_encoder = jax.jit(lambda p, *b: hidden_states(nnx.merge(graphdef, p).encoder, *b))
        states = run_encoder(params, *encoder_arguments(batch))
        for e, layer in enumerate((1, 3)):
            pooled = mean_of_tokens(states[layer], batch["mask"])
            classifier = jax.tree.map(np.asarray, params["heads"][str(layer)]["classifier"])
            logits = np.asarray(pooled) @ classifier["kernel"] + classifier["bias"]
            np.testing.assert_allclose(outputs[length].features[e], pooled, atol=1e-5)
            np.testing.assert_allclose(outputs[length].logits[e], logits, atol=1e-5)
    gap = np.abs(outputs[6].logits - outputs[9].logits)[:, :3]
    assert gap.max() < 1e-5


def encoder_arguments(batch):
    return batch["input_ids"], batch["mask"], batch["token_type_ids"]


def declare(folder, pooling, text=None):
    """Writes the files of sentence-transformers that declare a pooling; text: modules.json."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    default_modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(text or json.dumps(default_modules))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode": "cls"}, "first"),
        ({"pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, None),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, None),
        ({"pooling_mode": "lasttoken"}, None),
        ({"pooling_mode": ["mean", "cls"]}, None),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_declared_pooling_of_sentence_transformers(tmp_path, pooling, expected):
    assert declared_pooling(tmp_path) is None
    declare(tmp_path, pooling)
    assert declared_pooling(tmp_path) == expected


@pytest.mark.parametrize("text", ["[", "{}x", '{"type": 1}', '["a"]'])
def test_unreadable_pooling_declaration_is_refused(tmp_path, text):
    declare(tmp_path, {}, text=text)
    with pytest.raises(UserError, match=r"modules\.json"):
        declared_pooling(tmp_path)


def test_pooling_of_a_run_follows_config_then_preset_then_checkpoint(options, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    options |= {"checkpoint": str(folder), "pooling": ""}
    assert prepare(from_mapping(options)).config.pooling == "mean"  # the default
    declare(folder, {"pooling_mode": "cls"})
    assert prepare(from_mapping(options)).config.pooling == "first"
    declare(folder, {"pooling_mode": "mean"})
    assert prepare(from_mapping(options)).config.pooling == "mean"
    assert prepare(from_mapping(options | {"pooling": "auto"})).config.pooling == "mean"
    for preset in ("paper", "reference"):
        for pooling in ("", "auto"):
            values = options | {"preset": preset, "pooling": pooling}
            assert prepare(from_mapping(values)).config.pooling == "first"
    assert prepare(from_mapping(options | {"pooling": "first"})).config.pooling == "first"
