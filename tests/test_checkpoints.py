"""Checkpoints of other programs: wrapped, sharded, with heads, or without a model type."""

import json
import logging
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers
from tiny import FAMILIES, TINIES, write_checkpoint

from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.models.checkpoint_folder import load_tokenizer, locate_checkpoint
from sweet_jax.models.layers import ACTIVATIONS
from sweet_jax.models.pooling import declared_pooling
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.preparation import prepare

GOLDEN = Path(__file__).parent / "golden"
KINDS = {  # a golden folder of each model_type
    json.loads(path.read_text())["model_type"]: path.parent
    for path in sorted(GOLDEN.glob("*/config.json"), reverse=True)
}


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(GOLDEN / "bert_small", tmp_path / "copy")


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def change_json(path: Path, **values) -> None:
    """Sets keys of a JSON file; the value None removes a key."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def read_encoder(folder: Path):
    return open_checkpoint(str(folder)).weights.encoder


def assert_equal(actual, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "0.auto_model.",
        "model.",
        "module.bert.",
        "_orig_mod.module.",
        "a.b.",
    ],
)
def test_wrapper_prefixes_of_tensor_names_are_removed(folder, prefix, caplog):
    expected = open_checkpoint(str(folder)).weights
    tensors = {f"{prefix}{k}": v for k, v in read_tensors(folder).items()}
    wrapper = prefix.removesuffix("bert.")
    write_tensors(folder, tensors | {f"{wrapper}classifier.weight": np.zeros((2, 24), np.float32)})
    actual = open_checkpoint(str(folder)).weights
    assert_equal(actual.encoder, expected.encoder)
    assert_equal(actual.pooler, expected.pooler)
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_type_is_read_with_a_wrapper_prefix(kind, tmp_path):
    folder = shutil.copytree(KINDS[kind], tmp_path / "copy")
    expected = read_encoder(folder)
    prefix = f"module.{FAMILIES[kind].names.prefix}."
    write_tensors(folder, {f"{prefix}{k}": v for k, v in read_tensors(folder).items()})
    assert_equal(read_encoder(folder), expected)


def test_checkpoint_of_two_encoders_is_refused(folder):
    tensors = read_tensors(folder)
    write_tensors(
        folder, {f"{prefix}.{k}": v for k, v in tensors.items() for prefix in ("query", "passage")}
    )
    with pytest.raises(UserError, match=r"several encoders, under passage\., query\.: save only"):
        read_encoder(folder)


@pytest.mark.parametrize(
    "heads",
    [
        ["score.weight", "dropout.p", "pre_classifier.weight"],
        ["linear.weight"],
        ["fc.weight", "crf.transitions"],
        ["a_head_of_some_very_long_name_that_fills_a_line.dense.weight"],
        [f"heads.{number}.weight" for number in range(9)],
    ],
)
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_unknown_heads_are_ignored_with_one_warning(folder, heads, prefix, caplog):
    expected = read_encoder(folder)
    tensors = {f"{prefix}{k}": v for k, v in read_tensors(folder).items()}
    write_tensors(folder, tensors | dict.fromkeys(heads, np.zeros((2, 24), np.float32)))
    assert_equal(read_encoder(folder), expected)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert heads[0][:39] in record.message
    assert len(record.message) < 300 + len(str(folder))
    assert (" and 4 more" in record.message) == (len(heads) == 9)


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("xlm-roberta", ["lm_head.layer_norm.weight", "classifier.out_proj.weight"]),
        ("electra", ["discriminator_predictions.dense.weight", "generator_lm_head.bias"]),
        ("mpnet", ["lm_head.decoder.weight", "mpnet.embeddings.position_ids"]),
        ("modernbert", ["head.dense.weight", "decoder.bias", "classifier.weight"]),
        ("albert", ["predictions.decoder.weight", "sop_classifier.classifier.weight"]),
    ],
)
def test_pretraining_heads_are_ignored_without_a_warning(kind, heads, tmp_path, caplog):
    folder = shutil.copytree(KINDS[kind], tmp_path / "copy")
    expected = read_encoder(folder)
    prefix = FAMILIES[kind].names.prefix
    tensors = {f"{prefix}.{k}": v for k, v in read_tensors(folder).items()}
    write_tensors(folder, tensors | dict.fromkeys(heads, np.zeros(3, np.float32)))
    assert_equal(read_encoder(folder), expected)
    assert not caplog.records
    norm = FAMILIES[kind].names.encoder["embeddings/norm"]
    write_tensors(folder, {k: v for k, v in tensors.items() if k != f"{prefix}.{norm}.weight"})
    with pytest.raises(UserError, match=f"missing: {norm}.weight$"):
        read_encoder(folder)


def test_pooler_of_another_size_is_ignored_with_a_warning(folder, caplog):
    tensors = read_tensors(folder)
    write_tensors(folder, tensors | {"pooler.dense.weight": np.zeros((7, 24), np.float32)})
    assert open_checkpoint(str(folder)).weights.pooler is None
    assert "pooler.dense.weight" in caplog.text


def test_at_most_ten_missing_tensors_are_listed(folder):
    tensors = read_tensors(folder)
    write_tensors(folder, {k: v for k, v in tensors.items() if "encoder.layer.1" not in k})
    with pytest.raises(UserError, match=r"missing: .* and 6 more$") as error:
        read_encoder(folder)
    assert str(error.value).count("encoder.layer.1") == 10


def test_integer_tensors_are_refused_and_bfloat16_is_read(folder):
    tensors = read_tensors(folder)
    name = "embeddings.word_embeddings.weight"
    write_tensors(folder, tensors | {name: (100 * tensors[name]).astype(np.int8)})
    with pytest.raises(UserError, match=f"not floating-point: {name} int8"):
        read_encoder(folder)
    write_tensors(folder, {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()})
    read_encoder(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "architecture", ["{}Model", "{}ForSequenceClassification", "{}ForMaskedLM"]
)
def test_model_type_is_guessed_from_the_architecture(kind, architecture, tmp_path, caplog):
    folder = shutil.copytree(KINDS[kind], tmp_path / "copy")
    class_name = architecture.format(FAMILIES[kind].architecture.removesuffix("Model"))
    change_json(folder / "config.json", model_type=None, architectures=[class_name])
    assert open_checkpoint(str(folder)).model_type == kind
    (record,) = caplog.records
    assert f"taken for {kind!r} based on architectures" in record.message


@pytest.mark.parametrize(
    ("kind", "prefixed"),
    [
        *(("bert", True), ("roberta", False), ("electra", False)),
        *(pytest.param(kind, p, marks=pytest.mark.slow) for kind in KINDS for p in (False, True)),
    ],
)
def test_model_type_is_guessed_from_tensor_names(kind, prefixed, tmp_path, caplog):
    folder = shutil.copytree(KINDS[kind], tmp_path / "copy")
    change_json(folder / "config.json", model_type=None, architectures=None)
    if prefixed:
        prefix = FAMILIES[kind].names.prefix
        write_tensors(folder, {f"{prefix}.{k}": v for k, v in read_tensors(folder).items()})
    # These have the tensor names and the computation of RoBERTa.
    equivalent = {"xlm-roberta": "roberta", "camembert": "roberta"}
    opened = open_checkpoint(str(folder))
    assert opened.model_type == equivalent.get(kind, kind)
    assert "based on the names of its tensors" in caplog.text
    assert_equal(opened.weights.encoder, read_encoder(KINDS[kind]))


def test_guess_of_model_type_names_the_other_types_that_fit(tmp_path, caplog):
    folder = shutil.copytree(KINDS["roberta"], tmp_path / "copy")
    change_json(folder / "config.json", model_type=None, architectures=None, pad_token_id=None)
    assert open_checkpoint(str(folder)).model_type == "bert"
    assert "of its tensors, which fit 'roberta', 'xlm-roberta', 'camembert' as" in caplog.text
    write_tensors(folder, {f"roberta.{k}": v for k, v in read_tensors(folder).items()})
    assert open_checkpoint(str(folder)).model_type == "roberta"
    caplog.clear()
    shutil.copytree(KINDS["electra"], tmp_path / "electra")
    change_json(tmp_path / "electra" / "config.json", model_type=None, architectures=None)
    open_checkpoint(str(tmp_path / "electra"))
    assert "taken for 'electra' based on the names of its tensors: if" in caplog.text


def test_vocabulary_makes_a_tokenizer_of_the_guessed_model_type(tmp_path):
    folder = write_checkpoint(tmp_path / "bert")
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    change_json(folder / "config.json", model_type=None)
    tokenizer = load_tokenizer(open_checkpoint(str(folder)))
    assert tokenizer("word1 word2")["input_ids"] == [2, 6, 7, 3]


def test_unknown_model_type_is_refused_in_one_short_line(folder):
    change_json(folder / "config.json", model_type=None, architectures=["GPT2Model"])
    write_tensors(folder, {"wte.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(UserError, match="model_type None; supported are bert, roberta") as error:
        open_checkpoint(str(folder))
    assert len(str(error.value)) < 200
    change_json(folder / "config.json", model_type="a-model-type-of-a-very-long-name")
    with pytest.raises(UserError, match=r"modernbert, albert$") as error:
        open_checkpoint(str(folder))
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


def shard(folder: Path, count: int = 4) -> list[Path]:
    """Splits model.safetensors into files with an index; returns the files."""
    tensors, weight_map, files = read_tensors(folder), {}, []
    (folder / "model.safetensors").unlink()
    for number in range(1, count + 1):
        names = list(tensors)[number - 1 :: count]
        files.append(folder / f"model-{number:05}-of-{count:05}.safetensors")
        safetensors.numpy.save_file({name: tensors[name] for name in names}, files[-1])
        weight_map |= dict.fromkeys(names, files[-1].name)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def test_single_file_takes_precedence_over_shards(folder):
    """The shards that the index names may be absent."""
    tensors = read_tensors(folder)
    files = shard(folder)
    tensors["embeddings.LayerNorm.bias"][:] = 7.0
    write_tensors(folder, tensors)
    assert np.all(read_encoder(folder)["embeddings"]["norm"]["bias"] == 7.0)
    for file in files:
        file.unlink()
    assert np.all(read_encoder(folder)["embeddings"]["norm"]["bias"] == 7.0)


@pytest.mark.parametrize("number", [1, 3])
def test_damaged_or_missing_shard_is_named(folder, number):
    damaged = shard(folder)[number]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:50])
    with pytest.raises(UserError, match=f"{damaged.name}' is damaged"):
        read_encoder(folder)
    damaged.unlink()
    with pytest.raises(UserError, match=f"has no {damaged.name}, which its index names"):
        read_encoder(folder)


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError])
def test_unreadable_tensors_are_reported_as_a_permission_error(kind, folder, monkeypatch):
    """safetensors raises FileNotFoundError for a file that it may not open."""

    def denied(path):
        raise kind(path)

    monkeypatch.setattr("sweet_jax.models.tensors.safetensors.numpy.load_file", denied)
    with pytest.raises(UserError, match=r"model\.safetensors' cannot be read: change its perm"):
        read_encoder(folder)


@pytest.mark.parametrize("text", ["{", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}'])
def test_damaged_index_of_shards_is_named(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json' is damaged"):
        read_encoder(folder)


def test_null_pad_token_id_means_the_default_of_the_model_type(folder, tmp_path):
    values = json.loads((folder / "config.json").read_text()) | {"pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(values))
    open_checkpoint(str(folder))
    roberta = shutil.copytree(GOLDEN / "roberta_small", tmp_path / "roberta")
    values = json.loads((roberta / "config.json").read_text()) | {"pad_token_id": None}
    (roberta / "config.json").write_text(json.dumps(values))
    assert open_checkpoint(str(roberta)).config.pad_token_id == 1


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu_python", "erf"),
        ("gelu_fast", "tanh"),
        ("gelu_new", "tanh"),
        ("gelu_pytorch_tanh", "tanh"),
        ("quick_gelu", "sigmoid"),
        ("silu", "swish"),
        ("swish", "swish"),
    ],
)
def test_activations_have_the_formulas_of_transformers(folder, name, formula):
    change_json(folder / "config.json", hidden_act=name)
    assert open_checkpoint(str(folder)).config.hidden_act == name
    x = np.linspace(-6, 6, 121, dtype=np.float32)
    expected = {
        "erf": 0.5 * x * (1 + np.asarray(jax.lax.erf(x / np.float32(np.sqrt(2))))),
        "tanh": 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "sigmoid": x / (1 + np.exp(-1.702 * x)),
        "swish": x / (1 + np.exp(-x)),
    }[formula]
    np.testing.assert_allclose(ACTIVATIONS[name](x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "typed"), [("0_Transformer", True), ("0_Transformer", False), ("0_BERT", True)]
)
def test_sentence_transformers_folder_is_opened(tmp_path, name, typed):
    encoder_folder = write_checkpoint(tmp_path / name)
    types = ({"type": "models.Transformer"}, {"type": "models.Pooling"}) if typed else ({}, {})
    modules = [{"path": name} | types[0], {"path": "1_Pooling"} | types[1]]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "config.json").write_text('{"__version__": {"sentence_transformers": "2.0.0"}}')
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    opened = open_checkpoint(str(tmp_path))
    assert opened.folder == encoder_folder
    assert declared_pooling(opened.folder) == "first"
    assert_equal(opened.weights.encoder, read_encoder(encoder_folder))
    load_tokenizer(opened)


def test_encoder_in_the_folder_takes_precedence_over_modules_json(folder):
    (folder / "modules.json").write_text("[]")
    assert_equal(read_encoder(folder), read_encoder(GOLDEN / "bert_small"))
    (folder / "modules.json").write_text('[{"path": "../elsewhere"}]')
    shutil.copytree(GOLDEN / "bert_wide", folder.parent / "elsewhere")
    assert_equal(read_encoder(folder), read_encoder(GOLDEN / "bert_small"))


def test_unmerged_lora_adapter_is_refused_and_merged_one_is_read(folder, tmp_path):
    tensors = read_tensors(folder)
    write_tensors(
        folder,
        tensors | {"encoder.layer.0.attention.self.query.lora_A.weight": np.zeros((2, 24), "f")},
    )
    with pytest.raises(UserError, match=r"LoRA adapter that is not merged \(encoder.*lora_A"):
        read_encoder(folder)
    (tmp_path / "adapter").mkdir()
    adapter_config = tmp_path / "adapter" / "adapter_config.json"
    adapter_config.write_text('{"base_model_name_or_path": "bert-base-uncased"}')
    with pytest.raises(UserError, match=r"LoRA adapter of 'bert-base-uncased' .* merge_and_unload"):
        open_checkpoint(str(tmp_path / "adapter"))  # which has no config.json
    write_tensors(folder, {f"base_model.model.{k}": v for k, v in tensors.items()})
    assert_equal(read_encoder(folder), read_encoder(GOLDEN / "bert_small"))  # merged


def remove_post_processor(folder: Path) -> Path:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("kind", "single", "pair"),
    [
        ("bert", "[CLS] word1 [SEP]", "[CLS] word1 [SEP] word2 [SEP]"),
        ("modernbert", "[CLS] word1 [SEP]", "[CLS] word1 [SEP] word2 [SEP]"),
    ],
)
def test_missing_special_tokens_are_added_for_first_token_pooling(
    kind, single, pair, options, tmp_path, caplog
):
    folder = remove_post_processor(write_checkpoint(tmp_path / kind, kind))
    values = options | {"checkpoint": str(folder)}
    tokenizer = prepare(from_mapping(values)).tokenizer
    (message,) = [r.message for r in caplog.records if "adds no special token" in r.message]
    assert "[CLS]" in message
    tokenizer.save_pretrained(tmp_path / "saved")
    for loaded in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert " ".join(loaded.convert_ids_to_tokens(loaded("word1")["input_ids"])) == single
        ids = loaded("word1", "word2")["input_ids"]
        assert " ".join(loaded.convert_ids_to_tokens(ids)) == pair
    caplog.clear()
    tokenizer = prepare(from_mapping(values | {"pooling": "mean"})).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("word1")["input_ids"]) == ["word1"]
    assert "adds no special token" not in caplog.text


def test_tokenizer_without_required_special_tokens_is_refused(options, tmp_path):
    folder = remove_post_processor(write_checkpoint(tmp_path / "bert"))
    change_json(folder / "tokenizer_config.json", cls_token=None)
    with pytest.raises(UserError, match=r"has no cls_token: set --config\.pooling=mean"):
        prepare(from_mapping(options | {"checkpoint": str(folder)}))
    folder = write_checkpoint(tmp_path / "deberta", "deberta")
    write_checkpoint(tmp_path / "bert2")
    shutil.copy(tmp_path / "bert2" / "tokenizer.json", folder / "tokenizer.json")
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    with pytest.raises(UserError, match="no cls_token or no sep_token, which DeBERTa"):
        load_tokenizer(open_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({}, "set --config.method=early_exit"),
        ({"method": "early_exit", "isolation": (0.5,)}, "set --config.method=early_exit"),
        ({"method": "early_exit", "conflict_every": 2}, "remove it"),
    ],
)
def test_isolation_of_shared_layers_is_refused(changes, fix, options, tmp_path):
    folder = write_checkpoint(tmp_path / "albert", "albert")
    with pytest.raises(
        UserError, match="albert, whose layers share one set of parameters"
    ) as error:
        prepare(from_mapping(options | {"checkpoint": str(folder)} | changes))
    assert str(error.value).endswith(fix)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("albert", {"num_hidden_groups": 2}, "num_hidden_groups 2; only 1 is supported"),
        ("albert", {"inner_group_num": 2}, "inner_group_num 2; only 1 is supported"),
        ("mpnet", {"relative_attention_num_buckets": 64}, "_buckets 64; only 32 is supported"),
        ("electra", {"position_embedding_type": "relative_key"}, "only 'absolute'"),
        ("modernbert", {"layer_types": ["full_attention"]}, "one for each of the 3 layers"),
        ("modernbert", {"layer_types": ["chunked"] * 4}, "'full_attention' and 'sliding_"),
        ("modernbert", {"global_attn_every_n_layers": 0}, "which must be at least 1"),
        ("modernbert", {"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ("modernbert", {"rope_parameters": 3}, "rope_parameters 3"),
        ("modernbert", {"local_attention": 0}, "local_attention 0, which must be at least 1"),
        ("modernbert", {"num_attention_heads": 32}, "only an even head size"),
        ("electra", {"embedding_size": 0}, "embedding_size 0, which must be at least 1"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "only rope_type 'default' is supported",
        ),
        (
            "modernbert",
            {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}}},
            "only rope_type 'default' is supported",
        ),
        (
            "modernbert",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
            "only the keys 'full_attention' and 'sliding_attention' are supported",
        ),
        (
            "modernbert",
            {"local_attention": 128, "sliding_window": 2},
            "sliding_window 2, but half of its local_attention 128 is 64: remove",
        ),
    ],
)
def test_unsupported_config_values_are_refused(tmp_path, kind, change, message):
    values = json.loads((KINDS[kind] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(error.value)


def test_distilbert_ignores_layer_norm_eps_of_config_json():
    for kind, expected in (("distilbert", 1e-12), ("mpnet", 0.1)):
        config = FAMILIES[kind].config.from_values({"layer_norm_eps": 0.1})
        assert config.layer_norm_eps == expected


def test_modernbert_config_of_transformers_4_is_read():
    values = json.loads((GOLDEN / "modernbert_small" / "config.json").read_text())
    expected = FAMILIES["modernbert"].config.from_values(values)
    old = {k: v for k, v in values.items() if k not in ("layer_types", "rope_parameters")}
    old |= {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    config = FAMILIES["modernbert"].config.from_values(old | {"global_attn_every_n_layers": 3})
    for read in (config, expected):
        assert [read.is_global(n) for n in range(1, 5)] == [True, False, False, True]
    assert config.global_rope_theta == expected.global_rope_theta == 160000
    assert config.local_rope_theta == expected.local_rope_theta == 10000
    for changed in (old | {"local_rope_theta": None}, {"local_rope_theta": None}):
        assert FAMILIES["modernbert"].config.from_values(changed).local_rope_theta == 160000
    FAMILIES["modernbert"].config.from_values({"local_attention": 9, "sliding_window": 4})
    shallow = type(config).at_depth(values, 2)
    assert shallow["layer_types"] == ["full_attention", "sliding_attention"]
    assert shallow["num_hidden_layers"] == 2
    assert set(TINIES) == set(KINDS)  # each model type has a golden folder


def test_tokenizer_panic_is_reported_in_one_line(tmp_path, capfd):
    folder = write_checkpoint(tmp_path / "c")
    load_tokenizer(locate_checkpoint(str(folder))).save_pretrained(folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    pieces = [{"SpecialToken": {"id": "[NONE]", "type_id": 0}}, {"Sequence": {"id": "A"}}]
    pieces[1]["Sequence"]["type_id"] = 0
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"no tokenizer in .*") as error:
        load_tokenizer(locate_checkpoint(str(folder)))
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size"])
def test_excessive_size_in_config_is_refused(tmp_path, key):
    folder = write_checkpoint(tmp_path / "c")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: 4 * 10**400}))
    with pytest.raises(UserError, match=rf"{key} 40{{19}}… in its config\.json is too large"):
        open_checkpoint(str(folder))
