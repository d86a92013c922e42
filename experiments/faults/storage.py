"""Runs with a workdir on a disk that becomes full or read-only. Needs root, on Linux."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.faults.compare import count_bits, differing_bits
from experiments.faults.launch import Attempt, Setup, run_to_end, started
from experiments.faults.phases import Watch
from experiments.faults.plans import Plan, wait_for_moment
from experiments.faults.reference import make_setup, run_undisturbed
from sweet_jax.errors import UserError

_SECONDS = 600.0  # within which the command must end


def _run(*command: str) -> None:
    """Runs a command; raises UserError if it fails."""
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        message = process.stderr.strip()
        raise UserError(f"{' '.join(command)} failed: {message} (this test needs root, on Linux)")


@contextlib.contextmanager
def small_disk(place: Path, kibibytes: int) -> Iterator[Callable[[], None]]:
    """Mounts a file system of a size; yields a function that makes it large enough."""
    place.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "faults", str(place))
    try:
        yield lambda: _run("mount", "-o", "remount,size=1g", str(place))
    finally:
        _run("umount", str(place))


@contextlib.contextmanager
def failing_disk(place: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Mounts a file system; yields a function that makes it fail, and one that repairs it.

    It becomes read-only, as after an error of the disk.
    """
    image = place.with_suffix(".img")
    place.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(256 << 20)
    _run("mkfs.ext4", "-q", "-F", str(image))
    _run("mount", "-o", "loop", str(image), str(place))

    def repair() -> None:
        _run("umount", str(place))
        # Unchecked: its status is 1 if it repaired something.
        subprocess.run(["e2fsck", "-p", str(image)], capture_output=True)
        _run("mount", "-o", "loop", str(image), str(place))

    try:
        yield lambda: _run("mount", "-o", "remount,abort", str(place)), repair
    finally:
        _run("umount", str(place))
        image.unlink()


def run_storage(folder: Path, mode: str) -> dict[str, Any]:
    """Runs with both faults at several moments; returns the records."""
    setup = make_setup(mode, folder)
    reference = run_undisturbed(mode, setup, folder)
    whole, place = folder / mode / "whole", folder / mode / "disk"
    size = sum(p.stat().st_size for p in whole.rglob("*") if p.is_file()) // 1024
    records = []
    for share in (0.02, 0.3, 0.6, 0.9):
        with small_disk(place, max(16, int(share * size))) as enlarge:
            record = _run_until_fault(setup, place / "run", lambda watch, attempt: None)
            enlarge()
            run_to_end(setup, place / "run")
            records.append(
                {"fault": f"full at {share:.0%}", **record, **_compare(whole, place / "run")}
            )
            print(records[-1], flush=True)
    for phase in ("probe", "rate search", "training", "checkpoint", "report"):
        with failing_disk(place) as (fail, repair):

            def disturb(watch, attempt, phase=phase, fail=fail) -> None:
                plan = Plan(phase, reference.phases.get(phase, (0.1, 0.0))[0] / 2)
                if wait_for_moment(plan, watch, attempt.is_whole):
                    fail()

            record = _run_until_fault(
                setup, place / "run", disturb, reference.last_step, reference.total
            )
            repair()
            run_to_end(setup, place / "run")
            records.append(
                {"fault": f"read-only at {phase}", **record, **_compare(whole, place / "run")}
            )
            print(records[-1], flush=True)
    return {"mode": mode, "records": records}


def _run_until_fault(
    setup: Setup,
    run: Path,
    disturb: Callable[[Watch, Attempt], None],
    last_step: int = -1,
    total: int = 0,
) -> dict[str, Any]:
    """Starts a run that a fault must end; returns the record of its end.

    Args:
      setup: what to start.
      run: run directory.
      disturb: causes the fault at its moment.
      last_step, total: as for `Watch`.

    """
    shutil.rmtree(run.parent.parent / "logs", ignore_errors=True)
    with started(setup, run, logs=run.parent.parent / "logs") as attempt:
        watch = Watch(run, attempt.start, attempt.errors[0], last_step, total)
        disturb(watch, attempt)
        start = time.monotonic()
        ended = attempt.wait(_SECONDS)
        record = {
            "phase": watch.phase(),
            "seconds": round(time.monotonic() - start, 1),
            "statuses": [process.poll() for process in attempt.processes],
            "said": [attempt.read_errors(n) for n in sorted(ended)],
        }
    return record


def _compare(whole: Path, run: Path) -> dict[str, Any]:
    bits, differences = differing_bits(whole, run)
    return {"bits": bits, "differing": count_bits(differences), "names": differences[:10]}
