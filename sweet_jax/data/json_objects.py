"""Objects of a JSON lines file, each in a line of its own or over several ones."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sweet_jax.config import UserError, check_choice
from sweet_jax.files import one_line

_MOST_LINES = 1000  # of an object
_LOOKED_AT = 1000  # objects: a column that none of the first ones has is unknown


class JsonObject(NamedTuple):
    """One object of a file, or what is wrong with it."""

    values: dict[str, Any] | None  # None where there is an error
    error: str | None
    line: int  # in which it begins, from 1
    position: int  # bytes of the file read so far


def read_objects(
    lines: Iterable[str], name: str, position: Callable[[], int]
) -> Iterator[JsonObject]:
    """Yields the objects of a file in order; blank lines are none.

    An object that its line does not complete continues in the next ones, but not in one that begins
    with a brace. Where they make no object together, each of the lines is an error.

    Args:
      lines: of the file.
      name: of the file, for the error.
      position: returns how many bytes were read.

    Raises UserError where the file is one JSON array.

    """
    begun: list[str] = []  # lines of an object that is not complete
    first, number = True, 0
    for number, line in enumerate(lines, start=1):
        if begun and (line.startswith("{") or len(begun) >= _MOST_LINES):
            yield from _single_lines(begun, number - 1, position())
            begun = []
        if begun:
            begun.append(line)
            if not line.rstrip().endswith("}"):
                continue
            values, error, cut = _parse("".join(begun))
            if cut:
                continue
            if error is None:
                yield JsonObject(values, None, number + 1 - len(begun), position())
            else:
                yield from _single_lines(begun, number, position())
            begun = []
        elif line.strip():
            if first and line.lstrip().startswith("["):
                raise UserError(f"{name!r} is a JSON array: write one object a line instead")
            first = False
            values, error, cut = _parse(line)
            if cut and line.startswith("{"):
                begun = [line]
            else:
                yield JsonObject(values, error, number, position())
    yield from _single_lines(begun, number, position())


def check_keys(objects: Iterator[JsonObject], names: Sequence[str]) -> Iterator[JsonObject]:
    """Yields the same objects; raises UserError before the first for a name that none of them has.

    Of a large file, that none of its first objects has.
    """
    ahead = list(itertools.islice(objects, _LOOKED_AT))
    keys = dict.fromkeys(key for found in ahead for key in found.values or ())
    if any(found.values is not None for found in ahead):
        for name in names:
            check_choice("column", name, keys)
    yield from itertools.chain(ahead, objects)


class LabelTexts:
    """Turns labels of JSON into text, and refuses one that is of another kind than the first.

    A whole number among numbers with a decimal point is written as these are, and the other way
    round: 1 and 1.0 are one class.
    """

    def __init__(self) -> None:
        self._first: Any = None

    def __call__(self, value: Any) -> tuple[str | None, str | None]:
        """Returns (text, None), None as the text of a missing label, or (None, what is wrong)."""
        if value is None or value != value:  # NaN
            return None, None
        if not isinstance(value, str | bool | int | float):
            return None, f"is not a single value but {value!a:.40}"
        first = self._first = value if self._first is None else self._first
        if type(value) is not type(first):
            if {type(value), type(first)} != {int, float}:
                return None, f"is of another kind than the first one, {first!a:.40}: {value!a:.40}"
            if isinstance(first, float) or value == int(value):
                value = type(first)(value)
        return str(value), None


def _parse(text: str) -> tuple[dict[str, Any] | None, str | None, bool]:
    """Returns (object, None, False), or (None, what is wrong, whether the text merely ends)."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip())
        return None, f"not JSON: {error.msg} at character {error.pos + 1}", cut
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {one_line(error)}", False
    if not isinstance(found, dict):
        return None, f"not an object but {text.strip()!a:.40}", False
    return found, None, False


def _single_lines(lines: list[str], last: int, position: int) -> Iterator[JsonObject]:
    """Yields what each line is by itself; `last` is the number of the last one."""
    for number, line in enumerate(lines, start=last + 1 - len(lines)):
        if line.strip():
            values, error, _ = _parse(line)
            yield JsonObject(values, error, number, position)
