"""What a user of the Python interface reads: messages, representations and types."""

import pandas as pd
import pyarrow as pa
import pytest

import sweet_jax
from sweet_jax import UserError
from sweet_jax.inference.predictions import rows_of


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
