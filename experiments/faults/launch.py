"""Starts `python -m sweet_jax.main` as one process or several, waits for it, and kills it."""

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
    """Describes the command to start.

    Attributes:
      config: config file.
      cache: folder of compiled programs.
      processes: number of processes.
      devices: number of CPU devices of each process.
      options: further options of the command.

    """

    config: Path
    cache: Path
    processes: int = 1
    devices: int = 1
    options: tuple[str, ...] = ()


@dataclasses.dataclass
class Attempt:
    """Holds the processes of one start of a run."""

    start: float  # time.time()
    processes: list[subprocess.Popen]
    errors: list[Path]  # the file with the stderr of each

    def running(self) -> list[int]:
        """Returns the numbers of the processes that have not ended."""
        return [n for n, process in enumerate(self.processes) if process.poll() is None]

    def is_whole(self) -> bool:
        """Returns whether none of the processes has ended."""
        return len(self.running()) == len(self.processes)

    def wait(self, seconds: float, numbers: Sequence[int] | None = None) -> dict[int, float]:
        """Waits for processes to end; returns the seconds until each of them ended, by number.

        Args:
          seconds: longest time to wait; processes that have not ended by then are left out.
          numbers: numbers of the processes, by default all.

        """
        start = time.monotonic()
        left = set(range(len(self.processes)) if numbers is None else numbers)
        ended: dict[int, float] = {}
        while left and time.monotonic() - start < seconds:
            for number in sorted(left - set(self.running())):
                ended[number] = time.monotonic() - start
                left.remove(number)
            time.sleep(0.02)
        return ended

    def kill(self) -> None:
        """Sends SIGKILL to all processes, and waits until they have ended."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()

    def read_errors(self, number: int) -> str:
        """Returns what a process wrote to stderr, without the progress bar and empty lines."""
        text = self.errors[number].read_text(errors="replace")
        lines = text.replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if line.strip() and "%|" not in line)


def start(setup: Setup, workdir: Path, logs: Path | None = None) -> Attempt:
    """Starts the command in a run directory.

    Args:
      setup: what to start.
      workdir: run directory.
      logs: folder for stdout and stderr, by default one beside the run directory.

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
    options: list[list[str]] = [[]]  # of each process
    if setup.processes > 1:
        address = f"--coordinator_address=localhost:{_free_port()}"
        count = f"--num_processes={setup.processes}"
        options = [[address, count, f"--process_id={n}"] for n in range(setup.processes)]
    attempt = Attempt(time.time(), [], [])
    logs = logs or workdir.parent / f"{workdir.name}-logs"
    logs.mkdir(parents=True, exist_ok=True)
    for number, own in enumerate(options):
        attempt.errors.append(logs / f"{number}.err")
        with (
            (logs / f"{number}.out").open("w") as output,
            attempt.errors[-1].open("w") as errors,
        ):
            attempt.processes.append(
                subprocess.Popen(
                    [*command, *own], cwd=ROOT, env=environment, stdout=output, stderr=errors
                )
            )
    return attempt


@contextlib.contextmanager
def started(setup: Setup, workdir: Path, logs: Path | None = None) -> Iterator[Attempt]:
    """Starts the command; kills its processes at the end of the block."""
    attempt = start(setup, workdir, logs)
    try:
        yield attempt
    finally:
        attempt.kill()


def run_to_end(setup: Setup, workdir: Path, seconds: float = 1800.0) -> Attempt:
    """Runs the command until it ends.

    Raises RuntimeError, with the end of each stderr, if a process fails or does not end in time.
    """
    with started(setup, workdir) as attempt:
        attempt.wait(seconds)
    statuses = [process.returncode for process in attempt.processes]
    if any(statuses):
        texts = "\n".join(attempt.read_errors(n)[-2000:] for n in range(len(statuses)))
        raise RuntimeError(f"statuses {statuses} in {workdir}:\n{texts}")
    return attempt


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
