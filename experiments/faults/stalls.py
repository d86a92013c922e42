"""One of four processes is stopped, not killed: the others must end, and say why."""

import signal
from pathlib import Path
from typing import Any

from experiments.faults.compare import count_bits, differing_bits
from experiments.faults.kills import Plan, await_moment, setup_of, undisturbed
from experiments.faults.launch import finish, started
from experiments.faults.phases import Watch

_SECONDS = 120.0  # waited for the others


def run_stalls(folder: Path) -> list[dict[str, Any]]:
    """Stops a process in several phases, also the first one; returns a record of each."""
    place = folder / "four"
    place.mkdir(parents=True, exist_ok=True)
    setup = setup_of("four", folder)
    known = undisturbed("four", setup, folder)
    records = []
    for phase, victim in (("training", 2), ("training", 0), ("checkpoint", 1), ("evaluation", 3)):
        run = place / f"stall-{phase}-{victim}"
        with started(setup, run) as attempt:
            watch = Watch(run, attempt.began, attempt.errors[0], known.last_step, known.total)
            if not await_moment(Plan(phase, 0.05), watch, attempt):
                raise RuntimeError(f"{phase} was not seen: {attempt.said(0)}")
            attempt.processes[victim].send_signal(signal.SIGSTOP)
            others = [n for n in range(4) if n != victim]
            ended = attempt.wait(_SECONDS, others)
            said = {n: attempt.said(n) for n in others}
            statuses = {n: attempt.processes[n].poll() for n in others}
        record = {"phase": phase, "stopped": victim, "statuses": statuses, "said": said}
        record["seconds"] = {n: round(s, 1) for n, s in ended.items()}
        finish(setup, run)
        bits, names = differing_bits(place / "whole", run)
        records.append(record | {"bits": bits, "differing": count_bits(names)})
        print(records[-1], flush=True)
    return records
