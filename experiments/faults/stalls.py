"""Stops one of several processes (SIGSTOP), after which the others must end with a message."""

import shutil
import signal
from pathlib import Path
from typing import Any

from experiments.faults.compare import count_bits, differing_bits
from experiments.faults.launch import Setup, run_to_end, started
from experiments.faults.plans import Plan, wait_for_moment
from experiments.faults.reference import Reference, make_setup, run_undisturbed

_SECONDS = 120.0  # for the others to end


def run_stalls(folder: Path, mode: str) -> list[dict[str, Any]]:
    """Stops the first or the last process in several phases; returns a record of each."""
    place = folder / mode
    place.mkdir(parents=True, exist_ok=True)
    setup = make_setup(mode, folder)
    reference = run_undisturbed(mode, setup, folder)
    last = setup.processes - 1
    records = []
    for phase, victim in (("checkpoint", last), ("training", 0), ("evaluation", last)):
        run = place / f"stall-{phase}-{victim}"
        record = None
        while record is None:
            record = _stop(setup, run, reference, phase, victim)
        run_to_end(setup, run)
        bits, differences = differing_bits(place / "whole", run)
        records.append({"mode": mode, **record, "bits": bits, "differing": count_bits(differences)})
        print(records[-1], flush=True)
    return records


def _stop(
    setup: Setup, run: Path, reference: Reference, phase: str, victim: int
) -> dict[str, Any] | None:
    """Stops a process of a new run in a phase; returns how the others ended.

    Returns None if the phase had passed before it was noticed.
    """
    shutil.rmtree(run, ignore_errors=True)
    with started(setup, run) as attempt:
        watch = reference.watch(run, attempt.start, attempt.errors[0])
        if not wait_for_moment(Plan(phase, 0.05), watch, attempt.is_whole):
            return None  # the phase is short, or the machine busy
        attempt.processes[victim].send_signal(signal.SIGSTOP)
        others = [n for n in range(len(attempt.processes)) if n != victim]
        ended = attempt.wait(_SECONDS, others)
        return {
            "phase": phase,
            "stopped": victim,
            "statuses": {n: attempt.processes[n].poll() for n in others},
            "said": {n: attempt.read_errors(n) for n in others},
            "seconds": {n: round(s, 1) for n, s in ended.items()},
        }
