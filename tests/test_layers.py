"""Dropout, embedding, layer norm, softmax and GELU against their definitions and JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.random import threefry2x32_p
from jax.test_util import check_grads

from sweet_jax.models.dropout import dropout, threefry
from sweet_jax.models.embedding import (
    Embedding,
    embedding_rows,
    matmul_gradient,
    sparse_gradient,
)
from sweet_jax.models.layers import derive_key, gelu, layer_norm, masked_softmax

KEY = jax.random.key(7)


def test_threefry_equals_jax_primitive():
    high = jnp.arange(1000, dtype=jnp.uint32)
    low = high * jnp.uint32(2654435761)
    data = jax.random.key_data(KEY)
    words = [jnp.broadcast_to(word, high.shape) for word in data]
    expected_words = threefry2x32_p.bind(*words, high, low)
    for actual, expected in zip(threefry(data, high, low), expected_words, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_derived_keys_differ_by_name_and_compose():
    keys = [
        derive_key(KEY, "layer", 1),
        derive_key(KEY, "layer", 2),
        derive_key(KEY, "head", 1),
        derive_key(KEY),
    ]
    data = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
    assert len(data) == 4
    assert derive_key(KEY, "layer", 1) == derive_key(derive_key(KEY, "layer"), 1)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(rate):
    x = jnp.ones((64, 50, 130))
    y = np.asarray(dropout(KEY, x, rate, length_axes=(1,)))
    zeros = (y == 0).mean()
    assert abs(zeros - rate) < 4 * np.sqrt(rate * (1 - rate) / y.size)
    assert abs(y.mean() - 1) < 0.01
    np.testing.assert_allclose(y[y > 0], 1 / (1 - rate), rtol=1e-4)


def test_dropout_elements_are_independent_of_their_neighbours():
    kept = np.asarray(dropout(KEY, jnp.ones((32, 64, 64)), 0.5, length_axes=(1,))) > 0
    centred = kept.astype(float) - 0.5
    for axis in range(3):
        for shift in (1, 2, 3, 16):
            correlation = (centred * np.roll(centred, shift, axis)).mean() * 4
            assert abs(correlation) < 4 / np.sqrt(centred.size), (axis, shift)


def test_dropout_masks_do_not_depend_on_the_padded_length():
    short, long = jnp.ones((3, 4, 5, 5)), jnp.ones((3, 4, 9, 9))
    options = {"length_axes": (2, 3), "packed_axis": 1}
    cut = dropout(KEY, long, 0.3, **options)[:, :, :5, :5]
    np.testing.assert_array_equal(dropout(KEY, short, 0.3, **options), cut)
    cut = dropout(KEY, jnp.ones((3, 8, 6)), 0.3, length_axes=(1,))[:, :5]
    np.testing.assert_array_equal(dropout(KEY, jnp.ones((3, 5, 6)), 0.3, length_axes=(1,)), cut)


def test_dropout_is_identity_without_key_or_at_rate_zero():
    x = jnp.arange(6.0)
    assert dropout(None, x, 0.5) is x
    assert dropout(KEY, x, 0.0) is x


def test_layer_gradients_agree_with_finite_differences():
    x = jax.random.normal(KEY, (3, 5))
    scale, bias = jnp.linspace(0.5, 2, 5), jnp.linspace(-1, 1, 5)
    mask = jnp.array([[True, True, False, True, True]])
    cases = [
        (gelu, (3 * x,)),
        (lambda s: masked_softmax(s, mask), (x,)),
        (lambda *args: layer_norm(*args, 1e-12), (x, scale, bias)),
    ]
    for function, arguments in cases:
        check_grads(function, arguments, order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_custom_gradients_equal_those_of_jax():
    x = 2 * jax.random.normal(KEY, (4, 6))
    weight = jax.random.normal(derive_key(KEY, "weight"), (4, 6))
    mask = jnp.arange(6)[None] < jnp.array([6, 3, 1, 5])[:, None]

    def plain_norm(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)

    pairs = [
        (gelu, lambda x: jax.nn.gelu(x, approximate=False)),
        (
            lambda x: masked_softmax(x, mask),
            lambda x: jax.nn.softmax(jnp.where(mask, x, -1e30), axis=-1),
        ),
        (lambda x: layer_norm(x, jnp.ones(6), jnp.zeros(6), 1e-12), plain_norm),
    ]
    for function, reference in pairs:
        np.testing.assert_allclose(function(x), reference(x), atol=2e-6)
        gradients = [
            jax.grad(lambda x, f=f: (f(x) * weight).sum())(x) for f in (function, reference)
        ]
        np.testing.assert_allclose(*gradients, atol=3e-6)


def test_masked_softmax_is_uniform_for_row_without_tokens():
    weights = masked_softmax(jnp.ones((2, 3)), jnp.array([[False] * 3, [True] * 3]))
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_layers_return_bfloat16_for_bfloat16_input():
    x = jnp.ones((2, 4), jnp.bfloat16)
    assert layer_norm(x, jnp.ones(4), jnp.zeros(4), 1e-12).dtype == jnp.bfloat16
    assert dropout(KEY, x, 0.5).dtype == jnp.bfloat16
    gradient = jax.grad(lambda x: masked_softmax(x, jnp.ones((2, 4), bool)).sum())(x)
    assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize("rows", [2, 50])
def test_embedding_gradient_is_equal_in_every_implementation(rows):
    """Those of accelerators are called directly, as the tests run on CPUs."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(rows, 8)), jnp.float32)  # [V, H]
    ids = jnp.asarray(rng.integers(0, rows, (3, 40)), jnp.int32)  # [B, L]
    g = jnp.asarray(rng.normal(size=(3, 40, 8)), jnp.float32)  # [B, L, H]
    g = g.at[:, 25:].set(0.0)  # padding
    expected = np.zeros((rows, 8))
    np.add.at(expected, np.asarray(ids), np.asarray(g, np.float64))
    (cpu_gradient,) = jax.vjp(lambda t: embedding_rows(t, ids), table)[1](g)
    for gradient in (cpu_gradient, matmul_gradient(table, ids, g), sparse_gradient(table, ids, g)):
        np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize(("rows", "operation"), [(2, "dot_general"), (50, "scatter")])
def test_accelerator_gradient_of_small_embedding_has_no_scatter(rows, operation):
    table, ids = jnp.zeros((rows, 8)), jnp.zeros((3, 5), jnp.int32)
    gradient = jax.jit(jax.grad(lambda t: jnp.sin(embedding_rows(t, ids)).sum()))
    for platform in ("cuda", "tpu"):
        program = gradient.trace(table).lower(lowering_platforms=(platform,)).as_text()
        assert operation in program
        assert ("scatter" in program) == (operation == "scatter")


def test_embedding_gradient_is_summed_in_float32_for_bfloat16_activations():
    """The sum of 4,096 ones would stop at 256 in bfloat16."""
    table = Embedding(2, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(table)
    ids = jnp.zeros((16, 256), jnp.int32)
    total = lambda params: nnx.merge(graphdef, params)(ids).astype(jnp.float32).sum()
    (gradient,) = jax.tree.leaves(jax.grad(total)(params))
    np.testing.assert_array_equal(gradient, [[4096.0] * 8, [0.0] * 8])
