"""Parity with Hugging Face: hidden states and gradients, from committed golden files."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import ENCODERS, TINIES

from sweet_jax import load_encoder
from sweet_jax.errors import UserError
from sweet_jax.models.attention import check_attention, fused_attention, supports_shape
from sweet_jax.models.bert import BertConfig
from sweet_jax.models.deberta_v2 import log_bucket
from sweet_jax.models.disentangled_attention import along_diagonals
from sweet_jax.models.families import FAMILIES
from sweet_jax.models.mpnet import distance_bucket
from sweet_jax.models.pretrained import hidden_states, open_checkpoint
from sweet_jax.models.tensor_names import is_transposed, path_keys

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
SLOW = ("albert_wide", "camembert_small", "electra_wide", "modernbert_biased", "mpnet_long")
SLOW += ("bert_wide", "deberta_p2c", "deberta_v2_grouped", "distilbert_sinusoidal")
SLOW += ("deberta_absolute", "deberta_v2_xlarge", "xlm_roberta_small")


def read_golden(name: str):
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return open_checkpoint(str(GOLDEN / name)), dict(arrays)


@pytest.mark.parametrize("kind", ENCODERS)
def test_token_types_are_ignored_when_config_has_one_type(kind):
    """A tokenizer may still give a second text the type 1, an index error in Hugging Face."""
    config = dataclasses.replace(TINIES[kind], type_vocab_size=1)
    encoder = FAMILIES[kind].encoder(config, jax.random.key(0))
    ids, types = jnp.asarray([[1, 2, 3, 4]]), jnp.asarray([[0, 0, 1, 1]])
    actual, expected = (encoder.embed(ids, t, ids > 0) for t in (types, types * 0))
    assert np.isfinite(actual).all()
    np.testing.assert_array_equal(actual, expected)


def test_every_model_type_has_golden_files():
    assert {read_golden(name)[0].model_type for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NAMES]
)
def test_hidden_states_and_gradients_equal_hugging_face(name):
    checkpoint, arrays = read_golden(name)
    graphdef = nnx.split(checkpoint.encoder(jax.random.key(0)))[0]
    present = arrays["attention_mask"].astype(bool)

    def loss(params):
        encoder = nnx.merge(graphdef, params)
        hidden = hidden_states(encoder, arrays["input_ids"], present, arrays["token_type_ids"])
        return (jnp.stack(hidden) * arrays["cotangent"]).sum(), hidden

    # Optimized as for users, because the last digits depend on it; conftest.py turns that off.
    options = {"xla_backend_optimization_level": 3}
    compiled = jax.jit(jax.grad(loss, has_aux=True), compiler_options=options)
    grads, hidden = compiled(checkpoint.weights.encoder)
    for actual, expected in zip(hidden, arrays["hidden"], strict=True):
        actual = np.asarray(actual)
        np.testing.assert_allclose(actual[present], expected[present], rtol=0, atol=TOLERANCE)
        assert np.all(np.isfinite(actual))
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    assert len(leaves) == sum(key.startswith("grad/") for key in arrays)
    for path, actual in leaves:
        key = checkpoint.family.names.name(path_keys(path))
        expected = arrays[f"grad/{key}"]
        expected = expected.T if is_transposed(path_keys(path)) else expected
        # Gradients sum over tokens: relative to the tensor's largest entry if that is above 1.
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * scale, err_msg=key)


@pytest.mark.parametrize(
    "name", ["bert_small", "roberta_small", "deberta_base", "deberta_v3", "distilbert_small"]
)
def test_load_encoder_returns_all_hidden_states_of_hugging_face(name):
    checkpoint, arrays = read_golden(name)
    inputs = [arrays[k] for k in ("input_ids", "attention_mask", "token_type_ids")]
    hidden = load_encoder(str(checkpoint.folder))(*inputs)
    present = inputs[1].astype(bool)
    assert len(hidden) == checkpoint.depth + 1
    for actual, expected in zip(hidden, arrays["hidden"], strict=True):
        np.testing.assert_allclose(
            np.asarray(actual)[present], expected[present], rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize(
    "name",
    [
        "roberta_small",
        *(
            pytest.param(n, marks=pytest.mark.nightly)
            for n in ("deberta_v2_xlarge", "deberta_base", "mpnet_small")
        ),
    ],
)
def test_extra_padding_does_not_change_hidden_states_with_dropout(name):
    checkpoint, arrays = read_golden(name)
    graphdef = nnx.split(checkpoint.encoder(jax.random.key(0)))[0]
    ids, types = arrays["input_ids"][1:], arrays["token_type_ids"][1:]
    mask = arrays["attention_mask"][1:].astype(bool)  # these rows have 9, 1 and 13 tokens

    @jax.jit
    def last_hidden(params, key, ids, types, mask):
        encoder = nnx.merge(graphdef, params)
        h, relative = encoder.embed(ids, types, mask, key), encoder.relative_table()
        for number in range(1, checkpoint.depth + 1):
            h = encoder.layer(number, h, mask, key, relative)
        return h

    params, key = checkpoint.weights.encoder, jax.random.key(4)
    padded = np.asarray(last_hidden(params, key, ids, types, mask))[:, :13]
    trimmed = np.asarray(last_hidden(params, key, ids[:, :13], types[:, :13], mask[:, :13]))
    present = mask[:, :13]
    np.testing.assert_allclose(trimmed[present], padded[present], rtol=0, atol=TOLERANCE)
    assert np.abs(arrays["hidden"][-1][1:, :13] - padded)[present].max() > 0.1


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "bert" else pytest.mark.slow) for k in ENCODERS]
)
@pytest.mark.parametrize(
    "key",
    # Tests of the engines compare them without dropout too.
    [pytest.param(None, marks=pytest.mark.slow), jax.random.key(4)],
    ids=["inference", "dropout"],
)
def test_layer_of_first_tokens_equals_start_of_whole_layer(kind, key):
    encoder = FAMILIES[kind].encoder(TINIES[kind], jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (3, 9), 3, TINIES[kind].vocab_size)
    mask = jnp.arange(9)[None] < jnp.array([9, 4, 1])[:, None]
    h, relative = encoder.embed(ids, jnp.zeros_like(ids), mask, key), encoder.relative_table()
    for number in (1, 2):
        whole = encoder.layer(number, h, mask, key, relative)
        for count in (1, 3, 9):
            part = encoder.layer(number, h, mask, key, relative, count=count)
            assert part.shape == (3, count, h.shape[-1])
            np.testing.assert_allclose(part, whole[:, :count], rtol=0, atol=2e-6)
        h = whole


@pytest.mark.parametrize("kind", ["bert", pytest.param("roberta", marks=pytest.mark.nightly)])
def test_fused_attention_equals_einsum_attention_and_its_gradients(kind):
    """Compares the values at the tokens, for all queries and the first few, and every gradient."""
    config = dataclasses.replace(TINIES[kind], attention_probs_dropout_prob=0.0)
    encoder = FAMILIES[kind].encoder(config, jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (4, 9, config.hidden_size))
    mask = jnp.arange(9)[None] < jnp.array([9, 4, 1, 0])[:, None]
    key = jax.random.key(2)  # dropout of hidden states stays on

    def layer(values, h, graphdef, count):
        out = nnx.merge(graphdef, values).layer(2, h, mask, key, count=count)
        return (jnp.sin(out) * mask[:, : out.shape[1], None]).sum(), out

    for count in (None, 1, 3):
        results = []
        for implementation in ("einsum", "xla"):
            encoder.set_attention(implementation)
            graphdef, values = nnx.split(encoder)
            function = jax.value_and_grad(layer, argnums=(0, 1), has_aux=True)
            (_, out), grads = jax.jit(function, static_argnums=(2, 3))(
                values, hidden, graphdef, count
            )
            results.append((out[:3], grads))
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            assert np.all(np.isfinite(b))
            np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_cudnn_attention_supports_only_even_shapes():
    assert supports_shape("cudnn", 64, 64)
    assert not supports_shape("cudnn", 1, 64)
    assert not supports_shape("cudnn", 33, 33)
    assert supports_shape("xla", 1, 33)


def test_cudnn_attention_and_gradient_are_lowered_for_cuda(monkeypatch):
    """Without a GPU only lowering is tested: it accepts the shapes, the mask and the gradient."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    q = jax.ShapeDtypeStruct((4, 32, 12, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((4, 32), bool)

    def loss(q, k, v, mask):
        return fused_attention(q, k, v, mask, implementation="cudnn").astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(q, q, q, mask).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "add --config.attention_dropout=off"),
        ({"dropout": 0.0}, "JAX runs on cpu: remove it, or set it to xla"),
        ({"dropout": 0.0, "backend": "gpu"}, "add --config.dtype=bfloat16"),
        (
            {"model_type": "deberta-v2"},
            "scores have terms for relative positions; remove attention from the config",
        ),
        ({"dropout": 0.0, "backend": "gpu", "dtype": "bfloat16", "heads": 64}, "have size 12"),
        ({"dropout": 0.0, "backend": "gpu", "dtype": "bfloat16"}, None),
        ({"attention": "xla"}, "add --config.attention_dropout=off"),
        ({"attention": "xla", "dropout": 0.0}, None),
        ({"attention": "einsum", "model_type": "deberta"}, None),
    ],
)
def test_check_attention_refuses_unsupported_implementations(values, message):
    values = {"attention": "cudnn", "model_type": "bert", "backend": "cpu", **values}
    config = BertConfig(
        attention_probs_dropout_prob=values.get("dropout", 0.1),
        num_attention_heads=values.get("heads", 12),
    )
    outcome = pytest.raises(UserError, match=message) if message else contextlib.nullcontext()
    with outcome:
        check_attention(
            values["attention"],
            "some/model",
            obstacle=FAMILIES[values["model_type"]].fused_attention_obstacle,
            config=config,
            dtype=values.get("dtype", "float32"),
            backend=values["backend"],
        )


def test_layer_of_first_token_takes_less_than_a_third_of_flops():
    encoder = FAMILIES["bert"].encoder(TINIES["bert"], jax.random.key(0))
    graphdef, values = nnx.split(encoder)
    hidden, mask = jnp.ones((2, 64, encoder.config.hidden_size)), jnp.ones((2, 64), bool)

    def flops(count):
        run = jax.jit(lambda v: nnx.merge(graphdef, v).layer(1, hidden, mask, count=count))
        return run.lower(values).compile().cost_analysis()["flops"]

    assert flops(1) < 0.3 * flops(None)


def test_relative_position_buckets_equal_hugging_face():
    with np.load(GOLDEN / "buckets.npz") as arrays:
        distances = arrays["distances"]
        # transformers takes query minus key position for DeBERTa, key minus query for MPNet.
        np.testing.assert_array_equal(distance_bucket(distances), arrays["mpnet"])
        names = [name for name in arrays if name not in ("distances", "mpnet")]
        assert "256_512" in names
        for name in names:
            actual = log_bucket(distances, *map(int, name.split("_")))
            np.testing.assert_array_equal(actual, arrays[name], err_msg=name)


@pytest.mark.parametrize(("count", "length"), [(1, 1), (2, 2), (1, 2), (5, 5), (1, 5), (3, 5)])
def test_along_diagonals_reads_entry_of_each_relative_position(count, length):
    x = np.arange(3 * count * 2 * length).reshape(3, count, 2 * length)
    y = along_diagonals(jnp.asarray(x))
    assert y.shape == (3, count, length)
    for i in range(count):
        for j in range(length):
            np.testing.assert_array_equal(y[:, i, j], x[:, i, length - 1 + j - i])
