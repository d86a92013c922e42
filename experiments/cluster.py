"""Runs cells on Ray: one task a cell, submitted again where its worker dies.

The workers write a cell's outputs, the driver alone the records and the manifest. A task is
submitted again by the driver, not by Ray's max_retries: so the manifest has the number of attempts,
a retry is a line on the terminal, and a cell that runs out of memory is not retried for ever. A
task that is submitted again resumes from the cell's last checkpoint, or finds its outputs and does
nothing.
"""

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import time
import types
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.cells import Cell, time_left
from experiments.cluster_worker import run_task
from sweet_jax.distributed import PreemptedError
from sweet_jax.errors import UserError
from sweet_jax.training.loop import termination_event

_ROOT = Path(__file__).resolve().parent.parent
_GRACE = 60.0  # seconds that stopped cells have to save their state


def add_options(group: Any) -> None:
    """Adds the options that choose where the cells run."""
    add = group.add_argument
    add("--engine", default="local", choices=("local", "ray"), help="default: %(default)s")
    add(
        "--address",
        metavar="HOST:PORT",
        help="of a Ray cluster that this machine belongs to, or auto; default: RAY_ADDRESS, or "
        "else Ray is started on this machine and ended with the command",
    )
    for kind, default in (
        ("cpus", "1"),
        ("gpus", "1 where the cluster has any"),
        ("tpus", "1 where the cluster has any and no GPUs"),
    ):
        add(
            f"--{kind}_per_cell",
            type=int,
            metavar="N",
            help=f"whole {'chips' if kind == 'tpus' else kind.upper()} of one node (ray); "
            f"default: {default}",
        )
    add(
        "--worker_retries",
        type=int,
        default=3,
        metavar="N",
        help="times that a cell is begun again after its worker died (ray); default: %(default)s",
    )


def run(
    cells: Sequence[Cell], options: argparse.Namespace
) -> Generator[tuple[Cell, dict[str, Any]], None, None]:
    """Runs the cells side by side on Ray; yields each with its state when it has ended.

    Raises:
      UserError: Ray is not installed, not reached, or has no node for such cells.
      PreemptedError: SIGTERM or Ctrl-C came; running cells had a minute to save their state.

    """
    check_options(options)
    with _connected(options) as ray, termination_event((signal.SIGTERM, signal.SIGINT)) as stopped:
        demand = required_resources(options, [n["Resources"] for n in ray.nodes() if n["Alive"]])
        began, total, worked, ended = time.monotonic(), sum(c.work for c in cells), 0.0, 0
        running = {_submit(ray, cell, options, demand): (cell, 1) for cell in cells}
        while running and not stopped.is_set():
            for stream in ray.wait(list(running), timeout=0.5)[0]:
                kind, what = _next_message(ray, stream)
                if kind == "started":
                    _print_line(f"{running[stream][0].name} on {what}")
                    continue
                cell, times = running.pop(stream)
                if kind == "lost" and times <= options.worker_retries:
                    _print_line(f"{cell.name}: {what}, begun again")
                    running[_submit(ray, cell, options, demand)] = (cell, times + 1)
                    continue
                if kind == "lost":
                    what = {"state": "failed", "error": f"{what} at attempt {times}"}
                ended, worked = ended + 1, worked + cell.work
                rest = time_left(time.monotonic() - began, worked, total)
                _print_line(f"[{ended}/{len(cells)}] {cell.name} {what['state']}{rest}")
                yield cell, what | {"attempts": times}
        if stopped.is_set():
            yield from _stop(ray, running)
            raise PreemptedError(f"stopped with {ended} of {len(cells)} cells ended")


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for a number that cannot be."""
    for name, least in (
        ("cpus_per_cell", 1),
        ("gpus_per_cell", 0),
        ("tpus_per_cell", 0),
        ("worker_retries", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be {least} or more; got {value}")


def required_resources(
    options: argparse.Namespace, nodes: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Returns what a cell takes of a node, by "CPU", "GPU" and "TPU".

    Accelerators are taken whole: jax reserves most of a device's memory, so that two cells on one
    would be in each other's way. Raises UserError if no node has as much.
    """
    has_gpus, has_tpus = (any(n.get(kind, 0) >= 1 for n in nodes) for kind in ("GPU", "TPU"))
    gpus, tpus = options.gpus_per_cell, options.tpus_per_cell
    if gpus is None:
        gpus = int(has_gpus and not tpus)
    if tpus is None:
        tpus = int(has_tpus and not gpus)
    demand = {"CPU": options.cpus_per_cell or 1, "GPU": gpus, "TPU": tpus}
    if not any(all(n.get(k, 0) >= v for k, v in demand.items()) for n in nodes):
        has = "; ".join(
            ", ".join(f"{n.get(kind, 0):g} {kind}" for kind in demand)
            for n in sorted(nodes, key=lambda n: -n.get("CPU", 0))[:4]
        )
        wants = ", ".join(f"{count:g} {kind}" for kind, count in demand.items())
        raise UserError(f"no node has what a cell takes, {wants}: the largest have {has}")
    return demand


@contextlib.contextmanager
def _connected(options: argparse.Namespace) -> Iterator[types.ModuleType]:
    """Yields Ray, connected; a Ray that was started for this is ended with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine=ray needs Ray: pip install -e '.[cluster]'") from error
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address:
        raise UserError(
            f"--address {address!r} is not HOST:PORT: run the command on a node of the cluster, "
            "with --address=auto"
        )
    logging.getLogger("ray").setLevel(logging.ERROR)  # the terminal is for our lines
    begin = {"include_dashboard": False} if address == "local" else {}
    before = signal.getsignal(signal.SIGTERM)  # Ray puts its own
    try:
        if address not in ("auto", "local"):  # Ray would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **begin)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"no Ray cluster is reached at {address!r} ({text}): start one with ray start --head"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _print_line(line: str) -> None:
    """Writes a line to stdout in one piece.

    A thread of Ray's writes there too, when a worker died, and `print` would let it in before the
    end of the line.
    """
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _submit(
    ray: types.ModuleType, cell: Cell, options: argparse.Namespace, demand: Mapping[str, float]
) -> Any:
    """Submits the task of a cell; returns the stream of its messages."""
    # The experiments are no installed package. Their checkout is on the storage that all nodes
    # share, as the workdir is: to name it is simpler than to upload it, with its results.
    environment = {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    if not demand["GPU"] and not demand["TPU"]:
        # XLA would take every core, and a device that Ray gave to nobody.
        environment |= {"JAX_PLATFORMS": "cpu", "NPROC": str(demand["CPU"])}
    # A process for each cell (max_calls): jax holds its devices and their memory until it ends.
    task = ray.remote(num_returns="streaming", max_calls=1, max_retries=0)(run_task).options(
        name=cell.name,
        num_cpus=demand["CPU"],
        num_gpus=demand["GPU"],
        resources={"TPU": demand["TPU"]} if demand["TPU"] else None,
        runtime_env={"env_vars": environment},
    )
    kind = "gpu" if demand["GPU"] else "tpu" if demand["TPU"] else "cpu"
    # The driver's folder goes along, so that relative paths mean there what they mean here.
    return task.remote(cell, kind, Path.cwd(), options.workdir)


def _next_message(ray: types.ModuleType, stream: Any) -> tuple[str, Any]:
    """Returns a stream's next message: ("started", where), ("ended", state) or ("lost", why)."""
    try:
        return ray.get(next(stream))
    except StopIteration:  # a cancelled task may just end
        return "lost", "its worker was told to stop"
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PreemptedError | ray.exceptions.TaskCancelledError):
            return "lost", "its worker was told to stop"
        text = f"{type(error.cause).__name__}: {' '.join(str(error.cause).split())}"
        return "ended", {"state": "failed", "error": text, "traceback": f"{error}\n"}
    except ray.exceptions.RayError as error:
        return "lost", f"its worker died ({type(error).__name__})"


def _stop(
    ray: types.ModuleType, running: dict[Any, tuple[Cell, int]]
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Cancels the tasks, which then save their state; yields those that end on their own."""
    for stream in running:
        ray.cancel(stream)
    deadline = time.monotonic() + _GRACE
    while running and time.monotonic() < deadline:
        for stream in ray.wait(list(running), timeout=0.5)[0]:
            kind, what = _next_message(ray, stream)
            if kind == "started":
                continue
            cell, times = running.pop(stream)
            if kind == "ended":
                yield cell, what | {"attempts": times}
    for stream in running:
        ray.cancel(stream, force=True)
