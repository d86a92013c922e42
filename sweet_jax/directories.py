"""Directories that are locked for one process, and written completely or not at all."""

import contextlib
import filecmp
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from sweet_jax.errors import UserError
from sweet_jax.file_lock import check_locks, lock_file

_REPLACED = ".replaced"  # suffix of the name of a directory while another one takes its place


def replace_directory(new: Path, directory: Path) -> None:
    """Moves a directory to the place of another one, which need not exist.

    If the process is killed meanwhile, one of the two is in that place, or `mend_directories` puts
    it there.
    """
    mend_directories(directory.parent)
    before = directory.with_name(f".{directory.name}{_REPLACED}")
    if directory.exists():
        directory.rename(before)
    new.rename(directory)
    shutil.rmtree(before, ignore_errors=True)


def mend_directories(folder: Path) -> None:
    """Repairs what `replace_directory` left in a folder when its process was killed.

    The old directory is put back if the new one had not yet taken its place, and removed otherwise.
    """
    for before in folder.glob(f".*{_REPLACED}"):
        directory = before.with_name(before.name[1:].removesuffix(_REPLACED))
        if directory.exists():
            shutil.rmtree(before)
        else:
            before.rename(directory)


def check_new_output(output: Path) -> None:
    """Raises UserError if the directory of --output already exists."""
    if output.exists():
        raise UserError(f"--output {str(output)!r} already exists: choose another, or remove it")


def write_error(folder: Path) -> OSError | None:
    """Returns the error that creating a file in a folder raises; None if it can be created."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


def check_writable(workdir: Path) -> None:
    """Raises UserError unless this process can create a file in the workdir."""
    if error := write_error(workdir):
        raise UserError(
            f"workdir {str(workdir)!r} cannot be written to ({error.strerror}): give a directory "
            "that the processes on all hosts can write to"
        ) from error


@contextlib.contextmanager
def lock_directory(folder: Path, name: str = "workdir") -> Iterator[None]:
    """Locks a directory for this process, until the block ends or the process dies.

    Args:
      folder: the directory, created if it does not exist.
      name: name of the directory in error messages.

    Raises UserError if it is in use, cannot be written to, or cannot be locked.

    """
    with _lock(folder, f"{name} {str(folder)!r}"):
        yield


@contextlib.contextmanager
def _lock(folder: Path, what: str) -> Iterator[None]:
    check_locks()  # before a file is left behind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115 - held by the with below
    except OSError as error:
        raise UserError(
            f"{what} cannot be written to ({error.strerror}): choose another"
        ) from error
    with lock:
        try:
            lock_file(lock)
            if not os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                raise BlockingIOError  # the former owner removed this file, and another created one
        except (BlockingIOError, FileNotFoundError) as error:
            raise UserError(
                f"{what} is in use by another run: wait for it, or choose another"
            ) from error
        except OSError as error:
            raise UserError(
                f"{what} is on a file system without locks ({error.strerror}): "
                "choose another, or mount it with flock"
            ) from error
        yield


@contextlib.contextmanager
def whole_directory(output: Path) -> Iterator[Path]:
    """Yields an empty directory, which is renamed to `output` at the end, or removed on an error.

    Raises UserError if `output` already exists, cannot be created, or is being created by another
    process.
    """
    check_new_output(output)
    around = output.with_name(f".{output.name}.part")
    aside = around / output.name
    with _lock(around, f"--output {str(output)!r}"):
        try:
            shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
            aside.mkdir()
            yield aside
            check_new_output(output)  # it may have been created meanwhile
            aside.rename(output)
        finally:
            # Before the lock file, whose removal lets another process begin.
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(around, ignore_errors=True)


def copy_files(source: Path, target: Path, ignored: Collection[str] = ()) -> None:
    """Copies the files of a directory into an empty one, except those with an ignored name.

    The copies get the permissions of new files, so that copies of read-only files can be changed.
    """
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
        elif path.name not in ignored:
            shutil.copyfile(path, place)


def copy_additions(old: Path, new: Path, ignored: Collection[str]) -> None:
    """Copies the additional files of an old directory to a new one, if their common files agree.

    Nothing is copied unless every file of the new directory is also in the old one, unchanged.

    ignored: names of files that may differ.
    """
    files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    for name in files:
        if name.name in ignored:
            continue
        if not (old / name).is_file() or not filecmp.cmp(old / name, new / name, shallow=False):
            return

    def present(folder: str, names: list[str]) -> list[str]:
        place = new / Path(folder).relative_to(old)
        return [name for name in names if (place / name).is_file()]

    shutil.copytree(old, new, symlinks=True, ignore=present, dirs_exist_ok=True)
