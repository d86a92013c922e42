"""The ONNX Runtime engine, compared with the one-pass JAX model."""

import numpy as np
import pytest
from saved_models import LONGEST, Saved, check, check_logits
from tiny import ENCODERS, Reference

from sweet_jax import AdaptiveClassifier
from sweet_jax.data.batches import encode
from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.engine import StageBatch, load_engine
from sweet_jax.inference.engine_choice import EngineChoice
from sweet_jax.inference.latency import measure_latency

pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
from sweet_jax.inference import engine_onnx
from sweet_jax.inference.engine_onnx import OnnxEngine, physical_cores
from sweet_jax.inference.onnx_segments import plan_segments


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        *(
            pytest.param(k, "first", marks=pytest.mark.slow if k in ("electra", "albert") else ())
            for k in ENCODERS
        ),
        ("bert", "mean"),
        *(pytest.param(k, "mean", marks=pytest.mark.slow) for k in ("deberta-v2", "modernbert")),
    ],
)
def test_predictions_and_logits_equal_one_pass_model(tmp_path, kind, pooling):
    saved = Saved(tmp_path, kind, pooling)
    check(saved, saved.confidence())
    pad_id = open_model(saved.folder).tokenizer.pad_token_id
    for size, length, rates in ((4, 12, ()), (1, 1, ()), (2, 31, (0.0, 1.0, 1.0))):
        check_logits(saved, pad_id, size, length, rates)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_predictions_equal_one_pass_model_when_batches_are_split(tmp_path, monkeypatch, pooling):
    saved = Saved(tmp_path, "bert", pooling, learned=True)
    monkeypatch.setattr(engine_onnx, "tokens_of_part", lambda threads: 20)
    check(saved, saved.scores, policy="learning_to_exit", sizes=(8,))
    check(saved, saved.confidence(), sizes=(8,))


@pytest.mark.parametrize("multi", [False, True])
def test_learning_to_exit_predictions_equal_one_pass_model(tmp_path, multi):
    saved = Saved(tmp_path, "bert", learned=True, multi=multi)
    check(saved, saved.scores, policy="learning_to_exit")
    check(saved, saved.confidence(), sizes=(5,))


def test_stage_logits_equal_one_pass_model_at_different_exit_rates(tmp_path):
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
                stage_output = engine.run(stage, batch, states if stage.uses_states else None)
                np.testing.assert_allclose(
                    stage_output.logits[0], saved.logits[stage.exit, row], atol=1e-4
                )
                assert not states[:2].any(), "slots of other texts were changed"


def test_stage_overwrites_nonfinite_states_of_reused_slot(tmp_path):
    saved = Saved(tmp_path, "bert")
    engine = load_engine("onnxruntime", open_model(saved.folder))
    states = engine.new_states(1, LONGEST)
    states[:] = np.nan
    stages = engine.stages(exit_rates=(0.0, 0.0, 1.0))
    stage = next(stage for stage in stages if stage.writes_states)
    texts = np.full((2, 1, 4), 7, np.int32)
    texts[1] = 0
    engine.run(stage, StageBatch(LONGEST, np.asarray([[0], [4]], np.int32), texts), states)
    assert np.isfinite(states).all()


def test_segments_cover_each_layer_once():
    plan = plan_segments((1, 2, 4, 6), first_only=True)
    layers = [layer for s in plan for layer in range(s.start, s.end + 1)]
    assert layers == [1, 2, 3, 4, 5, 6]
    assert [s.end for s in plan if s.exits] == [1, 2, 4, 6]
    assert [s.embeds for s in plan] == [True] + [False] * (len(plan) - 1)
    assert len(plan_segments((1, 2, 4, 6), first_only=False)) == 4


def test_unsupported_engine_options_are_refused(sweet):
    model = sweet.classifier.model
    with pytest.raises(UserError, match="does not support precision 'bfloat16': choose engine jax"):
        load_engine("onnxruntime", model, "bfloat16")
    with pytest.raises(UserError, match="threads must be at least 1; got 0"):
        load_engine("onnxruntime", model, threads=0)
    with pytest.raises(UserError, match="threads"):
        load_engine("jax", model, threads=2)


@pytest.mark.parametrize(
    "fixture", ["sweet", pytest.param("multi_model", marks=pytest.mark.slow), "mean_pooled"]
)
def test_predictions_of_trained_models_equal_one_pass_outputs(fixture, request):
    reference: Reference = request.getfixturevalue(fixture)
    classifier = AdaptiveClassifier.from_pretrained(
        reference.classifier.model.folder, engine="onnxruntime", threads=1
    )
    assert isinstance(classifier.engine, OnnxEngine)
    exits, probabilities, near_threshold = reference.answers(classifier)
    predictions = classifier.predict(reference.texts, 4)
    expected_exits = np.asarray(classifier.layers)[exits]
    clear = ~near_threshold
    assert (predictions.exits == expected_exits)[clear].all()
    np.testing.assert_allclose(predictions.probabilities[clear], probabilities[clear], atol=1e-4)
    assert classifier.warm_up() == 0


def test_latency_table_has_positive_times_and_names_engine(sweet):
    engine = load_engine("onnxruntime", sweet.classifier.model, threads=1)
    choice = EngineChoice("onnxruntime", "float32")
    table = measure_latency(engine, choice, (16,), [2], lambda: None)
    assert (table.milliseconds > 0).all()
    assert "onnxruntime" in table.machine
    assert "1 thread" in table.machine


def test_physical_cores_is_at_least_one():
    assert physical_cores() >= 1
