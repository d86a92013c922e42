"""Run directories, each claimed by one process for one configuration."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sweet_jax.directories import lock_directory, mend_directories
from sweet_jax.errors import UserError
from sweet_jax.files import read_json, write_json

RUN_ROWS = "rows"  # folder of a run directory for rows passed in memory, written before the run


@contextlib.contextmanager
def claim_run_directory(
    workdir: Path,
    identity: Mapping[str, Any],
    free: tuple[str, ...],
    upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> Iterator[None]:
    """Locks a run directory for this process and this configuration.

    The lock is released when the block ends, or the process dies.

    Args:
      workdir: the run directory, created if it does not exist.
      identity: JSON values that identify the run; compared with config.json if it exists, and
        written to it.
      free: keys of `identity` that may differ.
      upgrade: function that returns the values of a config.json, which an older version may have
        written, with today's keys.

    Raises UserError if the directory cannot be written to, is in use, or contains anything other
    than a run of this configuration.

    """
    try:
        _check_identity(workdir, identity, free, upgrade)  # before a directory is created
    except OSError as error:
        raise UserError(
            f"workdir {str(workdir)!r} cannot be read ({error.strerror}): choose another"
        ) from error
    with lock_directory(workdir):
        _check_identity(workdir, identity, free, upgrade)
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
    upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Raises UserError unless a directory is absent, unclaimed, or a run with the same identity."""
    path = workdir / "config.json"
    ours = json.loads(json.dumps(identity))
    if path.exists():
        try:
            theirs = read_json(path)
            if not isinstance(theirs, dict):
                raise ValueError("not an object")
            theirs = json.loads(json.dumps(upgrade(theirs)))
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
