"""One command on several processes, on one host or many, each with devices of its own.

Every process runs the same command, reads the same files, and takes part in every step; the first
one writes. Arrays span the devices of all (training/sharding.py); here is what else they share: how
they find each other, and how they stop together.

Shape letters: P process.
"""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sweet_jax.config import UserError
from sweet_jax.files import write_text

# A process that ends in no step of the others, and a host that is lost, are known by their silence.
_HEARTBEAT_SECONDS = 30
_SHUTDOWN_SECONDS = 300  # in which the others reach their end too
_MESSAGE_BYTES = 2000
_questions = itertools.count(1)  # of `preemption_requested`


class PreemptedError(Exception):
    """SIGTERM came; the state was saved."""


def initialize(address: str | None, count: int | None, number: int | None) -> None:
    """Joins the processes of a command, before any device is touched.

    On Cloud TPU and in a Slurm step of several tasks they find each other; elsewhere the arguments
    tell, and without them the process is the only one.

    Args:
      address: host:port, where the first process listens.
      count: of processes.
      number: this one's, from 0.

    Raises UserError where the arguments do not go together, or the processes did not meet.

    """
    given = (address, count, number)
    if count == 1 or not (any(g is not None for g in given) or _found()):
        return
    if any(g is not None for g in given) and None in given:
        raise UserError(
            "--coordinator_address, --num_processes and --process_id go together: give all three, "
            "or none on Cloud TPU and in a Slurm step"
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
            return  # libtpu is installed, but this is no TPU's host
        where = address or "the address that the cluster names"
        raise UserError(
            f"the processes did not meet at {where} ({_first_line(error)}): start all of them, "
            "where that address can be reached"
        ) from error


def _found() -> bool:
    """Whether there is a cluster that JAX finds by itself."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return True
    on_tpu = os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"
    return on_tpu and importlib.util.find_spec("libtpu") is not None


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def raise_on_all() -> Iterator[None]:
    """Waits at its end for all processes; a UserError of one is then raised in all of them."""
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    if jax.process_count() > 1:
        texts = _all_gather(str(error or "").encode()[:_MESSAGE_BYTES])
        for number, text in enumerate(texts):
            if text and error is None:
                error = UserError(f"process {number}: {text.decode(errors='replace')}")
    if error is not None:
        raise error


@contextlib.contextmanager
def claim_on_primary(
    workdir: Path, identity: Mapping[str, Any], claim: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """The first process's claim of a run directory, for all.

    Raises UserError in all where it fails, where a process has another identity, or sees another
    directory.
    """
    with contextlib.ExitStack() as stack:
        with raise_on_all():
            text = json.dumps(identity, sort_keys=True)
            digests = _all_gather(hashlib.sha256(text.encode()).digest())
            if digests[jax.process_index()] != digests[0]:
                raise UserError(
                    "this process was started with another config, or reads other data than the "
                    "first: give all of them the same command and files"
                )
        token = workdir / ".shared"
        with raise_on_all():
            if is_primary():
                stack.enter_context(claim())
                if jax.process_count() > 1:
                    write_text(token, secrets.token_hex(16))
        if jax.process_count() > 1:
            with raise_on_all():
                _check_shared(workdir, token)
        yield


def _check_shared(workdir: Path, token: Path) -> None:
    """Raises UserError unless all processes read the same token."""
    for _ in range(10):  # a shared directory may be seen some seconds late
        found = _all_gather(token.read_bytes() if token.exists() else b"")
        if all(each == found[0] for each in found):
            return
        time.sleep(1)
    if found[jax.process_index()] != found[0]:
        raise UserError(
            f"workdir {str(workdir)!r} is not that of the first process: give a directory that "
            "all hosts share"
        )


def preemption_requested() -> bool:
    """Whether all processes are to stop now, as SIGTERM to any of them asks.

    All must ask equally often. JAX has them agree on a number that none has passed yet, once in the
    life of a process: so it is the questions that are numbered, not the steps of a training.
    """
    return multihost_utils.reached_preemption_sync_point(next(_questions))


def broadcast_number(number: int) -> int:
    """The number that the first process has."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def broadcast_from_primary(tree: Any) -> Any:
    """Returns the arrays of the first process in all: hosts may round what they compute otherwise.

    As NumPy arrays of at most 32 bits a number; unchanged where there is one process.
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def barrier(name: str) -> None:
    """Returns when every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _all_gather(value: bytes) -> list[bytes]:
    """The bytes, at most _MESSAGE_BYTES without zeros at their end, of every process."""
    if jax.process_count() == 1:
        return [value]
    padded = np.zeros(_MESSAGE_BYTES, np.uint8)
    padded[: len(value)] = np.frombuffer(value, np.uint8)
    return [row.tobytes().rstrip(b"\0") for row in multihost_utils.process_allgather(padded)]


@contextlib.contextmanager
def abort_together() -> Iterator[None]:
    """Around what several processes do: where one fails, the others do not wait for it.

    JAX would have a process that fails wait at its exit for the others, who wait for it in the
    next step. So it leaves at once with status 1, which the others notice: a step in which it is
    missing fails, or JAX's own watch aborts them and says that another task died.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        # What is known to all is raised in all of them: they end as one process does.
        if jax.process_count() == 1 or isinstance(error, UserError | PreemptedError):
            raise
        which = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, jax.errors.JaxRuntimeError) and _lost(error):
            print(
                f"{which}: another process is gone ({_first_line(error)}). The same command on all "
                "of them goes on from the last checkpoint",
                file=sys.stderr,
            )
        else:
            if not isinstance(error, KeyboardInterrupt):
                traceback.print_exc()
            print(f"{which} failed; the others stop with it", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _lost(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether an error is what a step says when a process that takes part in it is gone."""
    signs = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination", "heartbeat")
    return any(sign in str(error) for sign in signs)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).strip()
