"""Runs cells on Ray, each as one task that is submitted again if its worker dies.

The workers write the outputs of cells; only the driver writes the records and the manifest. Tasks
are submitted again by the driver instead of Ray's max_retries, so that the manifest has the number
of attempts, retries are printed, and a cell that runs out of memory is not retried forever. A task
that is submitted again resumes from the cell's last checkpoint, or finds its outputs and does
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
from sweet_jax.errors import UserError, one_line
from sweet_jax.training.loop import termination_event

_ROOT = Path(__file__).resolve().parent.parent
_GRACE_PERIOD = 60.0  # seconds that stopped cells have to save their state


def add_options(group: Any) -> None:
    """Adds the options that choose where the cells run."""
    add = group.add_argument
    add("--engine", default="local", choices=("local", "ray"), help="default: %(default)s")
    add(
        "--address",
        metavar="HOST:PORT",
        help="address of a Ray cluster that this machine belongs to, or auto; default: RAY_ADDRESS "
        "or, if it is not set, Ray is started on this machine and stopped with the command",
    )
    for kind, default in (
        ("cpus", "1"),
        ("gpus", "1 if the cluster has any"),
        ("tpus", "1 if the cluster has any and no GPUs"),
    ):
        add(
            f"--{kind}_per_cell",
            type=int,
            metavar="N",
            help=f"{'TPU chips' if kind == 'tpus' else kind[:-1].upper() + 's'} of one node for a "
            f"cell (ray); default: {default}",
        )
    add(
        "--worker_retries",
        type=int,
        default=3,
        metavar="N",
        help="how often a cell is started again after its worker died (ray); default: %(default)s",
    )


def run(
    cells: Sequence[Cell], options: argparse.Namespace
) -> Generator[tuple[Cell, dict[str, Any]], None, None]:
    """Runs the cells in parallel on Ray; yields each with its manifest entry when it has ended.

    Raises:
      UserError: Ray is not installed, cannot be reached, or has no node that is large enough.
      PreemptedError: SIGTERM or Ctrl-C was received; running cells had a minute to save their
        state.

    """
    check_options(options)
    with _connected(options) as ray, termination_event((signal.SIGTERM, signal.SIGINT)) as stopped:
        demand = required_resources(options, [n["Resources"] for n in ray.nodes() if n["Alive"]])
        began, total, worked, ended = time.monotonic(), sum(c.work for c in cells), 0.0, 0
        running = {_submit(ray, cell, options, demand): (cell, 1) for cell in cells}
        while running and not stopped.is_set():
            for stream in ray.wait(list(running), timeout=0.5)[0]:
                kind, content = _next_message(ray, stream)
                if kind == "started":
                    _print_line(f"{running[stream][0].name} on {content}")
                    continue
                cell, attempts = running.pop(stream)
                if kind == "lost" and attempts <= options.worker_retries:
                    _print_line(f"{cell.name}: {content}, started again")
                    running[_submit(ray, cell, options, demand)] = (cell, attempts + 1)
                    continue
                if kind == "lost":
                    content = {"state": "failed", "error": f"{content} at attempt {attempts}"}
                ended, worked = ended + 1, worked + cell.work
                rest = time_left(time.monotonic() - began, worked, total)
                _print_line(f"[{ended}/{len(cells)}] {cell.name} {content['state']}{rest}")
                yield cell, content | {"attempts": attempts}
        if stopped.is_set():
            yield from _stop(ray, running)
            raise PreemptedError(f"stopped with {ended} of {len(cells)} cells ended")


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for a number of devices or retries that is too small."""
    for name, minimum in (
        ("cpus_per_cell", 1),
        ("gpus_per_cell", 0),
        ("tpus_per_cell", 0),
        ("worker_retries", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name} must be {minimum} or more; got {value}")


def required_resources(
    options: argparse.Namespace, nodes: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Returns the resources of a cell, by "CPU", "GPU" and "TPU".

    Accelerators are not shared, since jax reserves most of a device's memory. Raises UserError if
    no node has enough resources.

    nodes: resources of each node.
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
        needed = ", ".join(f"{count:g} {kind}" for kind, count in demand.items())
        raise UserError(
            f"no node has the resources of a cell, {needed}; the largest have {has}: set "
            "--cpus_per_cell, --gpus_per_cell or --tpus_per_cell"
        )
    return demand


@contextlib.contextmanager
def _connected(options: argparse.Namespace) -> Iterator[types.ModuleType]:
    """Connects to Ray, or starts it for the duration of the context; yields the module.

    Raises UserError if Ray is not installed or cannot be reached.
    """
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
    logging.getLogger("ray").setLevel(logging.ERROR)  # keeps Ray's messages off the terminal
    arguments: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)  # which Ray replaces
    try:
        if address not in ("auto", "local"):  # fails at once, where Ray would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **arguments)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"no Ray cluster can be reached at {address!r} ({one_line(error)}): start one with ray "
            "start --head"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)


def _print_line(line: str) -> None:
    """Prints a line with a single write.

    A thread of Ray also prints when a worker dies, and `print` writes the end of a line separately.
    """
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _submit(
    ray: types.ModuleType, cell: Cell, options: argparse.Namespace, demand: Mapping[str, float]
) -> Any:
    """Submits the task of a cell; returns the stream of its messages."""
    # The experiments are not an installed package. Their folder is on storage that all nodes share,
    # like the workdir, so its path is enough.
    environment = {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    if not demand["GPU"] and not demand["TPU"]:
        # Without these, XLA would use every core, or a device that Ray has not assigned.
        environment |= {"JAX_PLATFORMS": "cpu", "NPROC": str(demand["CPU"])}
    # One process per cell (max_calls), since a process keeps its devices and memory until it ends.
    task = ray.remote(num_returns="streaming", max_calls=1, max_retries=0)(run_task).options(
        name=cell.name,
        num_cpus=demand["CPU"],
        num_gpus=demand["GPU"],
        resources={"TPU": demand["TPU"]} if demand["TPU"] else None,
        runtime_env={"env_vars": environment},
    )
    kind = "gpu" if demand["GPU"] else "tpu" if demand["TPU"] else "cpu"
    # The worker changes to the driver's folder, so that relative paths are the same.
    return task.remote(cell, kind, Path.cwd(), options.workdir)


def _next_message(ray: types.ModuleType, stream: Any) -> tuple[str, Any]:
    """Returns the next message of a stream: its kind and its content.

    They are ("started", place), ("ended", manifest entry) or ("lost", reason).
    """
    try:
        return ray.get(next(stream))
    except StopIteration:  # a cancelled task may end without a message
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
    """Cancels the tasks, so that they save their state; yields the cells that end before that."""
    for stream in running:
        ray.cancel(stream)
    deadline = time.monotonic() + _GRACE_PERIOD
    while running and time.monotonic() < deadline:
        for stream in ray.wait(list(running), timeout=0.5)[0]:
            kind, content = _next_message(ray, stream)
            if kind == "started":
                continue
            cell, attempts = running.pop(stream)
            if kind == "ended":
                yield cell, content | {"attempts": attempts}
    for stream in running:
        ray.cancel(stream, force=True)
