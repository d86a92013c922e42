"""The declaration of a config key: its default, meaning and valid values, in one place."""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable
from typing import Any

from sweet_jax.errors import UserError, check_choice, short_repr

AUTO = "auto"  # a value of epochs and of pooling
SEED_RANGE = "from 0 to 2147483647"

# (whether a value is valid, what valid values are, for messages and --help)
Condition = tuple[Callable[[Any], Any], str]
# A table of which the names are the choices is read at each check, so that entries can be added.
Choices = Iterable[str] | Callable[[], Iterable[str]]

NOT_EMPTY: Condition = (len, "at least one number")
DISTINCT: Condition = (lambda v: len(set(v)) == len(v), "distinct")
AT_LEAST_1: Condition = (lambda v: v >= 1, "1 or more")
NOT_NEGATIVE: Condition = (lambda v: 0 <= v < math.inf, "0 or more")
POSITIVE: Condition = (lambda v: 0 < v < math.inf, "positive and finite")
FRACTION: Condition = (lambda v: 0 <= v <= 1, "from 0 to 1")
ALL_FRACTIONS: Condition = (lambda v: all(0 <= x <= 1 for x in v), "from 0 to 1")
FROM_0_BELOW_1: Condition = (lambda v: 0 <= v < 1, "at least 0 and less than 1")
BETWEEN_0_AND_1: Condition = (lambda v: 0 < v < 1, "between 0 and 1, both excluded")

_TYPES = {
    int: "a whole number (int)",
    float: "a number (float)",
    bool: "True or False",
    str: "text (str)",
}


@dataclasses.dataclass(frozen=True)
class KeyMetadata:
    """Holds what is known of a config key beside its name, type and default; see `key`."""

    meaning: str
    conditions: tuple[Condition, ...]
    choices: Choices
    allowed: str
    example: str
    type_condition: Condition | None
    convert: Callable[[Any], Any] | None
    allows_reference: bool
    several: bool

    def names(self, default: Any) -> list[str]:
        """Returns the choices, including the default; empty if the key has none."""
        choices = list(self.choices() if callable(self.choices) else self.choices)
        return choices if not choices or default in choices else [default, *choices]


def key(
    default: Any,
    meaning: str,
    *conditions: Condition,
    choices: Choices = (),
    allowed: str = "",
    example: str = "",
    type_condition: Condition | None = None,
    convert: Callable[[Any], Any] | None = None,
    allows_reference: bool = False,
    several: bool = False,
) -> Any:
    """Declares a config key, as a field of a dataclass.

    Args:
      default: default of the key. Its type is that of the key's values.
      meaning: meaning of the key, for --help and the documentation.
      conditions: conditions on the value.
      choices: names that the value can be, in addition to the default.
      allowed: allowed values in words; the last of the conditions, or the choices, if empty.
      example: example of a value, for a key that takes several numbers.
      type_condition: condition that replaces the check of the value's type.
      convert: function that converts a value of a file or a command line, if the key needs more
        than `convert_value` does.
      allows_reference: whether "module:OBJECT" is allowed in addition to the choices; see
        `registry`.
      several: whether a value may be several of the choices, separated by commas.

    Returns:
      the field.

    """
    metadata = KeyMetadata(
        *(meaning, conditions, choices, allowed, example, type_condition, convert),
        *(allows_reference, several),
    )
    return dataclasses.field(default=default, metadata={"key": metadata})


def key_metadata(field: dataclasses.Field) -> KeyMetadata:
    """Returns what `key` was given."""
    return field.metadata["key"]


def convert_value(field: dataclasses.Field, value: Any) -> Any:
    """Converts a value of a file or a command line to the type of a key, where that is possible.

    For a key that takes several numbers, a list, a single number or the text of a command line
    ("1,2,4") becomes a tuple; for a key that takes text, a list of names becomes comma-separated
    text; for a float, an int becomes one.
    """
    convert = key_metadata(field).convert
    if convert:
        return convert(value)
    if isinstance(field.default, tuple):
        kind = _element_type(field)
        if isinstance(value, str):
            value = _parse_numbers(value, kind)
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        return tuple(float(v) if type(v) is int and kind is float else v for v in values)
    if isinstance(field.default, str) and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if isinstance(field.default, float) and type(value) is int:
        return float(value)
    return value


def check_type(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError unless a value has the type of its key."""
    name, metadata = field.name, key_metadata(field)
    if metadata.type_condition:
        holds, words = metadata.type_condition
        if not holds(value):
            raise UserError(f"{name} must be {words}; got {short_repr(value)}")
    elif isinstance(field.default, tuple):
        kind = _element_type(field)
        if not isinstance(value, tuple) or any(type(v) is not kind for v in value):
            noun = "whole numbers" if kind is int else "numbers"
            raise UserError(
                f"{name} must be {noun} separated by commas, such as "
                f"--config.{name}={metadata.example}; got {short_repr(value)}"
            )
    elif type(value) is not type(field.default):
        raise UserError(f"{name} must be {_TYPES[type(field.default)]}; got {short_repr(value)}")


def check_name(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError unless a value is one of the choices of its key, if it has choices.

    For a key that takes several of them, the value is a comma-separated list of at least one.
    """
    metadata = key_metadata(field)
    if not metadata.names(field.default):
        return
    for name in (metadata.several and split_names(value)) or (value,):
        if metadata.allows_reference and ":" in name:
            continue  # a reference is imported where it is used
        check_choice(field.name, name, metadata.names(field.default))


def check_conditions(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError for a value out of the range of its key."""
    for holds, words in key_metadata(field).conditions:
        if not holds(value):
            raise UserError(f"{field.name} must be {words}; got {short_repr(value)}")


def split_names(text: str) -> tuple[str, ...]:
    """Splits a comma-separated list of names, and strips the blanks around them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parse_numbers(text: str, kind: type) -> Any:
    """Returns the numbers of a comma-separated list, or the text itself if it is none."""
    try:
        return [kind(part) for part in split_names(text)] or text
    except ValueError:
        return text


def _element_type(field: dataclasses.Field) -> type:
    return typing.get_args(field.type)[0]
