"""The names of columns, parsed from a config key or an option, or found in a file."""

import csv
import dataclasses
import io
from collections.abc import Sequence

from sweet_jax.data.tasks import Task
from sweet_jax.errors import UserError, list_names

# Column names that published data sets use for their texts, and for the two texts of a pair.
_TEXTS = ("text", "sentence", "content", "review", "comment", "utterance", "message", "document")
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)


def parse_names(text: str, present: Sequence[str] = ()) -> tuple[str, ...]:
    """Splits a comma-separated list of column names; a name with a comma must be in quotes.

    If the whole text is the name of a column in `present`, it is not split.
    """
    if text in present or text.strip() in {name.strip() for name in present}:
        return (text.strip(),) if text.strip() else ()
    rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)  # may have many lines
    return tuple(name.strip() for fields in rows for name in fields if name.strip())


def columns_for_model(
    text: str | None, present: Sequence[str], trained: Sequence[str]
) -> tuple[str, ...]:
    """Returns the text columns of a file that a saved model reads.

    Args:
      text: list of their names, as in `parse_names`; None or "" for the names in training.
      present: names of the file's columns, as in `parse_names`.
      trained: names of the one or two text columns that the model was trained on.

    Raises:
      UserError: for another number of columns than the model's, or the same column twice.

    """
    names = parse_names(text or "", present) or tuple(trained)
    if len(names) != len(trained):
        raise UserError(
            f"this model takes {len(trained)} text column(s), such as {','.join(trained)}; got "
            f"{','.join(names)}"
        )
    if len(set(names)) < len(names):
        raise UserError(
            f"the text columns {','.join(names)} are the same column twice, so that each text "
            "would be compared with itself: name the two different columns of the pair"
        )
    return names


def choose_columns(task: Task, present: Sequence[str], class_columns: Sequence[str] = ()) -> Task:
    """Returns the task with its columns, including those that it does not name.

    A text column that is not named must be the only column besides the label or the only one with a
    usual name; or there must be the two columns of a usual pair. If the label column is missing,
    the only column that declares classes is used.

    Args:
      task: task whose text columns may be ().
      present: names of the columns that hold text, and of the label column.
      class_columns: names of the columns that declare classes.

    Raises:
      UserError: if there are no such columns, more than two text columns, or the same one twice.

    """
    label = task.label_column
    if label not in present and len(class_columns) == 1:
        label = class_columns[0]
    texts = task.text_columns
    if not texts:
        texts = _find_texts([name.strip() for name in present if name.strip() != label])
        if not texts:
            raise UserError(
                "set --config.text_columns (--text of sweet-jax train FILE) to the column of the "
                "text, or the two columns of a pair: the columns are "
                f"{list_names(present) or 'unknown'}"
            )
    if len(texts) > 2 or len(set(texts)) < len(texts):
        raise UserError(
            "text_columns must name one column, or two different ones for pairs (put a name with "
            f"a comma in double quotes); got {', '.join(map(repr, texts))}"
        )
    return dataclasses.replace(task, text_columns=texts, label_column=label)


def _find_texts(names: Sequence[str]) -> tuple[str, ...]:
    if len(names) == 1:
        return (names[0],)
    pairs = [pair for pair in _PAIRS if set(pair) <= set(names)]
    usual = [name for name in names if name.lower() in _TEXTS]
    if len(pairs) == 1:
        return pairs[0]
    return (usual[0],) if len(usual) == 1 else ()
