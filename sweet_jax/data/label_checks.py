"""Labels that are probably not what their file's owner means: look-alikes, measurements, ids."""

import collections
import decimal
import re
import unicodedata
from collections.abc import Mapping, Sequence

from sweet_jax.config import UserError

_CHARACTERS = 60  # of a label that is shown
_SHOWN = 10  # of the largest and of the smallest classes, or of the first labels
_MOST_MEASUREMENTS = 10  # distinct numbers with a fraction that are taken for classes
_IDS = 20  # rows of which no two have the same label, from which a column is taken for ids
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")


def cut_label(label: str) -> str:
    """Returns a label as it is shown: the beginning of a long one."""
    return label if len(label) <= _CHARACTERS else f"{label[:_CHARACTERS]}…"


def list_labels(labels: Sequence[str]) -> str:
    """Returns the first labels as a message names them."""
    return ", ".join(repr(cut_label(label)) for label in labels[:_SHOWN])


def check_label_column(labels: Sequence[str], column: str) -> None:
    """Raises UserError where each of many rows has a label of its own, as an id column has."""
    if len(labels) >= _IDS and len(set(labels)) == len(labels):
        raise UserError(
            f"each of the {len(labels)} rows has another label in column {column!r}, such as "
            f"{cut_label(labels[0])!r}: is it an id? Name the label's column by "
            "--config.label_column"
        )


def is_written_list(label: str) -> bool:
    """Returns whether a label is a list as Python or JSON writes it, as to_csv of pandas does.

    Square brackets around quotes, commas, numbers or nothing; [spam] may be the name of a class.
    """
    return bool(re.fullmatch(r"\[(.*[\"',].*|[\s0-9]*)\]", label, re.DOTALL))


def describe_classes(counts: Mapping[str, int]) -> str:
    """Describes the classes and their numbers of rows, of many the largest and the smallest."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown = [f"{cut_label(name)!r} {count}" for name, count in ordered]
    if len(shown) > 2 * _SHOWN:
        shown[_SHOWN:-_SHOWN] = [f"… {len(shown) - 2 * _SHOWN} others …"]
    return f"{len(counts)} classes (rows of each): {', '.join(shown)}"


def label_warnings(counts: Mapping[str, int]) -> list[str]:
    """Returns warnings of labels that look alike, like measurements, or like ids.

    counts: number of rows by label.
    """
    found = []
    alike = collections.defaultdict(list)
    for name in counts:
        alike[_folded(name)].append(name)
    for names in alike.values():
        if len(names) > 1:
            listed = ", ".join(f"{cut_label(name)!a} ({counts[name]})" for name in sorted(names))
            found.append(
                f"labels that differ only by case, blanks or spelling are classes of their own: "
                f"{listed}; if they mean the same, write them alike in the file"
            )
    rows = sum(counts.values())
    measured = all(_NUMBER.fullmatch(name) for name in counts)
    fractions = sum(not float(name).is_integer() for name in counts) if measured else 0
    if fractions and len(counts) > _MOST_MEASUREMENTS:
        found.append(
            f"the labels are {len(counts)} different numbers, such as {next(iter(counts))}: "
            "they look like measurements, and each of them becomes a class; group them into "
            "classes, or predict the numbers with --config.objective=regression"
        )
    elif rows >= _IDS and len(counts) > rows / 2:
        found.append(
            f"{rows} rows have {len(counts)} different labels, such as "
            f"{cut_label(next(iter(counts)))!r}: is the label's column an id or a text?"
        )
    barred = next((name for name in counts if "|" in name), None)
    if barred is not None:
        found.append(
            f"labels such as {cut_label(barred)!r} are one class each: if they name several "
            "labels of a row, set --config.objective=multi_label"
        )
    return found


def is_number(label: str) -> bool:
    """Returns whether a label is a decimal number; Python's float takes 1_000 and ١٢ as well."""
    return bool(_NUMBER.fullmatch(label.strip()))


def without_fraction(label: str) -> str:
    """Returns a whole number without the zeros after its point, and any other label unchanged."""
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", label)


def _folded(name: str) -> str | decimal.Decimal:
    """Returns what labels that look alike have in common: 1, 1.0 and 01 are the number 1."""
    text = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return decimal.Decimal(text) if _NUMBER.fullmatch(text) else text
