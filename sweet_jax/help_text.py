"""Wraps the text of --help at the width of the terminal."""

import re
import shutil
import textwrap
from collections.abc import Iterator

_WRITTEN = 100  # columns at which the texts of --help are wrapped in the source


def help_width() -> int:
    """Returns the columns of the terminal, from 40 to 100; 80 if they are unknown."""
    return max(40, min(_WRITTEN, shutil.get_terminal_size().columns))


def wrap_help(text: str) -> str:
    """Returns a text whose long lines are wrapped again, with the same indents.

    A line of two columns, such as an option and its meaning, is wrapped within the second one.
    """
    width = help_width()
    lines = []
    for line, indent in _unwrapped(text):
        if len(line) > width:
            line = textwrap.fill(
                line,
                width,
                subsequent_indent=" " * indent,
                break_long_words=False,
                break_on_hyphens=False,
                replace_whitespace=False,
            )
        lines.append(line)
    return "\n".join(lines)


def _unwrapped(text: str) -> Iterator[tuple[str, int]]:
    """Yields the lines as they were before they were wrapped, and the indent of their rest."""
    last, written, indent = "", 0, 0  # a line, the width of its last part, and its rest's indent
    for number, line in enumerate(text.split("\n")):
        words = line.split()
        full = words and written + 1 + len(words[0]) > _WRITTEN  # this word did not fit there
        if full and len(line) - len(line.lstrip()) == indent:
            last, written = f"{last} {line.lstrip()}", len(line)
            continue
        if number:
            yield last, indent
        last, written, indent = line, len(line), _second_column(line)
    yield last, indent


def _second_column(line: str) -> int:
    """Returns where the second column of a line begins, or its indent if it has only one."""
    found = re.match(r" *\S.*?  +(?=\S)", line)
    return found.end() if found else len(line) - len(line.lstrip())
