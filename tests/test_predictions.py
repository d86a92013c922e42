"""The arrays that `AdaptiveClassifier.predict` returns, and the arguments that it refuses."""

import errno
import json

import numpy as np
import pandas as pd
import pytest

from sweet_jax import AdaptiveClassifier, ExitOutputs, Run, predict, simulate, train
from sweet_jax.data import tables
from sweet_jax.errors import UserError

TEXTS = ["word0 word5", "word1 word7 word9", "word3"]


@pytest.fixture
def classifier(sweet) -> AdaptiveClassifier:
    return sweet.classifier


def test_predictions_are_a_sequence_with_one_prediction_per_text(classifier):
    predictions = classifier.predict(TEXTS)
    assert len(predictions) == 3
    streamed = list(classifier.stream(TEXTS))
    for prediction, expected in zip(predictions, streamed, strict=True):
        assert prediction.label == expected.label
        assert type(prediction.label) is str
        np.testing.assert_array_equal(prediction.probabilities, expected.probabilities)
        assert prediction[2:] == expected[2:]
    assert predictions[-1].exit == predictions.exits[-1]
    np.testing.assert_array_equal(predictions.probability, predictions.probabilities.max(axis=1))
    assert predictions[1:].labels.tolist() == predictions.labels[1:].tolist()
    assert predictions[1:][0].label == predictions[1].label
    table = pd.DataFrame(predictions)
    assert list(table.columns) == ["label", "probabilities", "exit", "cost", "probability"]
    assert len(table) == 3


def test_type_of_labels_does_not_depend_on_the_texts(classifier):
    width = max(map(len, classifier.classes))
    for texts in ([], TEXTS[:1], TEXTS):
        assert classifier.predict(texts).labels.dtype == f"<U{width}"


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("a text", {}, r"got a single text: pass \[text\]"),
        (None, {}, "texts must be a list of texts or a table; got None"),
        (5, {}, "texts must be a list of texts or a table; got 5"),
        (TEXTS, {"batch_size": 2.0}, r"batch_size must be an integer; got 2\.0"),
        (TEXTS, {"batch_size": None}, "batch_size must be an integer; got None"),
        (TEXTS, {"batch_size": True}, "batch_size must be an integer; got True"),
        (TEXTS, {"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ],
)
def test_invalid_arguments_of_predict_are_refused(classifier, texts, options, message):
    with pytest.raises(UserError, match=message):
        classifier.predict(texts, **options)


def test_boolean_target_is_refused(sweet):
    with pytest.raises(UserError, match="cost must be a number; got True"):
        sweet.classifier.at(cost=True)


def test_workdir_of_none_is_refused_before_anything_is_written(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="workdir must be a path; got None"):
        train(str(rows), workdir=None)
    assert not list(tmp_path.iterdir())


def test_thresholds_of_a_run_s_curve_are_those_of_its_classifier(fine_tuned, sweet):
    run = Run.load(fine_tuned[0])
    curve = run.curve("confidence")
    place = curve.threshold.shape[1] // 2
    classifier = run.classifier(policy="confidence", threshold=curve.threshold[0, place])
    predictions = classifier.predict(sweet.texts)
    assert predictions.cost.mean() == pytest.approx(curve.cost[0, place], abs=0.02)


def test_objects_that_are_not_outputs_or_policies_are_refused(sweet):
    with pytest.raises(UserError, match=r"outputs must be an ExitOutputs; got 'file\.npz'"):
        simulate("file.npz")
    with pytest.raises(UserError, match="calibration must be an ExitOutputs; got 'file'"):
        simulate(sweet.outputs, calibration="file")
    with pytest.raises(UserError, match="policy must be a name or a function; got 3"):
        simulate(sweet.outputs, policy=3)
    assert isinstance(sweet.outputs, ExitOutputs)


def test_unwritable_model_is_refused_before_anything_is_measured(sweet, monkeypatch, capsys):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("sweet_jax.predict.measure_latency", None)
    folder = sweet.classifier.model.folder
    assert predict.main([f"--model={folder}", "--measure"]) == 2
    expected = f"error: {str(folder)!r} is not writable (Permission denied): copy the model to"
    assert expected in capsys.readouterr().err


def test_text_longer_than_the_limit_is_an_error_of_its_row(sweet, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_TEXT", 20)
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("word0", "w" * 21)))
    arguments = [f"--model={sweet.classifier.model.folder}", f"--input={source}"]
    assert predict.main([*arguments, f"--output={output}"]) == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert "label" in answers[0]
    assert answers[1]["error"] == "column 'text' has 21 characters; at most 20 are read"
