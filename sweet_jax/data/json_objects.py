"""Objects of a JSON lines file, one in a line or pretty-printed over several lines."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sweet_jax.config import UserError, check_choice
from sweet_jax.files import one_line

_MOST_LINES = 1000  # of an object
_CHECKED = 1000  # objects that are searched for a column before it counts as unknown


class JsonObject(NamedTuple):
    """Holds one object of a file, or its error."""

    values: dict[str, Any] | None  # None for an error
    error: str | None
    line: int  # number of its first line, from 1
    position: int  # bytes of the file read so far


def read_objects(
    lines: Iterable[str], name: str, position: Callable[[], int]
) -> Iterator[JsonObject]:
    """Yields the objects of a file in order. Blank lines are skipped.

    An object that is incomplete at the end of its line continues in the next lines, up to a line
    that begins with a brace. If these lines are no object together, each of them is an error.

    Args:
      lines: of the file.
      name: of the file, for messages.
      position: returns the number of bytes read so far.

    Raises UserError if the file is a JSON array.

    """
    begun: list[str] = []  # lines of an incomplete object
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
    """Yields the same objects, after checking that each name is a key of one of the first ones.

    Raises UserError for a name that is none.
    """
    ahead = list(itertools.islice(objects, _CHECKED))
    keys = dict.fromkeys(key for found in ahead for key in found.values or ())
    if any(found.values is not None for found in ahead):
        for name in names:
            check_choice("column", name, keys)
    yield from itertools.chain(ahead, objects)


class LabelTexts:
    """Converts labels to text; all must be of the type of the first.

    Integers and floats are one type: both are written as the first number is, so that 1 and 1.0 are
    one class.
    """

    def __init__(self) -> None:
        self._first: Any = None

    def __call__(self, value: Any) -> tuple[str | None, str | None]:
        """Returns (text or None if missing, None), or (None, error)."""
        if value is None or value != value:  # NaN
            return None, None
        if not isinstance(value, str | bool | int | float):
            return None, f"is not a single value but {value!a:.40}"
        first = self._first = value if self._first is None else self._first
        if type(value) is not type(first):
            if {type(value), type(first)} != {int, float}:
                return None, f"is {value!a:.40}, of another type than the first, {first!a:.40}"
            if isinstance(first, float) or value == int(value):
                value = type(first)(value)
        return str(value), None


def _parse(text: str) -> tuple[dict[str, Any] | None, str | None, bool]:
    """Returns (object, None, False), or (None, error, whether the text is merely incomplete)."""
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
    """Yields each line as an object or an error; `last` is the number of the last line."""
    for number, line in enumerate(lines, start=last + 1 - len(lines)):
        if line.strip():
            values, error, _ = _parse(line)
            yield JsonObject(values, error, number, position)
