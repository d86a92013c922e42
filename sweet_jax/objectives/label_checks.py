"""Checks for labels that are probably unintended: look-alikes, measurements, ids and lists."""

import collections
import decimal
import re
import unicodedata
from collections.abc import Mapping, Sequence

from sweet_jax.errors import UserError

_CHARACTERS = 60  # maximum number of characters of a label that are shown
_SHOWN = 10  # number of the largest and of the smallest classes, or of the first labels, shown
_MOST_MEASUREMENTS = 10  # maximum number of distinct labels with fractions that may be classes
_IDS = 20  # number of rows from which on labels that are all different are taken for ids
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")


def cut_label(label: str) -> str:
    """Returns a label for display: a long one is truncated."""
    return label if len(label) <= _CHARACTERS else f"{label[:_CHARACTERS]}…"


def list_labels(labels: Sequence[str]) -> str:
    """Returns the first labels for display in a message."""
    return ", ".join(repr(cut_label(label)) for label in labels[:_SHOWN])


def check_label_column(labels: Sequence[str], column: str) -> None:
    """Raises UserError if each of many rows has a different label, as in an id column."""
    if len(labels) >= _IDS and len(set(labels)) == len(labels):
        raise UserError(
            f"all {len(labels)} rows have different labels in column {column!r}, such as "
            f"{cut_label(labels[0])!r}, as in a column of ids: set --config.label_column to the "
            "column of the label"
        )


def is_written_list(label: str) -> bool:
    """Returns whether a label is a list written by Python or JSON, for example by pandas' to_csv.

    It has square brackets around quotes, commas, numbers or nothing; [spam] may be a class name.
    """
    return bool(re.fullmatch(r"\[(.*[\"',].*|[\s0-9]*)\]", label, re.DOTALL))


def describe_classes(counts: Mapping[str, int]) -> str:
    """Describes the classes and their numbers of rows; of many, only the largest and smallest."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    descriptions = [f"{cut_label(name)!r} {count}" for name, count in ordered]
    if len(descriptions) > 2 * _SHOWN:
        descriptions[_SHOWN:-_SHOWN] = [f"… {len(descriptions) - 2 * _SHOWN} others …"]
    return f"{len(counts)} classes (rows of each): {', '.join(descriptions)}"


def label_warnings(counts: Mapping[str, int]) -> list[str]:
    """Returns warnings about labels that look alike, or like measurements, ids or lists.

    Args:
      counts: number of rows of each label.

    """
    warnings = []
    alike = collections.defaultdict(list)
    for name in counts:
        alike[_folded(name)].append(name)
    for names in alike.values():
        if len(names) > 1:
            listed = ", ".join(f"{cut_label(name)!a} ({counts[name]})" for name in sorted(names))
            warnings.append(
                f"labels that differ only in case, spaces or spelling are separate classes: "
                f"{listed}; if they mean the same, write them the same way in the file"
            )
    rows = sum(counts.values())
    measured = all(_NUMBER.fullmatch(name) for name in counts)
    fractions = sum(not float(name).is_integer() for name in counts) if measured else 0
    if fractions and len(counts) > _MOST_MEASUREMENTS:
        warnings.append(
            f"the labels are {len(counts)} different numbers, such as {next(iter(counts))}: "
            "they look like measurements, but each of them becomes a class; group them into "
            "classes, or predict numbers with --config.objective=regression"
        )
    elif rows >= _IDS and len(counts) > rows / 2:
        warnings.append(
            f"{rows} rows have {len(counts)} different labels, such as "
            f"{cut_label(next(iter(counts)))!r}: check that the label column is not an id or a text"
        )
    listing = next((name for name in counts if "|" in name or is_written_list(name)), None)
    if listing is not None:
        as_bars = "" if "|" in listing else "write them as a|b, and "
        warnings.append(
            f"labels such as {cut_label(listing)!r} are one class each: if they list several "
            f"labels of a row, {as_bars}set --config.objective=multi_label"
        )
    return warnings


def is_number(label: str) -> bool:
    """Returns whether a label is a decimal number; unlike Python's float, rejects 1_000 and ١٢."""
    return bool(_NUMBER.fullmatch(label.strip()))


def without_fraction(label: str) -> str:
    """Returns an integer label without zeros after its point, and any other label unchanged."""
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", label)


def _folded(name: str) -> str | decimal.Decimal:
    """Returns a key that is equal for labels that look alike: 1, 1.0 and 01 are the number 1."""
    text = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return decimal.Decimal(text) if _NUMBER.fullmatch(text) else text
