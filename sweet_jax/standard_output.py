"""Standard output whose reader stops early, like `| head`, or that lacks some characters."""

import io
import logging
import os
import sys


def print_text(text: str) -> None:
    """Prints a text; does nothing if the reader of standard output has closed it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """Discards the buffer of standard output, and everything written to it from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush_output() -> None:
    """Flushes the buffer of standard output, or discards it if that fails.

    Otherwise Python would report the failure at exit, with an exit status of its own.
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
    """Writes log records to standard output, whose failures do not stop the program."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Discards further output if nobody reads it; ignores other errors of the file."""
        error = sys.exception()
        if isinstance(error, BrokenPipeError):
            discard_output()
        elif not isinstance(error, OSError):
            super().handleError(record)
