"""Locks of open files, which end with the process that holds them."""

from typing import IO

from sweet_jax.errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where a model can still be opened
    fcntl = None  # type: ignore[assignment]


def check_locks() -> None:
    """Raises UserError if the operating system has no locks of this kind."""
    if fcntl is None:
        raise UserError("this command locks files, which needs Linux or macOS: run it in WSL")


def lock_file(file: IO) -> None:
    """Locks an open file for this process until it is closed.

    Raises BlockingIOError if another process holds the lock, another OSError if the file system has
    no locks, and UserError as `check_locks` does.
    """
    check_locks()
    # The package filelock would fall back to a marker file on a file system without flock. A
    # process that is killed leaves that file behind, and other hosts cannot detect this.
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
