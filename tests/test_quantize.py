"""Tests of int8 models: their thresholds, the layers that stay in float32, and predictions."""

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
def quantized_run(fine_tuned, tmp_path_factory):
    """A copy of a run whose model has thresholds for int8."""
    folder = tmp_path_factory.mktemp("quantized") / "run"
    shutil.copytree(fine_tuned[0], folder)
    assert quantize.main([f"--run={folder}"]) == 0
    return folder


def test_thresholds_for_int8_are_fitted_on_outputs_of_the_int8_layers(quantized_run, sweet):
    model = open_model(quantized_run / "model", "int8")
    engine = load_engine("onnxruntime", model, "int8")
    float32 = ExitOutputs.load(quantized_run / "exit_outputs" / "validation.npz").replica(0)
    int8 = quantize.quantized_outputs(model, engine, [(t,) for t in sweet.texts], float32)
    assert int8.exit_scores is not None
    difference = np.abs(int8.logits - float32.logits)
    assert 1e-6 < difference.mean() < 0.1 * np.abs(float32.logits).mean()
    float32_resolver, int8_resolver = (
        open_model(quantized_run / "model", p).resolver for p in ("float32", "int8")
    )
    assert int8_resolver.fronts.keys() == float32_resolver.fronts.keys()
    policy = "raw_confidence"
    thresholds = (float32_resolver.fronts[policy].threshold, int8_resolver.fronts[policy].threshold)
    assert list(thresholds[0]) != list(thresholds[1])
    int8_json = json.loads((quantized_run / "model" / "int8.json").read_text())
    assert len(int8_json["float32"]) == len(int8_json["int8"]) == len(model.layers)
    accuracies = (int8.predictions[0] == float32.labels[0]).mean(axis=-1)
    np.testing.assert_allclose(int8_json["int8"], accuracies)


def test_quantize_fits_on_the_calibration_rows_of_the_run(quantized_run, monkeypatch):
    """Fits on float32 outputs in place of int8 ones: the thresholds must be those of the run."""
    received = []

    def return_saved_outputs(model, engine, texts, saved):
        received.append(list(texts))
        return saved

    copy = quantized_run.parent / "again"
    shutil.copytree(quantized_run, copy)
    monkeypatch.setattr(quantize, "quantized_outputs", return_saved_outputs)
    assert quantize.main([f"--run={copy}"]) == 0
    before, after = (open_model(copy / "model", p).resolver for p in ("float32", "int8"))
    assert after.as_dict() == before.as_dict()
    # The texts, whose first word gives their class, match the labels that the run saved.
    labels = ExitOutputs.load(copy / "exit_outputs" / "calibration.npz").labels[0]
    expected = [0 if text[0].startswith("word0 ") else 1 for text in received[0]]
    classes = open_model(copy / "model").classes
    assert [int(classes[label].removeprefix("class ")) for label in labels] == expected


def test_exit_that_loses_more_than_half_a_point_in_int8_is_warned_of(
    quantized_run, monkeypatch, capsys
):
    copy = quantized_run.parent / "warned"
    shutil.copytree(quantized_run, copy)

    def negate_outputs(model, engine, texts, saved):
        return dataclasses.replace(saved, logits=-saved.logits)

    monkeypatch.setattr(quantize, "quantized_outputs", negate_outputs)
    monkeypatch.setattr(quantize, "load_engine", lambda *_, **__: None)
    assert quantize.main([f"--run={copy}"]) == 0
    printed = capsys.readouterr()
    assert "points in int8, whichever layers stay in float32" in printed.out
    assert "warning: exit 2 loses 100.0 points in int8 on the validation rows" in printed.err
    rows = len(ExitOutputs.load(copy / "exit_outputs" / "validation.npz").labels[0])
    lines = [line.split() for line in printed.out.splitlines()]
    header = ["exit", "float32", "int8", "changed", "lost", "gained", "accuracy", "and"]
    assert any(line[:8] == header for line in lines)
    # With negated logits of two classes, every prediction changes.
    assert any(line[:1] == ["2"] and line[3:6] == [str(rows), str(rows), "0"] for line in lines)


def test_layers_that_cost_an_exit_most_stay_in_float32(capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1000)
    right = np.where(labels[:, None] == np.arange(2), 1.0, -1.0)  # [N, C]
    exact = ExitOutputs(np.stack([right, right]), labels, np.asarray([2, 3]))
    wrong_share = {1: 0.003, 2: 0.02, 3: 0.5}  # of rows that a layer in int8 makes wrong at exit 2

    def outputs(float32_layers):
        wrong = sum(wrong_share[layer] for layer in (1, 2) if layer not in float32_layers)
        logits = exact.logits[0].copy()
        logits[0, : round(1000 * wrong)] *= -1
        return dataclasses.replace(exact, logits=logits)

    layers, final = select_float32_layers(exact, outputs)
    assert layers == [2], "layer 3 is above the exit that loses"
    assert exit_metrics(final) == [0.997, 1.0]
    message = "exit 2 would lose more than 0.5 points in int8: layer 2 of 3 in float32\n"
    assert capsys.readouterr().out == message
    assert select_float32_layers(exact, lambda float32_layers: exact) == ([], exact)
    tried = []

    def all_or_none(float32_layers):
        tried.append(list(float32_layers))
        return exact if float32_layers else outputs(float32_layers)

    layers, _ = select_float32_layers(exact, all_or_none, shared=True)
    assert layers == [1, 2, 3], "layers that share their parameters are in one precision"
    assert all(float32_layers in ([], [1, 2, 3]) for float32_layers in tried)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_regression_loss_in_int8_is_limited_relative_to_the_error(unit, capsys):
    rng = np.random.default_rng(0)
    targets = rng.standard_normal(400)
    predictions = targets + rng.standard_normal(400)
    identity = RunIdentity(metric="neg_mean_absolute_error", objective="regression")
    logits = np.stack([predictions, predictions])[..., None] * unit
    exact = ExitOutputs(logits, targets * unit, np.asarray([1, 2]), identity=identity)

    def outputs(layers, worse):
        errors = predictions - targets
        moved = predictions + worse * np.sign(errors) + 0.02 * rng.standard_normal(400)
        first_exit = predictions if 1 in layers else moved
        changed = np.stack([first_exit, predictions])[None, ..., None] * unit
        return dataclasses.replace(exact, logits=changed)

    layers, _ = select_float32_layers(exact, lambda layers: outputs(layers, 0.1))
    assert layers == [1]
    message = "the error of exit 1 would be more than 1% larger in int8: layer 1 of 2 in float32\n"
    assert capsys.readouterr().out == message
    layers, _ = select_float32_layers(exact, lambda layers: outputs(layers, 0.0))
    assert layers == []


def test_no_layer_stays_in_float32_for_an_insignificant_loss(capsys):
    labels = np.zeros(100, np.int64)
    right = np.stack([labels + 1.0, labels - 1.0], axis=-1)  # [N, C]
    exact = ExitOutputs(right[None], labels, np.asarray([2]))
    for lost, probability in ((3, 0.12), (4, None)):  # probability by chance: 1/8 and 1/16
        logits = exact.logits.copy()
        logits[:, :, :lost] *= -1
        with_losses = dataclasses.replace(exact, logits=logits)
        layers, _ = select_float32_layers(exact, lambda _, outputs=with_losses: outputs)
        assert layers == []
        printed = capsys.readouterr().out
        if probability is None:
            assert printed.endswith("in int8, whichever layers stay in float32\n")
        else:
            message = (
                f"exit 2 loses 3.0 points in int8 on 100 calibration rows ({lost} lost, 0 gained)"
            )
            assert printed.startswith(message)
            assert f"p = {probability}" in printed
    assert sign_test(3, 1) == 5 / 16
    assert sign_test(0, 0) == 1


def test_float32_layers_option_is_validated_and_saved(quantized_run, capsys):
    for value in ("0", "1,x", "9", ","):
        assert quantize.main([f"--run={quantized_run}", f"--float32_layers={value}"]) == 2
        message = "error: --float32_layers must be layers from 1 to "
        assert capsys.readouterr().err.startswith(message)
    copy = quantized_run.parent / "named"
    shutil.copytree(quantized_run, copy)
    assert quantize.main([f"--run={copy}", "--float32_layers=2,1"]) == 0
    int8_json = json.loads((copy / "model" / "int8.json").read_text())
    assert int8_json["float32_layers"] == [1, 2]


def test_engine_keeps_the_layers_of_int8_json_in_float32(quantized_run, tmp_path):
    shutil.copytree(quantized_run / "model", tmp_path / "model")
    path = tmp_path / "model" / "int8.json"
    int8_json = json.loads(path.read_text())
    assert int8_json["float32_layers"] == []
    model = open_model(quantized_run / "model", "int8")
    texts = np.full((2, 2, 5), 7, np.int32)
    texts[1] = 0
    batch = StageBatch(5, np.asarray([[0, 1], [5, 5]], np.int32), texts)

    def logits(folder, precision):
        engine = load_engine("onnxruntime", open_model(folder), precision, threads=1)
        return engine.run(engine.stages(full=True)[0], batch, None).logits

    exact, quantized = (logits(quantized_run / "model", name) for name in ("float32", "int8"))
    assert np.abs(quantized - exact).max() > 1e-5
    all_layers = list(range(1, model.layers[-1] + 1))
    path.write_text(json.dumps(int8_json | {"float32_layers": all_layers}))
    np.testing.assert_allclose(logits(tmp_path / "model", "int8"), exact, atol=1e-6)


def test_layers_that_share_parameters_have_one_precision(tmp_path):
    model = open_model(Saved(tmp_path, "albert").folder)

    def count_float32_matrices(layers):
        networks = build_graphs(model, "int8", layers).networks
        weights = [
            w for network in networks for _, graph in network for w in graph.weights.values()
        ]
        return sum(w.dtype == np.float32 and w.ndim == 2 for w in weights)

    assert count_float32_matrices(range(1, 4)) > count_float32_matrices(())
    with pytest.raises(ValueError, match="all 3 or none"):
        build_graphs(model, "int8", [2])
    with pytest.raises(UserError, match="share their parameters: name all of them, 1,2,3, or none"):
        quantize._read_layers("2", 3, shared=quantize._shares_layers(model))


def test_int8_predictions_do_not_depend_on_batch_size_or_mode(quantized_run, sweet):
    classifier = AdaptiveClassifier.from_pretrained(quantized_run / "model", precision="int8")
    assert classifier.engine.description.endswith("int8")
    predictions = [
        classifier.predict(sweet.texts, size, mode)
        for size, mode in ((1, "latency"), (5, "latency"), (16, "throughput"))
    ]
    for batched in predictions[1:]:
        assert batched.exits.tolist() == predictions[0].exits.tolist()
        np.testing.assert_allclose(batched.probabilities, predictions[0].probabilities, atol=1e-4)
    exact = sweet.classifier.predict(sweet.texts)
    assert (predictions[0].labels == exact.labels).mean() > 0.9


def test_onnx_export_has_float32_and_int8_predictions_of_the_model(quantized_run, sweet, tmp_path):
    options = [
        f"--model={quantized_run / 'model'}",
        f"--output={tmp_path / 'model'}",
        "--format=onnx",
    ]
    assert export.main(options) == 0
    for precision in ("float32", "int8"):
        exported, original = (
            AdaptiveClassifier.from_pretrained(
                folder, engine="onnxruntime", precision=precision
            ).predict(sweet.texts)
            for folder in (tmp_path / "model", quantized_run / "model")
        )
        assert exported.exits.tolist() == original.exits.tolist()
        np.testing.assert_array_equal(exported.probabilities, original.probabilities)
    (tmp_path / "model" / "onnx" / "segment_00_00.int8.onnx").write_bytes(b"junk")
    with pytest.raises(UserError, match="ONNX Runtime cannot read a graph"):
        AdaptiveClassifier.from_pretrained(tmp_path / "model", precision="int8")


def test_int8_is_refused_without_thresholds_or_on_another_engine(
    sweet, quantized_run, tmp_path, capsys
):
    folder = sweet.classifier.model.folder
    assert default_engine(open_model(folder), "int8") == "onnxruntime"
    with pytest.raises(UserError, match=r"has no thresholds for int8.*run sweet-jax quantize"):
        AdaptiveClassifier.from_pretrained(folder, precision="int8")
    words = "the jax engine does not support precision 'int8': .*, or onnxruntime with float32 or"
    with pytest.raises(UserError, match=words):
        AdaptiveClassifier.from_pretrained(quantized_run / "model", precision="int8", engine="jax")
    shutil.copytree(quantized_run / "model", tmp_path / "model")
    (tmp_path / "model" / "int8.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be read .*run sweet-jax quantize again"):
        AdaptiveClassifier.from_pretrained(tmp_path / "model", precision="int8")
    assert quantize.main([f"--run={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_quantize_hints_at_the_working_directory_for_missing_data(quantized_run, tmp_path, capsys):
    folder = shutil.copytree(quantized_run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"data_files": "absent.csv"}))
    assert quantize.main([f"--run={folder}"]) == 2
    assert "run this in the folder where the run was trained" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(config | {"text_columns": "absent"}))
    assert quantize.main([f"--run={folder}"]) == 2
    printed = capsys.readouterr().err  # the file exists, so that another folder would not help
    assert "'absent'" in printed
    assert "run this in the folder" not in printed
