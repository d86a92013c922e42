"""Standard output: a reader that leaves, as `| head` does, and characters that it cannot encode."""

import io
import logging
import os
import sys


def print_text(text: str) -> None:
    """Prints a text, also where nobody reads standard output any more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """Discards what is written to standard output from now on, and what waits in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush_output() -> None:
    """Writes what waits in the buffer of standard output, or discards it if that fails.

    Python would report the failure at its end, with an exit status of its own.
    """
    try:
        print(end="", flush=True)
    except OSError:
        discard_output()


def escape_characters() -> None:
    r"""Makes standard output write characters that it cannot encode as \xXX or \uXXXX."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class LogHandler(logging.StreamHandler):
    """Writes log records to standard output; that it takes no more does not stop the program."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Discards what follows if nobody reads it; says nothing of another error of the disk."""
        error = sys.exception()
        if isinstance(error, BrokenPipeError):
            discard_output()
        elif not isinstance(error, OSError):
            super().handleError(record)
