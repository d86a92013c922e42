"""Errors of a disk that is full, read-only or broken: their detection and their messages."""

import atexit
import contextlib
import errno
import io
import os
import re
import sys
import time
from collections.abc import Collection, Iterator

# For a training run, which may have stopped before its first checkpoint.
RESUMES = "the same command resumes from the last checkpoint, if there is one"

# Errors of writing to a disk that is full, read-only or broken.
_STORAGE_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)
)
_ACCESS_ERRORS = frozenset((errno.EACCES, errno.EPERM))
# Rust writes "(os error 28)"; tensorstore "[os_error_code='28']", after the file in quotes.
_NATIVE_ERROR = re.compile(r"\bos[ _]error(?:_code)?[ :='\"]+(\d+)", re.IGNORECASE)
_NATIVE_FILE = re.compile(r'file "([^"]+)"')

_STRAGGLERS = 0.5  # seconds to wait for the messages of other threads that failed


def storage_failure(error: BaseException) -> str | None:
    """Returns a message for an error of a disk that cannot be written; None for other errors."""
    cause = _find_cause(error, _STORAGE_ERRORS)
    if cause is None:
        return None
    return f"files cannot be written ({cause}): free space on the disk, or make it writable"


def access_failure(error: BaseException) -> str | None:
    """Returns a message for a file without permission to access; None for other errors."""
    cause = _find_cause(error, _ACCESS_ERRORS)
    if cause is None:
        return None
    return f"a file cannot be read or written ({cause}): change its permissions, or choose another"


def _find_cause(error: BaseException, numbers: Collection[int]) -> str | None:
    """Returns the system's message, with the file's name, if an error is one of `numbers`, or None.

    Libraries in other languages raise errors of their own, whose text contains the number of the
    operating system's error.
    """
    for cause in causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None and (match := _NATIVE_ERROR.search(str(cause))):
            number = int(match[1])
        if number is not None and number in numbers:
            native = _NATIVE_FILE.search(str(cause))
            name = getattr(cause, "filename", None) or (native and native[1])
            return os.strerror(number) + (f", {str(name)!r}" if name else "")
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, and the errors from which or during whose handling it was raised."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


@contextlib.contextmanager
def discard_after_storage_failure() -> Iterator[None]:
    """Discards what libraries print about a disk error that the block raises.

    If a checkpoint cannot be written, tensorstore's threads print a traceback for each array.
    """
    outside, printed = sys.stderr, io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            yield
        except Exception as error:
            if storage_failure(error):
                time.sleep(_STRAGGLERS)
                printed.truncate(0)
            raise
        finally:
            outside.write(printed.getvalue())


def discard_errors_at_exit() -> None:
    """Discards what is written to standard error while the interpreter exits.

    After a disk error, every coroutine that was not awaited would be reported there.
    """
    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))


@contextlib.contextmanager
def discard_native_errors() -> Iterator[None]:
    """Discards what native code writes to standard error, such as the message of a Rust panic.

    The panic also raises an exception with the same message.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
