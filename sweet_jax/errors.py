"""User errors, which commands report in one line with exit status 2."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Raised for invalid user input; one line says what is wrong, the value, and how to fix it."""


class AbsentFileError(UserError):
    """Raised for a file of rows that does not exist."""


class UnknownNameError(UserError):
    """Raised for a name that cannot be found, as in a table that other packages extend.

    Attributes:
      reason: why it cannot be found, worded to follow the name and a comma.

    """

    def __init__(self, message: str, reason: str = "which is unknown") -> None:
        super().__init__(message)
        self.reason = reason


def one_line(error: BaseException) -> str:
    """Returns the message of an error on one line, with at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def short_repr(value: object, most: int = 200) -> str:
    """Returns the repr of a value on one line, cut to some number of characters.

    That of a text keeps its closing quote.
    """
    text = repr(value)
    if "\n" in text:  # as that of a table or an array has; a text's own blanks stay
        text = " ".join(text.split())
    end = text[-1] if isinstance(value, str) else ""
    return text if len(text) <= most else f"{text[: most - 1 - len(end)]}…{end}"


def missing_package(error: ImportError) -> str:
    """Returns the name of the package that is not installed.

    Raises the error itself if it names no package: importing one failed or was interrupted.
    """
    if error.name is None:
        raise error
    return error.name


def join_numbers(numbers: Iterable[int]) -> str:
    """Returns numbers separated by commas, as in a config key: 1,4,6,12."""
    return ",".join(map(str, numbers))


def list_names(names: Sequence[str]) -> str:
    """Returns the first ten names for display, long ones cut, and the number of the others."""
    listed = ", ".join(short_repr(name, 60) for name in names[:10])
    return listed + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def check_choice(what: str, value: str, allowed: Iterable[str]) -> None:
    """Raises UnknownNameError, with the nearest allowed value, unless value is an allowed one."""
    allowed = list(allowed)
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(map(repr, allowed))}"
    )
    raise UnknownNameError(f"unknown {what} {value!r}: {hint}")
