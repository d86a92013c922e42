"""Tables: the columns of an opened file, and the records of the selected columns."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sweet_jax.errors import UserError, list_names

if TYPE_CHECKING:  # this module is also used without PyArrow
    import pyarrow as pa


class ColumnError(UserError):
    """Raised for columns that are missing or cannot be read; `open_table` adds the file's name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """Holds the selected values of one row of a file, or its error."""

    values: tuple[Any, ...]  # None for a missing value; () for a row that could not be parsed
    error: str | None
    # Number of bytes read so far; for Parquet, Arrow and Excel, of rows; for a folder, of files.
    position: int
    row: int  # number of the row, from 1, not counting the header
    line: int  # number of the row's first line, from 1; 0 in formats without lines


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names the columns to read.

    Attributes:
      texts: names of the columns of texts.
      label: name of the label column; None to read texts for prediction.
      kept: names of further columns, whose values are kept as in JSON: text, numbers and booleans
        unchanged, lists of text joined to a|b, and others converted with str.
      several_labels: whether a label may be empty or a list of labels, which is read as a|b.

    """

    texts: tuple[str, ...]
    label: str | None = None
    kept: tuple[str, ...] = ()
    several_labels: bool = False

    @property
    def checked(self) -> tuple[str, ...]:
        """The text columns and the label column, whose values must be, or become, text."""
        return self.texts if self.label is None else (*self.texts, self.label)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns in the order of `Record.values`."""
        return (*self.checked, *self.kept)


class Table(NamedTuple):
    """An opened file: its columns, and a function that yields its records.

    Attributes:
      names: names of the columns; for JSON, the keys of the first 1,000 objects; () for .txt.
      records: function that yields the records of some columns; it can be called only once.
      schema: schema of a Parquet or Arrow file, which may declare class names; otherwise None.

    """

    names: Sequence[str]
    records: Callable[[Columns], Iterator[Record]]
    schema: "pa.Schema | None" = None


def find_column(name: str, present: Sequence[str]) -> int:
    """Returns the index of a column, ignoring spaces around names unless the exact name is present.

    Raises ColumnError for a name that is missing or occurs more than once.
    """
    if name not in present:
        name, present = name.strip(), [column.strip() for column in present]
    if name not in present:
        near = difflib.get_close_matches(name, present, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {list_names(present)}"
        raise ColumnError(f"unknown column {name!r}: {hint if present else 'there are no columns'}")
    if present.count(name) > 1:
        raise ColumnError(f"column {name!r} occurs more than once: rename all but one")
    return present.index(name)


def find_model_column(name: str, present: Sequence[str]) -> int:
    """Returns the index, in a table to predict, of a column that the model was trained on.

    Raises ColumnError as `find_column` does.
    """
    if name.strip() not in [column.strip() for column in present]:
        raise ColumnError(
            f"the table has no column {name!r}, which the model was trained on (it has "
            f"{list_names(present) or 'none'}): rename the column of texts, or pass its values"
        )
    return find_column(name, present)


def missing_column(values: Sequence[Any], columns: Columns) -> str | None:
    """Returns the first column without a value, or None if all have one.

    A blank text counts as missing, except in a pair whose other text is not blank, since some pairs
    in GLUE's QQP have one. An empty field in a CSV has no value.
    """
    texts = values[: len(columns.texts)]
    for name, value in zip(columns.checked, values, strict=False):
        may_be_blank = name != columns.label and any(text and text.strip() for text in texts)
        if columns.several_labels and name == columns.label:
            continue  # a row may have no labels
        if value is None or not (may_be_blank or value.strip()):
            return name
    return None


def make_record(
    values: tuple[Any, ...], columns: Columns, position: int, row: int, line: int = 0
) -> Record:
    """Returns a record with the values, or with an error if a text is not text or not UTF-8.

    The label stays as it is; `read_labels` makes it text. A record with an error has the label, the
    values of the `kept` columns, and None for the texts.
    """
    texts, count = values[: len(columns.texts)], len(columns.checked)
    label, kept = values[len(texts) : count], tuple(map(_as_json, values[count:]))
    for value, name in zip(texts, columns.texts, strict=False):
        error = None if value is None else text_error(value, name)
        if error is not None:
            return Record((None,) * len(texts) + label + kept, error, position, row, line)
    return Record((*texts, *label, *kept), None, position, row, line)


# Tokenizers read all of a text before they truncate it, and need about 70 bytes per character.
LONGEST_TEXT = 1 << 24  # maximum number of characters


def text_error(value: Any, column: str) -> str | None:
    """Returns what is wrong with a value that must be text in UTF-8; None if nothing is."""
    if not isinstance(value, str):
        return f"column {column!r} is not text but {value!a:.40}"
    if len(value) > LONGEST_TEXT:
        return f"column {column!r} has {len(value):,} characters; at most {LONGEST_TEXT:,} are read"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"column {column!r} holds text that is not UTF-8, {value!a:.60}; save it as UTF-8"
    return None


def _as_json(value: Any) -> Any:
    """Returns a value that JSON can hold: None for NaN and infinity, text without surrogates."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _as_json("|".join(value))  # as labels are written, and read again
    return value if value is None or isinstance(value, bool | int) else str(value)
