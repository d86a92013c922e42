"""int8: the layers multiply integers, and thresholds are fitted on what they answer."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from saved_models import Saved

from sweet_jax import AdaptiveClassifier, ExitOutputs, export, quantize
from sweet_jax.errors import UserError
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.engine import StageBatch, load_engine
from sweet_jax.inference.engine_choice import default_engine
from sweet_jax.inference.float32_layers import exit_metrics, select_float32_layers, sign_test

pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
from sweet_jax.inference.onnx_build import build_graphs


@pytest.fixture(scope="module")
def run(fine_tuned, tmp_path_factory):
    """A copy of a run whose model has thresholds for int8."""
    folder = tmp_path_factory.mktemp("quantized") / "run"
    shutil.copytree(fine_tuned[0], folder)
    assert quantize.main([f"--run={folder}"]) == 0
    return folder


def test_calibrators_are_fitted_on_what_the_quantized_layers_answer(run, sweet):
    model = open_model(run / "model", "int8")
    engine = load_engine("onnxruntime", model, "int8")
    saved = ExitOutputs.load(run / "exit_outputs" / "validation.npz").replica(0)
    found = quantize.quantized_outputs(model, engine, [(t,) for t in sweet.texts], saved)
    assert found.exit_scores is not None
    difference = np.abs(found.logits - saved.logits)
    assert 1e-6 < difference.mean() < 0.1 * np.abs(saved.logits).mean()
    before, after = (open_model(run / "model", p).resolver for p in ("float32", "int8"))
    assert after.fronts.keys() == before.fronts.keys()
    policy = "raw_confidence"
    thresholds = (before.fronts[policy].threshold, after.fronts[policy].threshold)
    assert list(thresholds[0]) != list(thresholds[1])
    written = json.loads((run / "model" / "int8.json").read_text())
    assert len(written["float32"]) == len(written["int8"]) == len(model.layers)
    right = (found.predictions[0] == saved.labels[0]).mean(axis=-1)
    np.testing.assert_allclose(written["int8"], right)


def test_the_calibration_rows_are_those_of_the_run(run, monkeypatch):
    """Where the layers answer as in float32, what is fitted is what the run fitted."""
    asked = []

    def answers(model, engine, texts, like):
        asked.append(list(texts))
        return like

    again = run.parent / "again"
    shutil.copytree(run, again)
    monkeypatch.setattr(quantize, "quantized_outputs", answers)
    assert quantize.main([f"--run={again}"]) == 0
    before, after = (open_model(again / "model", p).resolver for p in ("float32", "int8"))
    assert after.as_dict() == before.as_dict()
    # And the texts are the ones whose labels the run saved.
    labels = ExitOutputs.load(again / "exit_outputs" / "calibration.npz").labels[0]
    told = [0 if text[0].startswith("word0 ") else 1 for text in asked[0]]
    classes = open_model(again / "model").classes
    assert [int(classes[label].removeprefix("class ")) for label in labels] == told


def test_an_exit_that_loses_more_than_half_a_point_is_warned_of(run, monkeypatch, capsys):
    again = run.parent / "warned"
    shutil.copytree(run, again)
    opposite = lambda model, engine, texts, like: dataclasses.replace(like, logits=-like.logits)
    monkeypatch.setattr(quantize, "quantized_outputs", opposite)
    monkeypatch.setattr(quantize, "load_engine", lambda *_, **__: None)
    assert quantize.main([f"--run={again}"]) == 0
    printed = capsys.readouterr()
    assert "points in int8, whichever layers stay in float32" in printed.out
    assert "warning: exit 2 loses 100.0 points in int8 on the validation rows" in printed.err
    rows = len(ExitOutputs.load(again / "exit_outputs" / "validation.npz").labels[0])
    lines = [line.split() for line in printed.out.splitlines()]
    heads = ["exit", "float32", "int8", "changed", "lost", "gained", "accuracy", "and"]
    assert any(line[:8] == heads for line in lines)
    # Of two classes every prediction changes, and every row that was right is lost.
    assert any(line[:1] == ["2"] and line[3:6] == [str(rows), str(rows), "0"] for line in lines)


def test_the_layers_that_cost_an_exit_most_stay_in_float32(capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1000)
    right = np.where(labels[:, None] == np.arange(2), 1.0, -1.0)  # [N, C]
    exact = ExitOutputs(np.stack([right, right]), labels, np.asarray([2, 3]))
    share = {1: 0.003, 2: 0.02, 3: 0.5}  # of the rows that a layer in int8 spoils at exit 2

    def outputs(kept):
        spoiled = sum(share[layer] for layer in (1, 2) if layer not in kept)
        logits = exact.logits[0].copy()
        logits[0, : round(1000 * spoiled)] *= -1
        return dataclasses.replace(exact, logits=logits)

    layers, found = select_float32_layers(exact, outputs)
    assert layers == [2], "layer 3 is above the exit that loses"
    assert exit_metrics(found) == [0.997, 1.0]
    told = "exit 2 would lose more than 0.5 points in int8: layer 2 of 3 in float32\n"
    assert capsys.readouterr().out == told
    assert select_float32_layers(exact, lambda kept: exact) == ([], exact)
    asked = []

    def all_or_none(kept):
        asked.append(list(kept))
        return exact if kept else outputs(kept)

    layers, _ = select_float32_layers(exact, all_or_none, shared=True)
    assert layers == [1, 2, 3], "layers that share their parameters are in one precision"
    assert all(kept in ([], [1, 2, 3]) for kept in asked)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_numbers_are_held_to_a_share_of_their_error_whatever_their_unit(unit, capsys):
    rng = np.random.default_rng(0)
    targets = rng.standard_normal(400)
    given = targets + rng.standard_normal(400)
    identity = RunIdentity(metric="neg_mean_absolute_error", objective="regression")
    logits = np.stack([given, given])[..., None] * unit
    exact = ExitOutputs(logits, targets * unit, np.asarray([1, 2]), identity=identity)

    def outputs(kept, worse):
        moved = given + worse * np.sign(given - targets) + 0.02 * rng.standard_normal(400)
        changed = np.stack([given if 1 in kept else moved, given])[None, ..., None] * unit
        return dataclasses.replace(exact, logits=changed)

    kept, _ = select_float32_layers(exact, lambda kept: outputs(kept, 0.1))
    assert kept == [1]
    told = "the error of exit 1 would be more than 1% larger in int8: layer 1 of 2 in float32\n"
    assert capsys.readouterr().out == told
    kept, _ = select_float32_layers(exact, lambda kept: outputs(kept, 0.0))
    assert kept == []


def test_no_layer_stays_in_float32_for_a_loss_that_chance_explains(capsys):
    labels = np.zeros(100, np.int64)
    right = np.stack([labels + 1.0, labels - 1.0], axis=-1)  # [N, C]
    exact = ExitOutputs(right[None], labels, np.asarray([2]))
    for lost, probability in ((3, 0.12), (4, None)):  # 1/8 and 1/16 by chance
        logits = exact.logits.copy()
        logits[:, :, :lost] *= -1
        spoiled = dataclasses.replace(exact, logits=logits)
        kept, _ = select_float32_layers(exact, lambda kept, now=spoiled: now)
        assert kept == []
        printed = capsys.readouterr().out
        if probability is None:
            assert printed.endswith("in int8, whichever layers stay in float32\n")
        else:
            told = (
                f"exit 2 loses 3.0 points in int8 on 100 calibration rows ({lost} lost, 0 gained)"
            )
            assert printed.startswith(told)
            assert f"p = {probability}" in printed
    assert sign_test(3, 1) == 5 / 16
    assert sign_test(0, 0) == 1


def test_layers_in_float32_may_be_named(run, capsys):
    for given in ("0", "1,x", "9", ""):
        assert quantize.main([f"--run={run}", f"--float32_layers={given}"]) == 2
        told = "error: --float32_layers must be layers from 1 to "
        assert capsys.readouterr().err.startswith(told)
    again = run.parent / "named"
    shutil.copytree(run, again)
    assert quantize.main([f"--run={again}", "--float32_layers=2,1"]) == 0
    written = json.loads((again / "model" / "int8.json").read_text())
    assert written["float32_layers"] == [1, 2]


def test_layers_in_float32_are_those_of_the_file(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    path = tmp_path / "model" / "int8.json"
    written = json.loads(path.read_text())
    assert written["float32_layers"] == []
    model = open_model(run / "model", "int8")
    texts = np.full((2, 2, 5), 7, np.int32)
    texts[1] = 0
    batch = StageBatch(5, np.asarray([[0, 1], [5, 5]], np.int32), texts)

    def logits(folder, precision):
        engine = load_engine("onnxruntime", open_model(folder), precision, threads=1)
        return engine.run(engine.stages(full=True)[0], batch, None).logits

    exact, quantized = (logits(run / "model", name) for name in ("float32", "int8"))
    assert np.abs(quantized - exact).max() > 1e-5
    every = list(range(1, model.layers[-1] + 1))
    path.write_text(json.dumps(written | {"float32_layers": every}))
    np.testing.assert_allclose(logits(tmp_path / "model", "int8"), exact, atol=1e-6)


def test_layers_that_share_parameters_are_in_float32_together(tmp_path):
    model = open_model(Saved(tmp_path, "albert").folder)

    def count(layers):
        networks = build_graphs(model, "int8", layers).networks
        weights = [
            w for network in networks for _, graph in network for w in graph.weights.values()
        ]
        return sum(w.dtype == np.float32 and w.ndim == 2 for w in weights)

    assert count(range(1, 4)) > count(())
    with pytest.raises(ValueError, match="all 3 or none"):
        build_graphs(model, "int8", [2])
    with pytest.raises(UserError, match="share their parameters: name all of them, 1,2,3, or none"):
        quantize._read_layers("2", 3, shared=quantize._shares_layers(model))


def test_predictions_do_not_depend_on_the_texts_beside(run, sweet):
    classifier = AdaptiveClassifier.from_pretrained(run / "model", precision="int8")
    assert classifier.engine.description.endswith("int8")
    found = [
        classifier.predict(sweet.texts, size, mode)
        for size, mode in ((1, "latency"), (5, "latency"), (16, "throughput"))
    ]
    for other in found[1:]:
        assert other.exits.tolist() == found[0].exits.tolist()
        np.testing.assert_allclose(other.probabilities, found[0].probabilities, atol=1e-4)
    exact = sweet.classifier.predict(sweet.texts)
    assert (found[0].labels == exact.labels).mean() > 0.9


def test_an_exported_model_has_both_precisions(run, sweet, tmp_path):
    options = [f"--model={run / 'model'}", f"--output={tmp_path / 'model'}", "--format=onnx"]
    assert export.main(options) == 0
    for precision in ("float32", "int8"):
        found, wanted = (
            AdaptiveClassifier.from_pretrained(
                folder, engine="onnxruntime", precision=precision
            ).predict(sweet.texts)
            for folder in (tmp_path / "model", run / "model")
        )
        assert found.exits.tolist() == wanted.exits.tolist()
        np.testing.assert_array_equal(found.probabilities, wanted.probabilities)
    (tmp_path / "model" / "onnx" / "segment_00_00.int8.onnx").write_bytes(b"junk")
    with pytest.raises(UserError, match="ONNX Runtime cannot read a graph"):
        AdaptiveClassifier.from_pretrained(tmp_path / "model", precision="int8")


def test_int8_is_refused_where_it_was_not_fitted(sweet, run, tmp_path, capsys):
    folder = sweet.classifier.model.folder
    assert default_engine(open_model(folder), "int8") == "onnxruntime"
    with pytest.raises(UserError, match=r"has no thresholds for int8.*run sweet-jax quantize"):
        AdaptiveClassifier.from_pretrained(folder, precision="int8")
    words = "the jax engine does not support precision 'int8': .*, or onnxruntime with float32 or"
    with pytest.raises(UserError, match=words):
        AdaptiveClassifier.from_pretrained(run / "model", precision="int8", engine="jax")
    shutil.copytree(run / "model", tmp_path / "model")
    (tmp_path / "model" / "int8.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be read .*run sweet-jax quantize again"):
        AdaptiveClassifier.from_pretrained(tmp_path / "model", precision="int8")
    assert quantize.main([f"--run={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_data_that_are_not_found_are_said_to_be_relative(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"data_files": "absent.csv"}))
    assert quantize.main([f"--run={folder}"]) == 2
    assert "run this in the folder where the run was trained" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(config | {"text_columns": "absent"}))
    assert quantize.main([f"--run={folder}"]) == 2
    printed = capsys.readouterr().err  # found, but not read: another folder is no cure
    assert "'absent'" in printed
    assert "run this in the folder" not in printed
