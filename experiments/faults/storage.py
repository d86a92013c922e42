"""A workdir whose disk is full, or turns read-only, in the middle of a run. Linux, as root."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.faults.compare import count_bits, differing_bits
from experiments.faults.kills import Plan, await_moment, setup_of, undisturbed
from experiments.faults.launch import Setup, finish, started
from experiments.faults.phases import Watch
from sweet_jax.errors import UserError

_SECONDS = 600.0  # in which the command must have ended


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()} (this needs root, on Linux)")


@contextlib.contextmanager
def small_disk(place: Path, kibibytes: int) -> Iterator[Callable[[], None]]:
    """Mounts a file system of a size; yields what makes it large enough."""
    place.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "faults", str(place))
    try:
        yield lambda: _run("mount", "-o", "remount,size=1g", str(place))
    finally:
        _run("umount", str(place))


@contextlib.contextmanager
def failing_disk(place: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Mounts a file system; yields what makes it read-only, as a bad disk does, and its repair."""
    image = place.with_suffix(".img")
    place.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(256 << 20)
    _run("mkfs.ext4", "-q", "-F", str(image))
    _run("mount", "-o", "loop", str(image), str(place))

    def mend() -> None:
        _run("umount", str(place))
        subprocess.run(["e2fsck", "-p", str(image)], capture_output=True)  # 1: repaired
        _run("mount", "-o", "loop", str(image), str(place))

    try:
        yield lambda: _run("mount", "-o", "remount,abort", str(place)), mend
    finally:
        _run("umount", str(place))
        image.unlink()


def run_storage(folder: Path, mode: str) -> dict[str, Any]:
    """Runs both faults at several moments; returns the records."""
    setup = setup_of(mode, folder)
    known = undisturbed(mode, setup, folder)
    whole, place = folder / mode / "whole", folder / mode / "disk"
    size = sum(p.stat().st_size for p in whole.rglob("*") if p.is_file()) // 1024
    records = []
    for share in (0.02, 0.3, 0.6, 0.9):
        with small_disk(place, max(16, int(share * size))) as enlarge:
            record = _attempt(setup, place / "run", lambda watch, attempt: None)
            enlarge()
            finish(setup, place / "run")
            records.append(
                {"fault": f"full at {share:.0%}", **record, **_compare(whole, place / "run")}
            )
            print(records[-1], flush=True)
    for phase in ("probe", "rate search", "training", "checkpoint", "report"):
        with failing_disk(place) as (fail, mend):

            def disturb(watch, attempt, phase=phase, fail=fail) -> None:
                plan = Plan(phase, known.phases.get(phase, (0.1, 0.0))[0] / 2)
                if await_moment(plan, watch, attempt.is_whole):
                    fail()

            record = _attempt(setup, place / "run", disturb, known.last_step, known.total)
            mend()
            finish(setup, place / "run")
            records.append(
                {"fault": f"read-only at {phase}", **record, **_compare(whole, place / "run")}
            )
            print(records[-1], flush=True)
    return {"mode": mode, "records": records}


def _attempt(
    setup: Setup, run: Path, disturb: Callable, last_step: int = -1, total: int = 0
) -> dict[str, Any]:
    """Starts a run that a fault must end; returns the statuses and what was said."""
    shutil.rmtree(run.parent.parent / "logs", ignore_errors=True)
    with started(setup, run, logs=run.parent.parent / "logs") as attempt:
        watch = Watch(run, attempt.began, attempt.errors[0], last_step, total)
        disturb(watch, attempt)
        began = time.monotonic()
        ended = attempt.wait(_SECONDS)
        record = {
            "phase": watch.phase(),
            "seconds": round(time.monotonic() - began, 1),
            "statuses": [process.poll() for process in attempt.processes],
            "said": [attempt.said(n) for n in sorted(ended)],
        }
    return record


def _compare(whole: Path, run: Path) -> dict[str, Any]:
    bits, names = differing_bits(whole, run)
    return {"bits": bits, "differing": count_bits(names), "names": names[:10]}
