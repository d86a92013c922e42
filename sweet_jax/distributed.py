"""Commands that run in several processes, on one or more hosts, each with devices of its own.

Every process runs the same command, reads the same files and takes part in every step; only the
primary process, number 0, writes. Arrays span the devices of all processes (training/sharding.py).
This module connects the processes, lets them agree on values, and stops them together.
"""

import contextlib
import importlib.util
import itertools
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sweet_jax.directories import check_writable
from sweet_jax.errors import UserError
from sweet_jax.files import write_text
from sweet_jax.storage_errors import RESUMES, access_failure, storage_failure

_HEARTBEAT_SECONDS = 30  # a process without a heartbeat for this long counts as lost
_SHUTDOWN_SECONDS = 300  # time for the other processes to end too
_REPORT_SECONDS = 2  # time for the other processes to report an error that they share
_MESSAGE_BYTES = 2000
_sync_points = itertools.count(1)  # numbers the calls of `preemption_requested`


class SharedUserError(UserError):
    """Raised in all processes for a UserError that at least one of them raised."""


class PreemptedError(Exception):
    """Raised after SIGTERM, once the state is saved."""


def initialize(address: str | None, count: int | None, number: int | None) -> None:
    """Connects the processes of a command, before any device is used.

    On Cloud TPU and in a Slurm step of several tasks they find each other. Elsewhere the arguments
    say how to connect; without them this process is the only one.

    Args:
      address: host:port at which the primary process listens.
      count: number of processes.
      number: number of this process, from 0.

    Raises UserError if the arguments are incomplete or out of range, or the processes do not
    connect.

    """
    given = (address, count, number)
    if count == 1 or not (any(g is not None for g in given) or _in_cluster()):
        return
    if any(g is not None for g in given) and None in given:
        raise UserError(
            "--coordinator_address, --num_processes and --process_id must be set together: set all "
            "three, or none of them on Cloud TPU and in a Slurm step"
        )
    if count is not None and number is not None and not 0 <= number < count:
        raise UserError(f"--process_id must be from 0 to --num_processes - 1; got {number}")
    if address is not None and not address.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator_address must be HOST:PORT; got {address!r}")
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError, OSError) as error:
        if address is None and "coordinator_address should be defined" in str(error):
            return  # libtpu is installed, but this host has no TPU
        where = address or "the address that the cluster specifies"
        raise UserError(
            f"the processes could not connect at {where} ({_first_line(error)}): start all of "
            "them, on hosts that can reach that address"
        ) from error


def _in_cluster() -> bool:
    """Returns whether this process runs in a cluster that JAX detects by itself."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return True
    on_tpu = os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"
    return on_tpu and importlib.util.find_spec("libtpu") is not None


def is_primary() -> bool:
    """Returns whether this is the primary process, the one that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def raise_on_all() -> Iterator[None]:
    """Waits for all processes at the end of its block; raises a UserError of any in all of them.

    With several processes, the error that is raised is a SharedUserError.
    """
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    if jax.process_count() > 1:
        texts = all_gather(str(error or "").encode()[:_MESSAGE_BYTES])
        for number, text in enumerate(texts):
            if text and error is None:
                error = UserError(f"process {number}: {text.decode(errors='replace')}")
        if error is not None:
            raise SharedUserError(str(error)) from error
    if error is not None:
        raise error


@contextlib.contextmanager
def claim_on_primary(
    workdir: Path,
    check_inputs: Callable[[], None],
    claim: Callable[[], AbstractContextManager[None]],
) -> Iterator[None]:
    """Claims a run directory in the primary process, and holds it for all processes.

    Args:
      workdir: the run directory.
      check_inputs: function that compares the inputs of several processes; see
        `input_digest.check_inputs`.
      claim: function that returns the context manager holding the directory.

    Raises UserError in all processes if the claim fails, or if the inputs or the directory of one
    of them differ from the primary process's.

    """
    with contextlib.ExitStack() as stack:
        if jax.process_count() > 1:
            with raise_on_all():
                check_inputs()
        token = workdir / ".shared"
        with raise_on_all():
            if is_primary():
                stack.enter_context(claim())
                if jax.process_count() > 1:
                    write_text(token, secrets.token_hex(16))
        if jax.process_count() > 1:
            with raise_on_all():
                _check_shared(workdir, token)
                check_writable(workdir)
        yield


def _check_shared(workdir: Path, token: Path) -> None:
    """Raises UserError unless all processes read the same token in their workdir."""
    for _ in range(10):  # a shared directory may be seen some seconds late
        found = all_gather(_read_token(token))
        if all(each == found[0] for each in found):
            return
        time.sleep(1)
    if found[jax.process_index()] != found[0]:
        raise UserError(
            f"workdir {str(workdir)!r} is not the directory of the primary process, or cannot be "
            "read: choose a directory that all hosts share"
        )


def _read_token(token: Path) -> bytes:
    """Returns the contents of the file, or b"" if it cannot be read.

    It raises no error because the processes must take part in the same number of exchanges.
    """
    try:
        return token.read_bytes()
    except OSError:
        return b""


def preemption_requested() -> bool:
    """Returns whether all processes must stop now because one of them received SIGTERM.

    All processes must call this equally often. JAX makes them agree on a sync point that none has
    passed yet, once in the life of a process; therefore calls are counted, not training steps.
    """
    return multihost_utils.reached_preemption_sync_point(next(_sync_points))


def broadcast_from_primary(tree: Any) -> Any:
    """Returns the numbers and arrays of the primary process in all processes.

    Two hosts may round the same computation differently, or see a file at different times.

    Args:
      tree: pytree of arrays and numbers, with equal shapes in all processes.

    Returns:
      The tree, unchanged if there is one process; otherwise its leaves are NumPy arrays with at
      most 32 bits per number.

    """
    if jax.process_count() == 1:
        return tree
    # Python's integers have no width, and booleans are broadcast as numbers.
    tree = jax.tree.map(lambda x: np.int32(x) if isinstance(x, int) else x, tree)
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def barrier(name: str) -> None:
    """Waits until every process has called this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_gather(value: bytes) -> list[bytes]:
    """Returns the bytes of every process, at most _MESSAGE_BYTES each, without trailing zeros."""
    if jax.process_count() == 1:
        return [value]
    padded = np.zeros(_MESSAGE_BYTES, np.uint8)
    padded[: len(value)] = np.frombuffer(value, np.uint8)
    return [row.tobytes().rstrip(b"\0") for row in multihost_utils.process_allgather(padded)]


@contextlib.contextmanager
def abort_together() -> Iterator[None]:
    """Ends this process at once if its block fails, so that the others end too.

    The exit status is 2 for wrong input, as in a single process, and 1 for any other failure.

    By default a failing JAX process waits at its exit for the others, which wait for it in the next
    step. If it exits at once, their next step fails, or JAX's heartbeat aborts them and reports
    that another task died. A SharedUserError or PreemptedError is re-raised instead: all processes
    raise it, and end normally.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1 or isinstance(error, SharedUserError | PreemptedError):
            raise
        status = 1
        which = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            status = 2
        elif _is_lost_process(error):
            print(
                f"{which}: another process is gone ({_first_line(error)}); the same command in all "
                "processes resumes from the last checkpoint",
                file=sys.stderr,
            )
        elif failure := storage_failure(error):
            print(f"{which}: {failure}; {RESUMES}", file=sys.stderr)
        elif denied := access_failure(error):
            print(f"{which}: {denied}", file=sys.stderr)
            status = 2
        else:
            if not isinstance(error, KeyboardInterrupt):
                traceback.print_exc()
            print(f"{which} failed; the others stop too", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if status == 2 and is_primary():
            # Its end aborts the other processes, which may be about to report the same.
            time.sleep(_REPORT_SECONDS)
        os._exit(status)


def _is_lost_process(error: BaseException) -> bool:
    """Returns whether a computation failed because one of its processes is gone."""
    signs: tuple[str, ...] = ("Gloo", "NCCL")
    if isinstance(error, jax.errors.JaxRuntimeError):
        signs += ("UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination", "heartbeat")
    elif not isinstance(error, ValueError):  # raised if JAX dispatches the computation at once
        return False
    return any(sign in str(error) for sign in signs)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).strip()
