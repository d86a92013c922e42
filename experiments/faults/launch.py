"""Starts the command that users run, as one process or several, and ends it."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Setup:
    """Says what is started.

    Attributes:
      config: file of the recipe.
      cache: folder of compiled programs.
      processes: how many take part.
      devices: of the CPU, of each process.
      options: more of the command line.

    """

    config: Path
    cache: Path
    processes: int = 1
    devices: int = 1
    options: tuple[str, ...] = ()


@dataclasses.dataclass
class Attempt:
    """Holds the processes of one start of a run."""

    began: float  # time.time()
    processes: list[subprocess.Popen]
    errors: list[Path]  # file of the standard error of each

    def running(self) -> list[int]:
        """Returns the numbers of the processes that have not ended."""
        return [n for n, process in enumerate(self.processes) if process.poll() is None]

    def is_whole(self) -> bool:
        """Returns whether none of the processes has ended."""
        return len(self.running()) == len(self.processes)

    def wait(self, seconds: float, numbers: Sequence[int] | None = None) -> dict[int, float]:
        """Waits for processes, by default all; returns the seconds until each of them ended.

        Those that are missing had not ended in time.
        """
        began = time.monotonic()
        left = set(range(len(self.processes)) if numbers is None else numbers)
        ended: dict[int, float] = {}
        while left and time.monotonic() - began < seconds:
            for number in sorted(left - set(self.running())):
                ended[number] = time.monotonic() - began
                left.remove(number)
            time.sleep(0.02)
        return ended

    def kill(self) -> None:
        """Ends with SIGKILL what is still running, and waits for it."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()

    def said(self, number: int) -> str:
        """Returns what a process wrote to its standard error, without the progress bar."""
        return said(self.errors[number])


def said(errors: Path) -> str:
    """Returns the lines of a file of standard error that are no progress bar."""
    parts = errors.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join(part for part in parts if part.strip() and "%|" not in part)


def start(setup: Setup, workdir: Path, logs: Path | None = None) -> Attempt:
    """Starts the command in a run directory; its output goes to files in `logs`.

    Default: a folder beside the directory.
    """
    command = [sys.executable, "-m", "sweet_jax.main", f"--config={setup.config}"]
    command += [f"--workdir={workdir}", *setup.options]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(setup.devices),
        "JAX_COMPILATION_CACHE_DIR": str(setup.cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_HUB_OFFLINE": "1",
    }
    joining: list[list[str]] = [[]]
    if setup.processes > 1:
        address = f"--coordinator_address=localhost:{_free_port()}"
        count = f"--num_processes={setup.processes}"
        joining = [[address, count, f"--process_id={n}"] for n in range(setup.processes)]
    attempt = Attempt(time.time(), [], [])
    logs = logs or workdir.parent / f"{workdir.name}-logs"
    logs.mkdir(parents=True, exist_ok=True)
    for number, more in enumerate(joining):
        attempt.errors.append(logs / f"{number}.err")
        with (
            (logs / f"{number}.out").open("w") as output,
            attempt.errors[-1].open("w") as errors,
        ):
            attempt.processes.append(
                subprocess.Popen(
                    [*command, *more], cwd=ROOT, env=environment, stdout=output, stderr=errors
                )
            )
    return attempt


@contextlib.contextmanager
def started(setup: Setup, workdir: Path, logs: Path | None = None) -> Iterator[Attempt]:
    """Starts the command; whatever of it still runs is killed at the end of the block."""
    attempt = start(setup, workdir, logs)
    try:
        yield attempt
    finally:
        attempt.kill()


def finish(setup: Setup, workdir: Path, seconds: float = 1800.0) -> Attempt:
    """Runs the command to its end.

    Raises RuntimeError with what the processes said if one fails, or does not end in time.
    """
    with started(setup, workdir) as attempt:
        attempt.wait(seconds)
    statuses = [process.returncode for process in attempt.processes]
    if any(statuses):
        texts = "\n".join(attempt.said(n)[-2000:] for n in range(len(statuses)))
        raise RuntimeError(f"statuses {statuses} in {workdir}:\n{texts}")
    return attempt


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
