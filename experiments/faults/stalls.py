"""One of several processes is stopped, not killed: the others must end, and say why."""

import shutil
import signal
from pathlib import Path
from typing import Any

from experiments.faults.compare import count_bits, differing_bits
from experiments.faults.kills import Plan, Reference, await_moment, setup_of, undisturbed
from experiments.faults.launch import Setup, finish, started
from experiments.faults.phases import Watch

_SECONDS = 120.0  # waited for the others


def run_stalls(folder: Path, mode: str) -> list[dict[str, Any]]:
    """Stops the last process, or the first, in several phases; returns a record of each."""
    place = folder / mode
    place.mkdir(parents=True, exist_ok=True)
    setup = setup_of(mode, folder)
    known = undisturbed(mode, setup, folder)
    last = setup.processes - 1
    records = []
    for phase, victim in (("checkpoint", last), ("training", 0), ("evaluation", last)):
        run = place / f"stall-{phase}-{victim}"
        record = None
        while record is None:
            record = _stop(setup, run, known, phase, victim)
        finish(setup, run)
        bits, names = differing_bits(place / "whole", run)
        records.append({"mode": mode, **record, "bits": bits, "differing": count_bits(names)})
        print(records[-1], flush=True)
    return records


def _stop(
    setup: Setup, run: Path, known: Reference, phase: str, victim: int
) -> dict[str, Any] | None:
    """Stops a process of a new run in a phase; returns how the others ended, None if missed."""
    shutil.rmtree(run, ignore_errors=True)
    with started(setup, run) as attempt:
        watch = Watch(run, attempt.began, attempt.errors[0], known.last_step, known.total)
        if not await_moment(Plan(phase, 0.05), watch, attempt.is_whole):
            return None  # a short phase, on a busy machine
        attempt.processes[victim].send_signal(signal.SIGSTOP)
        others = [n for n in range(len(attempt.processes)) if n != victim]
        ended = attempt.wait(_SECONDS, others)
        return {
            "phase": phase,
            "stopped": victim,
            "statuses": {n: attempt.processes[n].poll() for n in others},
            "said": {n: attempt.said(n) for n in others},
            "seconds": {n: round(s, 1) for n, s in ended.items()},
        }
