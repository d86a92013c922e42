"""Atomic writes of files, and JSON."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


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
            with aside.open("r+b") as file:  # Windows flushes no file that is open for reading
                os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8 with Unix line endings.

    What UTF-8 cannot hold, such as a byte of a file's name in another encoding, becomes "?".
    """
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def write_arrays(path: Path, arrays: Mapping[str, Any], *, compressed: bool = False) -> None:
    """Writes arrays by their names as one .npz file, atomically, under a path of any suffix."""
    save = np.savez_compressed if compressed else np.savez
    with atomic_write(path) as aside, aside.open("wb") as file:  # to a name it adds ".npz"
        save(file, **arrays)


def read_json(path: Path) -> Any:
    """Reads a JSON file; a byte order mark, which editors on Windows may write, is skipped.

    Raises OSError, or ValueError if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
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
