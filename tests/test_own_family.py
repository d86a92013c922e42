"""The example of an encoder family of another package, against transformers."""

import jax
import numpy as np
import pytest
from own_family import NOMIC_BERT, NomicBert, NomicBertConfig

from sweet_jax import load_encoder
from sweet_jax.models.families import FAMILIES


@pytest.fixture
def torch_model(monkeypatch, tmp_path):
    """A random tiny model of transformers, whose checkpoint is in tmp_path."""
    torch = pytest.importorskip("torch", reason="the reference is a model of torch")
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NomicBertModel"):
        pytest.skip("this release of transformers has no NomicBERT")
    monkeypatch.setitem(FAMILIES, "nomic_bert", NOMIC_BERT)
    torch.manual_seed(0)
    config = transformers.NomicBertConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=32,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    model = transformers.NomicBertModel(config).eval()
    model.save_pretrained(tmp_path)
    return model


def test_hidden_states_equal_those_of_torch(torch_model, tmp_path):
    import torch

    rng = np.random.default_rng(0)
    ids, types = rng.integers(0, 30, (3, 17)), np.repeat([[0, 1]], [6, 11], axis=1).repeat(3, 0)
    mask = np.arange(17)[None] < np.asarray([[17], [9], [4]])
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array.astype(int)) for name, array in inputs.items()}
        expected = torch_model(**tensors, output_hidden_states=True).hidden_states
    for actual, wanted in zip(load_encoder(tmp_path)(**inputs), expected, strict=True):
        np.testing.assert_allclose(np.asarray(actual)[mask], wanted[mask], rtol=0, atol=1e-5)


def test_dropout_and_first_tokens_follow_the_protocol_of_encoders():
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
    config = NomicBertConfig(vocab_size=30, num_hidden_layers=1, hidden_dropout_prob=0.5, **sizes)
    encoder, key = NomicBert(config, jax.random.key(0)), jax.random.key(1)
    ids, mask = np.arange(10, dtype=np.int32)[None], np.ones((1, 10), bool)

    def output(length, **options):
        padding = ((0, 0), (0, length - 10))
        short, shown = np.pad(ids, padding), np.pad(mask, padding)
        h = encoder.embed(short, np.zeros_like(short), shown, key)
        return encoder.layer(1, h, shown, key, **options)

    whole = output(10)
    np.testing.assert_allclose(output(16)[:, :10], whole, atol=1e-5)
    np.testing.assert_allclose(output(10, count=2), whole[:, :2], atol=1e-5)
    assert np.abs(whole - encoder.layer(1, encoder.embed(ids, 0 * ids, mask), mask)).max() > 0.1
