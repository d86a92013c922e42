"""Parity with Hugging Face's BERT: hidden states and gradients, from committed golden files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sweet_jax import load_encoder
from sweet_jax.models.bert import Bert
from sweet_jax.models.names import hugging_face_name
from sweet_jax.models.pretrained import (
    hidden_states,
    open_checkpoint,
    read_encoder,
)

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5


@pytest.fixture(params=["bert_small", "bert_wide"])
def golden(request):
    folder = GOLDEN / request.param
    with np.load(folder / "golden.npz") as arrays:
        return folder, dict(arrays)


def test_hidden_states_equal_hugging_face(golden):
    folder, arrays = golden
    inputs = [arrays[k] for k in ("input_ids", "attention_mask", "token_type_ids")]
    hidden = load_encoder(str(folder))(*inputs)
    assert len(hidden) == len(arrays["hidden"])
    for ours, theirs in zip(hidden, arrays["hidden"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_gradients_equal_hugging_face(golden):
    folder, arrays = golden
    checkpoint = open_checkpoint(str(folder))
    graphdef = nnx.split(Bert(checkpoint.config, jax.random.key(0)))[0]
    mask = jnp.asarray(arrays["attention_mask"], bool)

    def loss(params):
        encoder = nnx.merge(graphdef, params)
        hidden = hidden_states(encoder, arrays["input_ids"], mask, arrays["token_type_ids"])
        return (jnp.stack(hidden) * arrays["cotangent"]).sum()

    grads = jax.grad(loss)(read_encoder(checkpoint)[0])
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    assert len(leaves) == sum(name.startswith("grad/") for name in arrays)
    for path, ours in leaves:
        name = hugging_face_name(tuple(p.key for p in path))
        theirs = arrays[f"grad/{name}"]
        theirs = theirs.T if path[-1].key == "kernel" else theirs
        # Sums over tens of tokens: relative to the tensor's largest entry where that is above 1.
        scale = max(1.0, float(np.abs(theirs).max()))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * scale)
