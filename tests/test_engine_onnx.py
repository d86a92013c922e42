"""The ONNX Runtime engine: the answers of the one-pass JAX model, without JAX."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import TINIES, WORDS, Reference, write_checkpoint

from sweet_jax import AdaptiveClassifier, ExitOutputs, export
from sweet_jax.config import UserError
from sweet_jax.data.batches import encode
from sweet_jax.exits.calibration import softmax_with_temperature
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.inference.artifact import TrainedModel, open_model, save_model
from sweet_jax.inference.engine import StageBatch, load_engine
from sweet_jax.inference.latency import measure_latency
from sweet_jax.inference.saved_tokenizer import SavedTokenizer
from sweet_jax.models.bert import BertEmbeddings
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.deberta_v2 import DebertaV2Config
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.families import FAMILIES
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.mpnet import distance_bucket
from sweet_jax.models.positions import rows_by_offset
from sweet_jax.models.pretrained import open_checkpoint

pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
import onnx

from sweet_jax.inference.engine_onnx import OnnxEngine, physical_cores
from sweet_jax.inference.onnx_build import build_graphs
from sweet_jax.inference.onnx_fusions import FUSIONS
from sweet_jax.inference.onnx_segments import plan_segments

ROOT = Path(__file__).parents[1]
EXITS, CLASSES, LONGEST = (1, 2, 3), 3, 32


class Saved:
    """A saved model with random weights, and its one-pass logits of some texts."""

    def __init__(self, folder, kind, pooling="first", learned=False, multi=False, exits=EXITS):
        checkpoint = open_checkpoint(str(write_checkpoint(folder / "checkpoint", kind)))
        tokenizer = load_tokenizer(checkpoint)
        rng = np.random.default_rng(2)
        draw = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 40)))
        self.texts = [draw() for _ in range(40)]
        ids, types = encode(tokenizer, [(text,) for text in self.texts], LONGEST)
        batch = {"input_ids": np.full((40, LONGEST), tokenizer.pad_token_id, np.int32)}
        batch |= {"token_type_ids": np.zeros_like(batch["input_ids"])}
        batch |= {"mask": np.arange(LONGEST) < np.asarray([[len(row)] for row in ids])}
        for row, (own, own_types) in enumerate(zip(ids, types, strict=True)):
            batch["input_ids"][row, : len(own)] = own
            batch["token_type_ids"][row, : len(own)] = own_types
        models, outputs, self.forwards = [], [], []
        for part in [(exit,) for exit in exits] if multi else [exits]:
            key = jax.random.key(len(models))
            config = ExitConfig(pooling=pooling, learning_to_exit="joint" if learned else "")
            encoder = checkpoint.encoder(key, depth=part[-1])
            graphdef, values = nnx.split(EarlyExit(encoder, part, CLASSES, key, config))
            # Biases and norms that are not zero and one.
            shift = lambda x: np.asarray(x + 0.2 * rng.normal(size=x.shape), np.float32)
            params = jax.tree.map(shift, nnx.to_pure_dict(values))
            forward = jax.jit(lambda b, g=graphdef, p=params: nnx.merge(g, p).forward(b))
            self.forwards.append(forward)
            outputs.append(forward(batch))
            models.append(TrainedModel(part, params))
        self.logits = np.concatenate([each.logits for each in outputs])  # [E, N, C]
        scores = [each.exit_scores for each in outputs]
        self.scores = np.concatenate(scores) if learned else None  # [E, N]
        labels = self.logits[-1].argmax(-1)
        learning = self.scores[None] if learned else None
        fitted = ExitOutputs(self.logits, labels, np.asarray(exits), exit_scores=learning)
        policies = ("raw_confidence", *(["learning_to_exit"] if learned else []))
        about = {"version": 5, "task": "random", "classes": ["a", "b", "c"], "pooling": pooling}
        about |= {"text_columns": ["text"], "max_length": LONGEST, "layers": list(exits)}
        about |= {"cost": fitted.cost.tolist(), "policy": "raw_confidence", "median_tokens": 10}
        about["dials"] = make_resolver(fitted, policies).as_dict()
        self.folder = folder / "model"
        save_model(self.folder, checkpoint, tokenizer, models, about, "")

    def answers(self, classifier, confidence) -> tuple[np.ndarray, np.ndarray]:
        """(exits by index, probabilities) of the one-pass logits, by a threshold."""
        leaves = confidence >= classifier.threshold
        leaves[-1] = True
        exits = leaves.argmax(axis=0)
        taken = self.logits[exits, np.arange(len(exits))]
        fitted = classifier.calibrator.temperatures[exits, None]
        return exits, softmax_with_temperature(taken, fitted)

    def confidence(self) -> np.ndarray:
        """raw_confidence, [E, N]."""
        return softmax_with_temperature(self.logits, np.ones((*self.logits.shape[:2], 1))).max(-1)


def middle(confidence) -> float:
    """A threshold that no row is near, at which about half of the rows leave at the first exit."""
    values = np.sort(confidence[0])[10:-10]
    place = int(np.diff(values).argmax())
    threshold = float(values[place : place + 2].mean())
    assert np.abs(confidence[:-1] - threshold).min() > 1e-5
    return threshold


def check(saved, confidence, sizes=(1, 5), **policy) -> None:
    """Predictions through the engine are those of the one-pass logits."""
    threshold = middle(confidence)
    classifier = AdaptiveClassifier.from_pretrained(
        saved.folder, engine="onnxruntime", threshold=threshold, **policy
    )
    exits, probabilities = saved.answers(classifier, confidence)
    assert len(set(exits)) > 1
    for size in sizes:
        for mode in ("throughput", "latency"):
            found = classifier.predict(saved.texts, size, mode)
            assert found.exits.tolist() == np.asarray(classifier.layers)[exits].tolist()
            np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-4)
    full = classifier.at(threshold=float("inf"), **policy)
    exits, probabilities = saved.answers(full, confidence)
    assert set(exits) == {len(EXITS) - 1}
    np.testing.assert_allclose(full.predict(saved.texts, 4).probabilities, probabilities, atol=1e-4)


def check_logits(saved, pad_id, size, length, rates) -> None:
    """The logits of every exit, where none leaves: several rows, one of them without a token."""
    rng = np.random.default_rng(size)
    tokens = rng.integers(1, length + 1, size).astype(np.int32)
    tokens[:1] = length
    tokens[2:3] = 0
    mask = np.arange(length) < tokens[:, None]
    ids = np.where(mask, rng.integers(5, 44, mask.shape), pad_id).astype(np.int32)
    types = np.where(mask, rng.integers(0, 2, mask.shape), 0).astype(np.int32)
    batch = {"input_ids": ids, "token_type_ids": types, "mask": mask}
    wanted = np.concatenate([forward(batch).logits for forward in saved.forwards])
    engine = load_engine("onnxruntime", open_model(saved.folder), threads=1)
    states = engine.new_states(size, length)
    for stage in engine.stages(exit_rates=rates):
        texts = np.stack([ids, types]) if stage.embeds else None
        given = StageBatch(length, np.stack([np.arange(size, dtype=np.int32), tokens]), texts)
        found = engine.run(stage, given, states if stage.uses_states else None)
        np.testing.assert_allclose(found.logits, wanted[stage.exit], atol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_answers_are_those_of_the_one_pass_model(tmp_path, kind, pooling):
    saved = Saved(tmp_path, kind, pooling)
    check(saved, saved.confidence())
    pad_id = open_model(saved.folder).tokenizer.pad_token_id
    for size, length, rates in ((4, 12, ()), (1, 1, ()), (2, 31, (0.0, 1.0, 1.0))):
        check_logits(saved, pad_id, size, length, rates)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_each_layer_is_a_few_fused_nodes(tmp_path, kind):
    saved = Saved(tmp_path, kind)
    graphs = build_graphs(open_model(saved.folder)).networks[0]
    nodes = [onnx.load_from_string(graph.model).graph.node for _, graph in graphs]
    kinds = [node.op_type for each in nodes for node in each]
    assert kinds.count("MultiHeadAttention") == len(EXITS)
    assert "Softmax" not in kinds
    assert "Sqrt" not in kinds, "every norm is one node"
    if kind != "modernbert":  # its norms stand before the sums
        assert kinds.count("SkipLayerNormalization") >= 2 * len(EXITS)
    assert not {"Erf", "Pow"} & set(kinds), "every GELU is one node"
    assert kinds.count("Tanh") <= len(EXITS) + 1, "those of poolers, and of DeBERTa's convolution"


@pytest.mark.parametrize("multi", [False, True])
def test_learning_to_exit_and_multi_model(tmp_path, multi):
    saved = Saved(tmp_path, "bert", learned=True, multi=multi)
    check(saved, saved.scores, policy="learning_to_exit")
    check(saved, saved.confidence(), sizes=(5,))


def test_stages_that_compute_their_whole_layer(tmp_path):
    saved = Saved(tmp_path, "bert", exits=(1, 3))
    engine = load_engine("onnxruntime", open_model(saved.folder))
    ids, _ = encode(open_model(saved.folder).tokenizer, [(t,) for t in saved.texts], LONGEST)
    for rates in ((), (0.0, 1.0)):
        for row in (0, 1):
            states = engine.new_states(3, LONGEST)
            for stage in engine.stages(exit_rates=rates):
                texts = np.stack([ids[row], np.zeros_like(ids[row])])[:, None]  # [2, 1, L]
                rows = np.asarray([[2], [len(ids[row])]], np.int32)
                batch = StageBatch(LONGEST, rows, texts if stage.embeds else None)
                found = engine.run(stage, batch, states if stage.uses_states else None)
                np.testing.assert_allclose(
                    found.logits[0], saved.logits[stage.exit, row], atol=1e-4
                )
                assert not states[:2].any(), "the slots of others stay as they were"


def test_a_text_that_diverges_leaves_nothing_in_its_slot(tmp_path):
    saved = Saved(tmp_path, "bert")
    engine = load_engine("onnxruntime", open_model(saved.folder))
    states = engine.new_states(1, LONGEST)
    states[:] = np.nan
    writes = [stage for stage in engine.stages(exit_rates=(0.0, 0.0, 1.0)) if stage.writes_states]
    texts = np.full((2, 1, 4), 7, np.int32)
    texts[1] = 0
    engine.run(writes[0], StageBatch(LONGEST, np.asarray([[0], [4]], np.int32), texts), states)
    assert np.isfinite(states).all()


def test_no_layer_is_in_two_segments():
    plan = plan_segments((1, 2, 4, 6), first_only=True)
    layers = [layer for s in plan for layer in range(s.start, s.end + 1)]
    assert layers == [1, 2, 3, 4, 5, 6]
    assert [s.end for s in plan if s.exits] == [1, 2, 4, 6]
    assert [s.embeds for s in plan] == [True] + [False] * (len(plan) - 1)
    assert len(plan_segments((1, 2, 4, 6), first_only=False)) == 4


def test_what_the_engine_cannot_do_is_refused(sweet):
    model = sweet.classifier.model
    with pytest.raises(UserError, match="has float32 and int8, not 'bfloat16': use engine=jax"):
        load_engine("onnxruntime", model, "bfloat16")
    with pytest.raises(UserError, match="threads must be at least 1; got 0"):
        load_engine("onnxruntime", model, threads=0)
    with pytest.raises(UserError, match="threads"):
        load_engine("jax", model, threads=2)


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
        "the onnxruntime engine cannot compute the primitive sort, in an encoder of model_type "
        "'bert': use engine=jax"
    )
    monkeypatch.setattr(BertEmbeddings, "positions", fixed)
    assert "an array whose size must be known beforehand, in an encoder" in refusal()


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


@pytest.mark.parametrize("run", ["sweet", "multi_model", "mean_pooled"])
def test_trained_models_answer_as_with_jax(run, request):
    reference: Reference = request.getfixturevalue(run)
    classifier = AdaptiveClassifier.from_pretrained(
        reference.classifier.model.folder, engine="onnxruntime", threads=1
    )
    assert isinstance(classifier.engine, OnnxEngine)
    exits, probabilities, close = reference.answers(classifier)
    found = classifier.predict(reference.texts, 4)
    wanted = np.asarray(classifier.layers)[exits]
    assert (found.exits == wanted)[~close].all()
    np.testing.assert_allclose(found.probabilities[~close], probabilities[~close], atol=1e-4)
    assert classifier.warm_up() == 0


def test_what_cannot_be_exported_or_read_is_refused(sweet, onnx_model, tmp_path, capsys):
    def refusal(model, *options) -> str:
        assert export.main([f"--model={model}", "--format=onnx", *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    model, output = sweet.classifier.model.folder, f"--output={tmp_path / 'out'}"
    assert "was exported already" in refusal(onnx_model, output)
    assert "exists: choose another" in refusal(model, f"--output={tmp_path}")
    assert "leave them out" in refusal(model, output, "--cost=0.5")
    assert "leave them out" in refusal(model, output, "--length=16")
    with pytest.raises(UserError, match="exported without int8"):
        load_engine("onnxruntime", open_model(onnx_model), "int8")
    shutil.copytree(onnx_model, tmp_path / "model")
    (tmp_path / "model" / "onnx" / "graphs.json").write_text("{}")
    with pytest.raises(UserError, match=r"graphs\.json' is not readable .*: export again"):
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


def test_latency_is_measured_and_names_the_engine(sweet):
    engine = load_engine("onnxruntime", sweet.classifier.model, threads=1)
    table = measure_latency(engine, 16, [2], lambda: None)
    assert (table.milliseconds > 0).all()
    assert "onnxruntime" in table.machine
    assert "1 thread" in table.machine


def test_threads_are_physical_cores_by_default():
    assert physical_cores() >= 1


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
