"""ONNX graphs of saved models: what is fused, what is refused, what is exported."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
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

pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
import onnx

from sweet_jax.inference.onnx_build import build_graphs
from sweet_jax.inference.onnx_fusions import FUSIONS
from sweet_jax.inference.onnx_runners import write_runners

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", marked(ENCODERS))
def test_each_layer_is_a_few_fused_nodes(tmp_path, kind):
    saved = Saved(tmp_path, kind)
    graphs = build_graphs(open_model(saved.folder)).networks[0]
    nodes = [onnx.load_from_string(graph.model).graph.node for _, graph in graphs]
    kinds = [node.op_type for each in nodes for node in each]
    assert kinds.count("MultiHeadAttention") == len(EXITS)
    assert "Softmax" not in kinds
    assert "Sqrt" not in kinds, "every norm is one node"
    assert kinds.count("LayerNormalization") >= 2 * len(EXITS)
    assert not {"Erf", "Pow"} & set(kinds), "every GELU is one node"
    assert kinds.count("Tanh") <= len(EXITS) + 1, "those of poolers, and of DeBERTa's convolution"


def test_what_has_no_operator_is_named(sweet, monkeypatch):
    def refusal() -> str:
        with pytest.raises(UserError) as refused:
            load_engine("onnxruntime", sweet.classifier.model)
        return str(refused.value)

    def sort(self, input_ids):
        return jax.numpy.sort(input_ids, axis=1)

    def fixed(self, input_ids):
        return np.arange(input_ids.shape[1])[None]

    monkeypatch.setattr(BertEmbeddings, "positions", sort)
    assert refusal() == (
        "the onnxruntime engine does not support the primitive sort, which an encoder of "
        "model_type 'bert' needs: use engine=jax"
    )
    monkeypatch.setattr(BertEmbeddings, "positions", fixed)
    assert "an array whose size must be known in advance, which an encoder" in refusal()


@pytest.mark.parametrize("kind", ["bert", "modernbert", "deberta"])
def test_what_is_not_fused_is_computed_all_the_same(tmp_path, monkeypatch, kind):
    monkeypatch.delitem(FUSIONS, "dot_general")
    saved = Saved(tmp_path, kind)
    check_logits(saved, open_model(saved.folder).tokenizer.pad_token_id, 4, 12, ())


def test_rows_of_a_symbolic_length_are_those_of_a_number():
    buckets = TINIES["deberta-v2"]
    assert isinstance(buckets, DebertaV2Config)
    for row, farthest in ((distance_bucket, 128), (buckets.rows, buckets.reach)):
        for length in (1, 40, 200):
            wanted = rows_by_offset(row, length, farthest)
            # What is no Python number takes the other branch.
            found = rows_by_offset(row, np.int64(length), farthest)
            assert found.tolist() == wanted.tolist()


def test_what_cannot_be_exported_or_read_is_refused(sweet, onnx_model, tmp_path, capsys):
    def refusal(model, *options) -> str:
        assert export.main([f"--model={model}", "--format=onnx", *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    model, output = sweet.classifier.model.folder, f"--output={tmp_path / 'out'}"
    assert "was exported to ONNX" in refusal(onnx_model, output)
    assert "exists: choose another" in refusal(model, f"--output={tmp_path}")
    assert "--length applies only to --format=stablehlo" in refusal(model, output, "--length=16")
    assert "set --cost" in refusal(model, output, "--milliseconds=3")
    assert "infeasible" in refusal(model, output, "--risk=0.0001")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(UserError, match="exported without int8"):
        load_engine("onnxruntime", open_model(onnx_model), "int8")
    shutil.copytree(onnx_model, tmp_path / "model")
    (tmp_path / "model" / "onnx" / "graphs.json").write_text("{}")
    with pytest.raises(UserError, match=r"graphs\.json' cannot be read .*: export the model"):
        load_engine("onnxruntime", open_model(tmp_path / "model"))


@pytest.mark.parametrize("kind", ["deberta", "deberta-v2", "roberta"])
def test_an_exported_model_keeps_its_tokenizer(tmp_path, kind):
    saved = Saved(tmp_path, kind)
    options = [f"--model={saved.folder}", f"--output={tmp_path / 'exported'}", "--format=onnx"]
    assert export.main(options) == 0
    models = [open_model(folder) for folder in (saved.folder, tmp_path / "exported")]
    assert isinstance(models[1].tokenizer, SavedTokenizer)
    pairs = [(one, two) for one in saved.texts[:5] for two in saved.texts[5:9]]
    for texts in (pairs, [(text,) for text in saved.texts]):
        first, second = (encode(model.tokenizer, texts, LONGEST) for model in models)
        for one, two in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
            assert one.tolist() == two.tolist()


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_an_exported_model_answers_as_before(tmp_path, pooling, multi):
    saved = Saved(tmp_path, "bert", pooling, learned=True, multi=multi)
    options = [f"--model={saved.folder}", f"--output={tmp_path / 'exported'}", "--format=onnx"]
    assert export.main(options) == 0
    saved.folder = tmp_path / "exported"
    check(saved, saved.scores, sizes=(5,), policy="learning_to_exit")
    # And without sweet_jax, by run.py.
    for threshold in (middle(saved.confidence()), math.inf):
        target, models = {"threshold": threshold}, {"float32": open_model(saved.folder)}
        write_runners(models, saved.folder, "raw_confidence", target)
        runner = load_python(saved.folder).Classifier(saved.folder)
        wanted = AdaptiveClassifier.from_pretrained(saved.folder, **target).predict(saved.texts)
        assert (len(set(wanted.exits)) > 1) == (threshold < math.inf)
        assert_same(runner.predict(saved.texts), wanted)
    assert len(runner.sessions) == 1 or not multi


def test_an_exported_model_needs_no_jax(sweet, onnx_model):
    assert not [*onnx_model.rglob("*.safetensors")]
    assert len([*onnx_model.glob("onnx/*.bin")]) == 1
    size = sum(path.stat().st_size for path in onnx_model.glob("onnx/*"))
    weights = (sweet.classifier.model.folder / "model.safetensors").stat().st_size
    assert size < 2 * weights, "no weight is there twice"
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = sweet.classifier.at(threshold=0.6).predict(texts)
    assert done.stdout.splitlines() == wanted.labels.tolist()
