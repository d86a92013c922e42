"""Kills runs at random moments, resumes them until they end, and compares every bit."""

import dataclasses
import functools
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.faults.compare import count_bits, differing_bits
from experiments.faults.launch import Attempt, started
from experiments.faults.phases import Watch
from experiments.faults.plans import Plan, phases_ahead, plan_kill, wait_for_plan
from experiments.faults.reference import MODES, make_setup, run_undisturbed

MAX_KILLS = 8  # of one run, which may then end by itself
MAX_SECONDS = 900.0  # of an attempt that is not killed
_MAX_WAIT = 90.0  # seconds until the other processes must have ended
_CONNECTING_WAIT = 3.0  # the same while processes connect, for which they would wait five minutes
_ALL = 0.25  # share of the kills that hit all processes, as a power failure does
_EMPTY_CACHE = 0.15  # share of the runs that start with an empty compilation cache
# JAX ends a process with these messages if a busy machine delays another one by 30 s.
_BUSY_MESSAGES = (
    "stopped sending heartbeats",
    "Gloo context initialization failed: DEADLINE_EXCEEDED",
)
_MAX_RESTARTS = 3  # of a run, after such messages


def run_kills(
    mode: str,
    kills: int,
    folder: Path,
    seed: int,
    run_one: Callable[..., dict[str, Any]] | None = None,
) -> None:
    """Runs rounds of a mode until FOLDER/MODE.SEED.jsonl has as many kills.

    run_one: runs one round, with the arguments of `run_round`, which is the default.
    """
    path = folder / f"{mode}.{seed}.jsonl"
    (folder / mode).mkdir(parents=True, exist_ok=True)
    while count_kills(rounds := read_records(path)) < kills:
        hits = Counter(kill["phase"] for record in rounds for kill in record["kills"])
        record = (run_one or run_round)(mode, len(rounds), folder / mode, seed, hits)
        append_record(path, record)


def run_round(mode: str, number: int, folder: Path, seed: int, hits: Counter) -> dict[str, Any]:
    """Kills one run until it ends by itself; returns the record of all its kills.

    An attempt that JAX ended because the machine is busy is started again, and counted.

    Args:
      mode: name of the mode.
      number: number of the round.
      folder: work directory of the mode.
      seed: seed of the random moments.
      hits: number of kills in each phase, in earlier rounds.

    Raises RuntimeError if the command fails or does not end.

    """
    setup = make_setup(mode, folder.parent)
    reference = run_undisturbed(mode, setup, folder.parent)
    run, rng = folder / f"run-{seed}-{number}", random.Random(f"{seed}/{mode}/{number}")
    if cold := rng.random() < _EMPTY_CACHE:  # then kills also hit the writing of programs
        setup = dataclasses.replace(setup, cache=folder / f"{run.name}-cache")
    log, restarts = KillLog(folder / f"{run.name}-kills.jsonl"), 0
    while True:
        with started(setup, run) as attempt:
            watch = reference.watch(run, attempt.start, attempt.errors[0])
            kill, plan = None, None
            if len(log.read()) < MAX_KILLS:
                choose = functools.partial(plan_kill, rng, hits + log.phases(), reference)
                phases = phases_ahead(run, reference.last_step)
                if plan := wait_for_plan(choose, phases, watch, attempt.is_whole):
                    kill = kill_processes(rng, plan, watch, attempt, MODES[mode].signal)
            if kill is None:
                attempt.wait(MAX_SECONDS)
        if kill is not None:
            log.add(kill)
            print(f"{mode} {number}: killed {kill}", flush=True)
        elif not (statuses := {process.returncode for process in attempt.processes} - {0}):
            break
        elif plan is None or statuses != {-signal.SIGKILL}:  # else it was killed as it ended
            restarts += 1
            _check_busy(attempt, run, restarts)
            print(f"{mode} {number}: started again: the machine is too busy", flush=True)
    bits, differences = differing_bits(folder / "whole", run)
    left = [str(p.relative_to(run)) for p in run.rglob("*") if ".part" in p.name]
    record = make_record(mode, number, cold, log, bits, differences, left)
    record["restarts"] = restarts
    if not differences:
        for path in folder.glob(f"{run.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return record


def _check_busy(attempt: Attempt, run: Path, restarts: int) -> None:
    """Raises RuntimeError unless all processes that failed did so because the machine is busy."""
    failed = [n for n, process in enumerate(attempt.processes) if process.returncode]
    texts = [attempt.read_errors(n) for n in failed]
    busy = all(any(message in text for message in _BUSY_MESSAGES) for text in texts)
    if not busy or restarts > _MAX_RESTARTS:
        errors = "\n".join(text[-2000:] for text in texts)
        raise RuntimeError(f"{run} did not resume:\n{errors}")


def kill_processes(
    rng: random.Random, plan: Plan, watch: Watch, attempt: Attempt, sent: signal.Signals
) -> dict[str, Any] | None:
    """Sends a signal to one process or to all, and waits until all have ended.

    Returns the record of the kill, or None if the run had ended before.
    """
    everyone = list(range(len(attempt.processes)))
    victims = [rng.choice(everyone)]
    if len(everyone) > 1 and rng.random() < _ALL:
        victims = everyone
    for number in victims:
        attempt.processes[number].send_signal(sent)
    if sent == signal.SIGKILL:
        for number in victims:
            attempt.processes[number].wait()
        if not all(attempt.processes[n].returncode == -signal.SIGKILL for n in victims):
            return None
    record: dict[str, Any] = {"phase": watch.phase(), "victims": victims, "aimed": plan.phase}
    others = [n for n in everyone if n not in victims or sent != signal.SIGKILL]
    if others:
        output = attempt.errors[0].with_name("0.out").read_text(errors="replace")
        connected = len(everyone) == 1 or "Gloo" in output
        ended = attempt.wait(_MAX_WAIT if connected else _CONNECTING_WAIT, others)
        if all(process.poll() == 0 for process in attempt.processes):
            return None  # SIGTERM came too late
        record |= {
            "joined": connected,
            "seconds": max(ended.values(), default=0.0),
            "waiting": len(others) - len(ended) if connected else 0,
            "said": sorted({describe_end(attempt, n) for n in ended}),
        }
    return record


def describe_end(attempt: Attempt, number: int) -> str:
    """Returns the kind of message with which a process ended, or its status and last words."""
    text = attempt.read_errors(number)
    messages = ("Traceback", "stopped by SIGTERM", "another process is gone", "another task died")
    for message in messages:
        if message in text:
            return message
    return f"status {attempt.processes[number].returncode}: {text[-300:]}"


class KillLog:
    """Keeps the kills of a run that has not ended, for a command that is stopped and continued."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Returns the records so far."""
        return read_records(self.path)

    def phases(self) -> Counter:
        """Returns the number of kills in each phase."""
        return Counter(kill["phase"] for kill in self.read())

    def add(self, kill: dict[str, Any]) -> None:
        """Appends a record."""
        append_record(self.path, kill)


def make_record(
    mode: str,
    number: int,
    cold: bool,
    log: KillLog,
    bits: int,
    differences: list[str],
    left: list[str],
) -> dict[str, Any]:
    """Returns the record of a round, and prints its result.

    Args:
      mode, number: mode and number of the round.
      cold: whether it started with an empty compilation cache.
      log: its kills.
      bits, differences: result of `differing_bits`.
      left: partial files that were left behind.

    """
    record = {"mode": mode, "round": number, "cold": cold, "kills": log.read(), "bits": bits}
    record |= {"differing": count_bits(differences), "names": differences[:20], "left": left}
    count, first = record["differing"], differences[:5]
    print(f"{mode} {number}: {count} of {bits} bits differ {first}", flush=True)
    return record


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSONL file, none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Appends a record to a JSONL file."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def count_kills(rounds: Iterable[dict[str, Any]]) -> int:
    """Returns the number of kills in the records of rounds."""
    return sum(len(record["kills"]) for record in rounds)
