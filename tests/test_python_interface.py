"""Messages, representations and types of the Python interface."""

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import sweet_jax
from sweet_jax import AdaptiveClassifier, ExitOutputs, UserError
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.inference.engine_table import engine_name
from sweet_jax.inference.predictions import rows_of
from sweet_jax.inference.text_tables import TextTable


def message_of(call) -> str:
    """The message of the UserError that a call raises, which must be one line."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame({"text": ["good", "bad", "fine"], "label": ["yes", "no", "yes"]})


@pytest.mark.parametrize(
    "table", [pd.DataFrame({"t": ["a"], "n": [1]}), pa.table({"t": ["a"], "n": [1]})]
)
def test_a_table_to_predict_without_the_model_s_column_says_which_it_needs(table):
    assert message_of(lambda: rows_of(table, ("text",))) == (
        "the table has no column 'text', which the model was trained on (it has 't', 'n'): rename "
        "the column of texts, or pass its values"
    )


def test_the_message_on_a_wide_table_lists_a_few_of_its_columns():
    wide = pd.DataFrame({f"column {n}": ["a"] for n in range(300)})
    message = message_of(lambda: rows_of(wide, ("text",)))
    assert "'column 9' and 290 more)" in message


def test_names_with_blanks_are_found_in_a_table_to_predict():
    assert list(rows_of(pd.DataFrame({" text ": ["a"]}), ("text",))) == ["a"]


def test_messages_on_validation_rows_name_them(frame, tmp_path):
    def train(validation) -> None:
        asked = {"text": "text", "label": "label", "workdir": tmp_path / "run"}
        sweet_jax.train(frame, validation=validation, **asked)

    unnamed = message_of(lambda: train(frame.rename(columns={"label": "y"})))
    assert unnamed == ("the validation data: unknown column 'label': choose one of 'text', 'y'")
    assert message_of(lambda: train(frame[:0])) == "the validation data has no rows"
    assert message_of(lambda: train(0.2)).startswith("validation must be the name of a file")


@pytest.mark.parametrize("names", [{"text": "text"}, {}])
def test_training_without_rows_says_so(frame, names, tmp_path):
    for empty in (pd.DataFrame({"text": [], "label": []}), frame[:0]):
        call = lambda data=empty: sweet_jax.train(data, workdir=tmp_path / "run", **names)
        assert message_of(call) == "the data has no rows"
    assert not (tmp_path / "run").exists()


def test_columns_in_place_of_their_names_are_refused(frame, tmp_path):
    long = pd.concat([frame] * 20)
    call = lambda **names: sweet_jax.train(long, workdir=tmp_path / "run", **names)
    label = message_of(lambda: call(text="text", label=long.label))
    assert label.startswith("label must be the name of the label column (str); got Series: 0 yes")
    text = message_of(lambda: call(text=long.text))
    assert text.startswith("text must be the name of the text column (str), or two names; got Ser")
    for wrong in (None, 5, ("a", 1), ["a", "b", "c"]):
        assert message_of(lambda wrong=wrong: call(text=wrong)).startswith("text must be the name")
    key = message_of(lambda: call(text="text", checkpoint=long.text))
    assert key.startswith("checkpoint must be text (str); got 0 good 1 bad")
    assert max(map(len, (label, text, key))) < 250


def test_the_encoder_of_a_run_s_folder_is_asked_for_by_its_model(tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "model" / "exits.json").write_text("{}")
    expected = f"{str(run)!r} is the folder of a run: pass {str(run / 'model')!r}"
    assert message_of(lambda: sweet_jax.load_encoder(run)) == expected
    assert message_of(lambda: AdaptiveClassifier.from_pretrained(run)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1.5, 2]}, r"layers must be whole numbers; got \[1\.5 2\. \]"),
        ({"layers": ["1", "2"]}, "layers must be whole numbers"),
        (
            {"labels": ["World", "Sports", "World"]},
            "labels must be indices of classes; got 'World'",
        ),
        ({"labels": ["0", "1", "2"]}, "labels must be indices of classes; got '0'"),
        ({"labels": pd.Series(["b", "a", "b"])}, "labels must be indices of classes; got 'b'"),
        ({"labels": [0, None, 1]}, "labels must be indices of classes; got None"),
    ],
)
def test_outputs_refuse_layers_and_labels_that_are_no_numbers(changes, message):
    values = {"logits": np.zeros((2, 3, 4)), "labels": [0, 1, 2], "layers": [1, 2], **changes}
    with pytest.raises(ValueError, match=message):
        ExitOutputs(**values)


def test_outputs_take_lists_and_the_logits_of_a_diverged_exit():
    logits = np.zeros((2, 3, 4))
    logits[1] = np.nan
    outputs = ExitOutputs(logits.tolist(), np.asarray([0, 1, 2], object), [1.0, 2.0])
    assert outputs.layers.dtype == outputs.labels.dtype == np.int64
    assert np.isnan(outputs.logits[0, 1]).all()


def test_the_repr_of_outputs_of_a_curve_and_of_an_analysis_are_short():
    logits = np.random.default_rng(0).normal(size=(2, 3, 60, 4))
    labels = np.arange(60) % 4
    outputs = ExitOutputs(logits, labels, [1, 2, 6], identity=RunIdentity(split="validation"))
    shown = "ExitOutputs(split='validation', R=2, E=3, N=60, C=4, layers=[1 2 6])"
    assert repr(outputs) == shown
    curve = sweet_jax.simulate(outputs, thresholds=[0.3, 0.4])
    assert repr(curve) == "Curve(R=2, T=2, E=3)"
    found = repr(analyse(outputs, outputs))
    assert found.startswith(f"Analysis(policy='confidence', calibration={shown}, validation=")
    assert len(found) < 250


def test_the_repr_of_a_classifier_says_what_it_runs(sweet, tmp_path):
    classifier = sweet.classifier.at("confidence", threshold=0.4)
    assert repr(classifier) == (
        f"AdaptiveClassifier({str(classifier.model.folder)!r}, policy='confidence', "
        "threshold=0.4, engine='jax', layers=(2, 3, 4), 2 classes)"
    )
    assert "threshold=inf" in repr(classifier.at(threshold=np.inf))

    class OwnEngine:
        pass

    assert engine_name(OwnEngine()) == "OwnEngine"


@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame({"text": ["a"]}),
        pa.table({"text": ["a"]}),
        pa.record_batch({"text": ["a"]}),
        datasets.Dataset.from_dict({"text": ["a"]}),
    ],
)
def test_tables_have_the_type_that_predict_declares(table):
    assert isinstance(table, TextTable)
    assert list(rows_of(table, ("text",))) == ["a"]
