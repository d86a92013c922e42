"""Tables from JSON files: an object per line or over several, an array, an object of columns."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from sweet_jax.data.tables import Columns, Record, Table, find_column, make_record
from sweet_jax.data.text_files import TextFile
from sweet_jax.errors import UserError, one_line

_MOST_LINES = 1000  # maximum lines of an object, except the first, which may be the whole file
_MOST_TRIES = 1000  # maximum attempts to parse an array element, one wherever an object may end
_LONGEST = 1 << 22  # maximum number of characters in an element
_LISTS = ("data", "rows", "records", "examples")  # keys that may hold a list of objects
_OPENING, _BETWEEN = re.compile(r"\s*\[\s*"), re.compile(r"[\s,]*")  # before an array's elements
_CHECKED = 1000  # number of objects that are searched for a column before it counts as unknown


class JsonObject(NamedTuple):
    """Holds one object of a file, or its error."""

    values: dict[str, Any] | None  # None if there is an error
    error: str | None
    line: int  # number of the object's first line, from 1
    position: int  # number of bytes of the file read so far


def json_table(file: TextFile) -> Table:
    """Returns the table of a JSON file in any of these layouts; its columns are the objects' keys.

    Raises UserError for a damaged array, since there is no way to find its next element.
    """
    objects = _read_any(file)
    ahead = list(itertools.islice(objects, _CHECKED))
    keys = tuple(dict.fromkeys(key for obj in ahead for key in obj.values or ()))

    def records(columns: Columns) -> Iterator[Record]:
        names = list(columns.names)
        if any(obj.values is not None for obj in ahead):
            names = [keys[find_column(name, keys)] for name in names]
        rows = enumerate(itertools.chain(ahead, objects), start=1)
        for row, (values, error, line, position) in rows:
            if values is None:
                yield Record((), error, position, row, line)
            else:
                fields = tuple(values.get(name) for name in names)
                yield make_record(fields, columns, position, row, line)

    return Table(keys, records)


def _read_any(file: TextFile) -> Iterator[JsonObject]:
    """Yields the objects of a file in any layout."""
    lines = iter(file.lines)
    begun: list[str] = []  # lines up to the first one that is not blank
    for line in lines:
        begun.append(line)
        if line.strip():
            break
    lines = itertools.chain(begun, lines)
    if begun and begun[-1].lstrip().startswith("["):
        yield from read_array(lines, file)
        return
    objects = read_objects(lines, file.position)
    first, second = next(objects, None), next(objects, None)
    if first is not None and first.values is not None and second is None:
        for values in _rows_of(first.values):
            yield first._replace(values=values)
    else:
        yield from (obj for obj in (first, second) if obj is not None)
        yield from objects


def _rows_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a file with one object: a list of rows, columns, or a single row."""
    for key in _LISTS:
        rows = values.get(key)
        if isinstance(rows, list) and rows and all(isinstance(v, dict) for v in rows):
            return rows
    # By default, pandas writes columns as {"text": {"0": …}}, and their key order may differ.
    first = next(iter(values.values()), None)
    keys = first.keys() if isinstance(first, dict) else ()
    if keys and all(isinstance(v, dict) and v.keys() == keys for v in values.values()):
        return [{name: column[key] for name, column in values.items()} for key in keys]
    columns = list(values.values())
    if columns and all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        return [dict(zip(values, row, strict=True)) for row in zip(*columns, strict=True)]
    return [values]


def read_array(lines: Iterator[str], file: TextFile) -> Iterator[JsonObject]:
    """Yields the elements of a JSON array; an element that is not an object is an error.

    Raises UserError if the array is damaged.
    """
    decoder, opened, tries = json.JSONDecoder(), False, 0
    text, start, number = "", 0, 1  # text[start:], which begins in line `number`, is parsed next
    while True:
        if match := (_BETWEEN if opened else _OPENING).match(text, start):
            opened, number = True, number + text.count("\n", start, match.end())
            start = match.end()
        if opened and text.startswith("]", start):
            text, start, opened = text[start + 1 :], 0, False
            while not text.strip():  # another array may follow this one
                if (line := next(lines, None)) is None:
                    return
                text += line
            continue
        try:
            values, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            text, start, tries = text[start:], 0, tries + 1
            more = _lines_to_a_brace(lines) if _is_cut(text, error) and tries <= _MOST_TRIES else ""
            if not more or len(text) > _LONGEST:
                raise UserError(
                    f"{str(file.path)!r} is a JSON array that is damaged in line {number}: "
                    f"{one_line(error)}; fix the file"
                ) from error
            text += more
            continue
        wrong = None if isinstance(values, dict) else f"not an object but {values!a:.40}"
        yield JsonObject(None if wrong else values, wrong, number, file.position())
        number, start, tries = number + text.count("\n", start, end), end, 0


def _is_cut(text: str, error: Exception) -> bool:
    """Returns whether JSON that cannot be parsed is only incomplete."""
    return isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip())


def _lines_to_a_brace(lines: Iterator[str]) -> str:
    """Returns the next lines, up to one that may end an object; "" at the end of the file."""
    taken: list[str] = []
    size = 0
    for line in lines:
        taken.append(line)
        size += len(line)
        if "}" in line or size > _LONGEST:
            break
    return "".join(taken)


def read_objects(lines: Iterable[str], position: Callable[[], int]) -> Iterator[JsonObject]:
    """Yields the objects of JSON lines in order. Blank lines are skipped.

    An object that is incomplete at the end of its line continues on the next lines, up to a line
    that begins with a brace. If these lines together are not an object, each one is read by itself.

    Args:
      lines: lines of the file.
      position: function that returns the number of bytes read so far.

    """
    begun: list[str] = []  # lines of an incomplete object
    first, number = True, 0
    for number, line in enumerate(lines, start=1):
        inside = bool(begun) and begun[0].rstrip().endswith("[")  # in a list of objects
        if begun and (
            (line.startswith("{") and not inside) or (not first and len(begun) >= _MOST_LINES)
        ):
            yield from _single_lines(begun, number - 1, position())
            begun, first = [], False
        if begun:
            begun.append(line)
            # A long object is not parsed again at the end of each object inside it.
            if not line.rstrip().endswith("}") or (
                len(begun) > _MOST_LINES and not line.startswith("}")
            ):
                continue
            values, error, cut = _parse("".join(begun))
            if cut:
                continue
            if error is None:
                yield JsonObject(values, None, number + 1 - len(begun), position())
            else:
                yield from _single_lines(begun, number, position())
            begun, first = [], False
        elif line.strip():
            values, error, cut = _parse(line)
            if cut and line.startswith("{"):
                begun = [line]
            else:
                first = False
                yield JsonObject(values, error, number, position())
    yield from _single_lines(begun, number, position())


def _parse(text: str) -> tuple[dict[str, Any] | None, str | None, bool]:
    """Returns (object, None, False), or (None, error, whether the text is only incomplete)."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip())
        return None, f"not JSON: {error.msg} at character {error.pos + 1}", cut
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {one_line(error)}", False
    if not isinstance(value, dict):
        return None, f"not an object but {text.strip()!a:.40}", False
    return value, None, False


def _single_lines(lines: list[str], last: int, position: int) -> Iterator[JsonObject]:
    """Yields each line as an object or an error; `last` is the number of the last line."""
    for number, line in enumerate(lines, start=last + 1 - len(lines)):
        if line.strip():
            values, error, _ = _parse(line)
            yield JsonObject(values, error, number, position)
