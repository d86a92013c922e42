"""ONNX graphs of saved models: their fused nodes, refusals and exported folders."""

import dataclasses
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported_programs import assert_same, load_python
from saved_models import EXITS, LONGEST, Saved, check, check_logits, middle
from tiny import ENCODERS, TINIES, marked

from sweet_jax import AdaptiveClassifier, export
from sweet_jax.data.batches import encode
from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.engine import load_engine
from sweet_jax.inference.saved_tokenizer import SavedTokenizer
from sweet_jax.models.bert import BertEmbeddings
from sweet_jax.models.deberta_v2 import DebertaV2Config
from sweet_jax.models.mpnet import distance_bucket
from sweet_jax.models.positions import rows_by_offset
from sweet_jax.poolings import POOLINGS, Pooling

pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
import onnx

from sweet_jax.inference.onnx_build import build_graphs
from sweet_jax.inference.onnx_fusions import FUSIONS
from sweet_jax.inference.onnx_runners import write_runners

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", marked(ENCODERS))
def test_attention_norms_and_gelus_are_fused_nodes_in_every_layer(tmp_path, kind):
    saved = Saved(tmp_path, kind)
    graphs = build_graphs(open_model(saved.folder)).networks[0]
    nodes = [onnx.load_from_string(graph.model).graph.node for _, graph in graphs]
    op_types = [node.op_type for graph_nodes in nodes for node in graph_nodes]
    assert op_types.count("MultiHeadAttention") == len(EXITS)
    assert "Softmax" not in op_types
    assert "Sqrt" not in op_types, "every norm is one node"
    assert op_types.count("LayerNormalization") >= 2 * len(EXITS)
    assert not {"Erf", "Pow"} & set(op_types), "every GELU is one node"
    assert op_types.count("Tanh") <= len(EXITS) + 1, "only in poolers and DeBERTa's convolution"


def test_primitive_without_onnx_operator_is_refused_by_name(sweet, monkeypatch):
    def load_error() -> str:
        with pytest.raises(UserError) as error:
            load_engine("onnxruntime", sweet.classifier.model)
        return str(error.value)

    def sorted_positions(self, input_ids):
        return jax.numpy.sort(input_ids, axis=1)

    def fixed_positions(self, input_ids):
        return np.arange(input_ids.shape[1])[None]

    monkeypatch.setattr(BertEmbeddings, "positions", sorted_positions)
    assert load_error() == (
        "the onnxruntime engine does not support the primitive sort, which an encoder of "
        "model_type 'bert' needs: use engine=jax"
    )
    monkeypatch.setattr(BertEmbeddings, "positions", fixed_positions)
    assert "an array whose size must be known in advance, which an encoder" in load_error()


def select_last(h, mask, second):
    """Reads the last token by a masked sum."""
    last = jnp.arange(mask.shape[1])[None] == mask.sum(axis=1, keepdims=True) - 1  # [B, L]
    return jnp.where(last[..., None], h, 0).sum(axis=1)


def gather_last(h, mask, second):
    """Reads the last token by its index."""
    last = jnp.maximum(mask.sum(axis=1) - 1, 0)
    return jnp.take_along_axis(h, last[:, None, None], axis=1)[:, 0]


def test_refusal_names_a_pooling_that_is_not_of_this_package(sweet, monkeypatch):
    model = dataclasses.replace(sweet.classifier.model, pooling="last")
    monkeypatch.setitem(POOLINGS, "last", Pooling(select_last))
    assert build_graphs(model).networks
    monkeypatch.setitem(POOLINGS, "last", Pooling(gather_last))
    with pytest.raises(UserError) as error:
        build_graphs(model)
    assert str(error.value) == (
        "the onnxruntime engine does not support the primitive gather of anything but rows or one "
        "block, which an encoder of model_type 'bert' or the pooling 'last' needs: use engine=jax"
    )


@pytest.mark.parametrize("kind", ["bert", "modernbert", "deberta"])
def test_logits_are_the_same_without_matmul_fusions(tmp_path, monkeypatch, kind):
    monkeypatch.delitem(FUSIONS, "dot_general")
    saved = Saved(tmp_path, kind)
    check_logits(saved, open_model(saved.folder).tokenizer.pad_token_id, 4, 12, ())


def test_offset_rows_are_equal_for_symbolic_and_python_lengths():
    buckets = TINIES["deberta-v2"]
    assert isinstance(buckets, DebertaV2Config)
    for row, farthest in ((distance_bucket, 128), (buckets.rows, buckets.reach)):
        for length in (1, 40, 200):
            expected = rows_by_offset(row, length, farthest)
            # Any length but a Python int is handled as a symbolic one.
            symbolic = rows_by_offset(row, np.int64(length), farthest)
            assert symbolic.tolist() == expected.tolist()


def test_invalid_exports_and_damaged_graphs_are_refused(sweet, onnx_model, tmp_path, capsys):
    def export_error(model, *options) -> str:
        assert export.main([f"--model={model}", "--format=onnx", *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    model, output = sweet.classifier.model.folder, f"--output={tmp_path / 'out'}"
    assert "was exported to ONNX" in export_error(onnx_model, output)
    assert "exists: choose another" in export_error(model, f"--output={tmp_path}")
    assert "--length applies only to --format=stablehlo" in export_error(
        model, output, "--length=16"
    )
    assert "set --cost" in export_error(model, output, "--milliseconds=3")
    assert "risk=0.0001 cannot be certified" in export_error(model, output, "--risk=0.0001")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(UserError, match="exported without int8"):
        load_engine("onnxruntime", open_model(onnx_model), "int8")
    shutil.copytree(onnx_model, tmp_path / "model")
    (tmp_path / "model" / "onnx" / "graphs.json").write_text("{}")
    with pytest.raises(UserError, match=r"graphs\.json' cannot be read .*: export the model"):
        load_engine("onnxruntime", open_model(tmp_path / "model"))


@pytest.mark.parametrize("kind", ["deberta", "deberta-v2", "roberta"])
def test_exported_tokenizer_gives_the_same_ids_and_types(tmp_path, kind):
    saved = Saved(tmp_path, kind)
    options = [f"--model={saved.folder}", f"--output={tmp_path / 'exported'}", "--format=onnx"]
    assert export.main(options) == 0
    models = [open_model(folder) for folder in (saved.folder, tmp_path / "exported")]
    assert isinstance(models[1].tokenizer, SavedTokenizer)
    pairs = [(first, second) for first in saved.texts[:5] for second in saved.texts[5:9]]
    for texts in (pairs, [(text,) for text in saved.texts]):
        original, exported = (encode(model.tokenizer, texts, LONGEST) for model in models)
        for first, second in zip(
            [*original[0], *original[1]], [*exported[0], *exported[1]], strict=True
        ):
            assert first.tolist() == second.tolist()


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_exported_model_and_its_runner_equal_the_one_pass_model(tmp_path, pooling, multi):
    saved = Saved(tmp_path, "bert", pooling, learned=True, multi=multi)
    options = [f"--model={saved.folder}", f"--output={tmp_path / 'exported'}", "--format=onnx"]
    assert export.main(options) == 0
    saved.folder = tmp_path / "exported"
    check(saved, saved.scores, sizes=(5,), policy="learning_to_exit")
    # The exported run.py, which does not import sweet_jax, gives the same.
    for threshold in (middle(saved.confidence()), math.inf):
        target, models = {"threshold": threshold}, {"float32": open_model(saved.folder)}
        write_runners(models, saved.folder, "raw_confidence", target)
        runner = load_python(saved.folder).Classifier(saved.folder)
        expected = AdaptiveClassifier.from_pretrained(saved.folder, **target).predict(saved.texts)
        assert (len(set(expected.exits)) > 1) == (threshold < math.inf)
        assert_same(runner.predict(saved.texts), expected)
    assert len(runner.sessions) == 1 or not multi


def test_exported_model_predicts_without_jax_and_stores_weights_once(sweet, onnx_model):
    assert not [*onnx_model.rglob("*.safetensors")]
    assert len([*onnx_model.glob("onnx/*.bin")]) == 1
    size = sum(path.stat().st_size for path in onnx_model.glob("onnx/*"))
    weights = (sweet.classifier.model.folder / "model.safetensors").stat().st_size
    assert size < 2 * weights, "each weight is stored once"
    program = """
import sys
from sweet_jax import AdaptiveClassifier
model = AdaptiveClassifier.from_pretrained(sys.argv[1], threshold=0.6)
print(*model.predict(sys.argv[2:]).labels, sep="\\n")
heavy = {"jax", "flax", "transformers", "onnx", "safetensors", "datasets", "scipy", "sklearn"}
heavy |= {"pyarrow", "pandas"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    texts = sweet.texts[:9]
    command = [sys.executable, "-c", program, str(onnx_model), *texts]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    expected = sweet.classifier.at(threshold=0.6).predict(texts)
    assert process.stdout.splitlines() == expected.labels.tolist()
