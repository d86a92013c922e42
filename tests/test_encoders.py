"""Parity with Hugging Face: hidden states and gradients, from committed golden files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sweet_jax import load_encoder
from sweet_jax.models.deberta import along_diagonals, log_bucket
from sweet_jax.models.names import hugging_face_name, is_matrix
from sweet_jax.models.pretrained import ENCODERS, hidden_states, open_checkpoint, read_encoder

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))


@pytest.fixture(params=NAMES)
def golden(request):
    folder = GOLDEN / request.param
    with np.load(folder / "golden.npz") as arrays:
        return folder, dict(arrays)


def test_every_model_type_has_golden_files():
    found = {open_checkpoint(str(GOLDEN / name)).model_type for name in NAMES}
    assert found == set(ENCODERS)


def test_hidden_states_equal_hugging_face(golden):
    folder, arrays = golden
    inputs = [arrays[k] for k in ("input_ids", "attention_mask", "token_type_ids")]
    hidden = load_encoder(str(folder))(*inputs)
    assert len(hidden) == len(arrays["hidden"])
    present = arrays["attention_mask"].astype(bool)
    for ours, theirs in zip(hidden, arrays["hidden"], strict=True):
        ours = np.asarray(ours)
        np.testing.assert_allclose(ours[present], theirs[present], rtol=0, atol=TOLERANCE)
        assert np.all(np.isfinite(ours))


def test_gradients_equal_hugging_face(golden):
    folder, arrays = golden
    checkpoint = open_checkpoint(str(folder))
    graphdef = nnx.split(checkpoint.encoder(jax.random.key(0)))[0]
    mask = jnp.asarray(arrays["attention_mask"], bool)

    def loss(params):
        encoder = nnx.merge(graphdef, params)
        hidden = hidden_states(encoder, arrays["input_ids"], mask, arrays["token_type_ids"])
        return (jnp.stack(hidden) * arrays["cotangent"]).sum()

    grads = jax.jit(jax.grad(loss))(read_encoder(checkpoint)[0])
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    assert len(leaves) == sum(name.startswith("grad/") for name in arrays)
    for path, ours in leaves:
        name = hugging_face_name(tuple(p.key for p in path))
        theirs = arrays[f"grad/{name}"]
        theirs = theirs.T if is_matrix(name) else theirs
        # Sums over tens of tokens: relative to the tensor's largest entry where that is above 1.
        scale = max(1.0, float(np.abs(theirs).max()))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * scale, err_msg=name)


def test_padding_further_changes_nothing_at_the_tokens(golden):
    folder, arrays = golden
    encoder = load_encoder(str(folder))
    ids, mask, types = (arrays[k] for k in ("input_ids", "attention_mask", "token_type_ids"))
    short = slice(1, 4), slice(0, 13)  # these rows have 9, 1 and 13 tokens
    few = encoder(ids[short], mask[short], types[short])
    many = encoder(ids[1:], mask[1:], types[1:])
    present = mask[short].astype(bool)
    for ours, theirs in zip(few, many, strict=True):
        theirs = np.asarray(theirs)[:, :13]
        np.testing.assert_allclose(np.asarray(ours)[present], theirs[present], rtol=0, atol=5e-6)


def test_dropout_does_not_depend_on_the_padded_length(golden):
    folder, arrays = golden
    checkpoint = open_checkpoint(str(folder))
    graphdef = nnx.split(checkpoint.encoder(jax.random.key(0)))[0]
    key = jax.random.key(4)
    ids, types = arrays["input_ids"][1:], arrays["token_type_ids"][1:]
    mask = jnp.asarray(arrays["attention_mask"][1:], bool)

    @jax.jit
    def last(params, ids, types, mask):
        encoder = nnx.merge(graphdef, params)
        h, relative = encoder.embed(ids, types, mask, key), encoder.relative_table()
        for number in range(1, checkpoint.depth + 1):
            h = encoder.layer(number, h, mask, key, relative)
        return h

    params = read_encoder(checkpoint)[0]
    many = np.asarray(last(params, ids, types, mask))[:, :13]
    few = np.asarray(last(params, ids[:, :13], types[:, :13], mask[:, :13]))
    present = np.asarray(mask)[:, :13]
    np.testing.assert_allclose(few[present], many[present], rtol=0, atol=5e-6)
    plain = np.asarray(load_encoder(str(folder))(ids, mask, types)[-1])[:, :13]
    assert np.abs(plain - many)[present].max() > 0.1


def test_buckets_equal_hugging_face():
    with np.load(GOLDEN / "buckets.npz") as arrays:
        distances = arrays["distances"]
        names = [name for name in arrays if name != "distances"]
        assert "256_512" in names
        for name in names:
            found = log_bucket(distances, *map(int, name.split("_")))
            np.testing.assert_array_equal(found, arrays[name], err_msg=name)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_along_diagonals(length):
    x = np.arange(3 * length * 2 * length).reshape(3, length, 2 * length)
    y = along_diagonals(jnp.asarray(x))
    assert y.shape == (3, length, length)
    for i in range(length):
        for j in range(length):
            np.testing.assert_array_equal(y[:, i, j], x[:, i, length - 1 + j - i])
