"""Labels as text: what a format stores as a number, a boolean or a list of labels."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from sweet_jax.data.tables import Columns, Record, text_error


def read_labels(records: Iterable[Record], columns: Columns) -> Iterator[Record]:
    """Yields records with their labels as text.

    The readers of Excel and Arrow files, which state the type of a value, have already converted
    it. For other formats, numbers and booleans are converted with str, and all must have the type
    of the first label; with `several_labels`, a list of labels becomes a|b. A record whose label is
    none of these has an error, and so has one whose label is not UTF-8.
    """
    if columns.label is None:
        yield from records
        return
    index, convert = len(columns.texts), _LabelTexts()
    for record in records:
        if not record.values:  # a row that could not be parsed
            yield record
            continue
        label = record.values[index]
        if columns.several_labels and isinstance(label, list):
            text, wrong = _join_labels(label)
        else:
            text, wrong = convert(label)
        error = record.error if wrong is None else f"column {columns.label!r} {wrong}"
        if error is None and text is not None:
            error = text_error(text, columns.label)
        if error is None and text is label:
            yield record
            continue
        values = (*record.values[:index], text, *record.values[index + 1 :])
        yield Record(values, error, record.position, record.row, record.line)


class _LabelTexts:
    """Converts labels to text; all labels must have the type of the first one.

    Integers and floats count as one type. All numbers are written in the type of the first one, so
    that 1 and 1.0 are the same class.
    """

    def __init__(self) -> None:
        self._first: Any = None

    def __call__(self, value: Any) -> tuple[str | None, str | None]:
        """Returns (text, None), where text is None for a missing label, or (None, error)."""
        if value is None or value != value:  # NaN
            return None, None
        if not isinstance(value, str | bool | int | float):
            more = ""
            if isinstance(value, list):
                more = "; lists of labels require --config.objective=multi_label"
            return None, f"is not a single value but {value!a:.40}{more}"
        first = self._first = value if self._first is None else self._first
        if type(value) is not type(first):
            if {type(value), type(first)} != {int, float}:
                return None, f"is {value!a:.40}, not of the type of the first, {first!a:.40}"
            with contextlib.suppress(OverflowError):  # for an integer too large for a float
                if isinstance(first, float) or (isinstance(value, float) and value.is_integer()):
                    value = type(first)(value)
        return str(value), None


def _join_labels(labels: list[Any]) -> tuple[str | None, str | None]:
    """Returns (the labels of a row as a|b, None), or (None, error)."""
    for label in labels:
        if not isinstance(label, str | int | float) or label != label:  # NaN
            return None, f"is a list with {label!a:.40} in it, which is not a label"
        if "|" in str(label):
            return None, f"is a list with {label!a:.40} in it: rename it, since | separates labels"
    return "|".join(map(str, labels)), None
