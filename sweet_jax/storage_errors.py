"""Errors of a disk that is full, read-only or broken: what they are called, and what they print."""

import atexit
import contextlib
import errno
import io
import os
import re
import sys
import time
from collections.abc import Collection, Iterator

RESUMES = "the same command resumes from the last checkpoint"  # of a training

# What writing to a disk that is full, read-only or broken fails with.
_STORAGE_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)
)
_ACCESS_ERRORS = frozenset((errno.EACCES, errno.EPERM))
# Of Rust, "(os error 28)"; of tensorstore, "[os_error_code='28']", after the file in quotes.
_NATIVE_ERROR = re.compile(r"\bos[ _]error(?:_code)?[ :='\"]+(\d+)", re.IGNORECASE)
_NATIVE_FILE = re.compile(r'file "([^"]+)"')

_STRAGGLERS = 0.5  # seconds in which threads that failed too have printed so


def storage_failure(error: BaseException) -> str | None:
    """Returns a sentence on an error of a disk that takes no more writes; None for other errors."""
    what = _find_cause(error, _STORAGE_ERRORS)
    if what is None:
        return None
    return f"files cannot be written ({what}): free space on the disk, or make it writable"


def access_failure(error: BaseException) -> str | None:
    """Returns a sentence on a file that may not be read or written; None for other errors."""
    what = _find_cause(error, _ACCESS_ERRORS)
    if what is None:
        return None
    return f"a file cannot be read or written ({what}): change its permissions, or name another"


def _find_cause(error: BaseException, numbers: Collection[int]) -> str | None:
    """Returns the operating system's words for one of some errors, with the file's name, or None.

    Libraries in other languages raise errors of their own, whose text has the number of the
    operating system's.
    """
    for cause in causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None and (found := _NATIVE_ERROR.search(str(cause))):
            number = int(found[1])
        if number is not None and number in numbers:
            native = _NATIVE_FILE.search(str(cause))
            name = getattr(cause, "filename", None) or (native and native[1])
            return os.strerror(number) + (f", {str(name)!r}" if name else "")
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, and those that it was raised from or in the handling of."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


@contextlib.contextmanager
def discard_after_storage_failure() -> Iterator[None]:
    """Discards what libraries print about an error of the disk that the block raises.

    Of a checkpoint that cannot be written, tensorstore's threads print a traceback for each array.
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
    """Discards what is written to standard error once the interpreter has begun to end.

    After an error of the disk, coroutines that nobody awaits are each reported there.
    """
    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))
