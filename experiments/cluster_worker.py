"""Runs a cell in a worker of a Ray cluster, for experiments.cluster."""

import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.cells import Cell, is_finished, run_cell
from sweet_jax.directories import lock_directory
from sweet_jax.distributed import PreemptedError
from sweet_jax.errors import UserError

_LEASE = 120.0  # seconds for which network storage may keep the lock of a node that is gone


def run_task(cell: Cell, kind: str, folder: Path, workdir: Path) -> Iterator[tuple[str, Any]]:
    """Runs a cell in a worker; yields ("started", place) and ("ended", manifest entry).

    Args:
      cell: the cell.
      kind: jax backend that it must run on, "cpu", "gpu" or "tpu".
      folder: folder of the driver.
      workdir: --workdir of the driver.

    """
    signal.signal(signal.SIGTERM, _raise_stopped)
    # Ray cancels a task with SIGINT; after SIGTERM, training saves its state.
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    yield "started", f"{socket.gethostname()}, process {os.getpid()}"
    try:
        _check_node(kind, folder, workdir)
        # Even looking at a cell's outputs needs the lock, since a task of a driver that was killed
        # may still be running.
        with _lock_patiently(workdir / ".cells" / cell.name):
            if is_finished(workdir, cell.name):
                shutil.rmtree(workdir / cell.name, ignore_errors=True)
                state = {"state": "done"}
            else:
                state = run_cell(cell, workdir)
    except UserError as error:
        state = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
    yield "ended", state


def _check_node(kind: str, folder: Path, workdir: Path) -> None:
    """Changes to the driver's folder. Raises UserError if this node cannot run the cell."""
    import jax

    host = socket.gethostname()
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"{host} has no folder {str(folder)!r}, in which the command runs: put it on storage "
            "that all nodes share"
        ) from error
    if not (workdir / "manifest.json").exists():
        raise UserError(
            f"{host} has no file {str(workdir / 'manifest.json')!r}: set --workdir to a folder on "
            "storage that all nodes share"
        )
    backend = jax.default_backend()
    if backend != kind:
        raise UserError(
            f"the cell has a {kind.upper()} of {host}, but jax uses the {backend} there: install "
            "jax for it, and check JAX_PLATFORMS"
        )


@contextlib.contextmanager
def _lock_patiently(folder: Path) -> Iterator[None]:
    """Locks a directory like `lock_directory`, but waits for an owner that may be gone."""
    deadline = time.monotonic() + _LEASE
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock_directory(folder))
                break
            except UserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield


def _raise_stopped(*_: Any) -> None:
    raise PreemptedError("stopped by SIGTERM")
