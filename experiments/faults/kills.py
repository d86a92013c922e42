"""Kills runs at random moments and resumes them, until they end; then compares every bit."""

import dataclasses
import functools
import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.faults.compare import count_bits, differing_bits
from experiments.faults.inputs import write_inputs
from experiments.faults.launch import Attempt, Setup, finish, started
from experiments.faults.phases import PHASES, Watch, bar_total, place_of
from sweet_jax.files import read_json, write_json

# (processes, signal)
MODES = {
    "single": (1, signal.SIGKILL),
    "two": (2, signal.SIGKILL),
    "four": (4, signal.SIGKILL),
    "two-sigterm": (2, signal.SIGTERM),
    "four-sigterm": (4, signal.SIGTERM),
}
_TOGETHER = 90.0  # seconds within which the processes that are left must have ended
LAST = 900.0  # seconds that a run may take which nobody kills
_ALL = 0.25  # share of the kills that end all processes, as a power cut does, not one of them
MOST = 8  # kills of one run, which may end then
# Said by JAX where a busy machine keeps a process waiting for 30 s.
_STARVED = ("stopped sending heartbeats", "Gloo context initialization failed: DEADLINE_EXCEEDED")
_RESTARTS = 3  # of a run for that reason
_COLD = 0.15  # share of the runs that begin with an empty compilation cache


@dataclasses.dataclass(frozen=True)
class Reference:
    """Holds what an undisturbed run was like.

    Attributes:
      seconds: that it took.
      phases: for each phase, the seconds of its longest stay, and when it was last seen.
      last_step: the step of its last checkpoint.
      total: of its progress bar.

    """

    seconds: float
    phases: dict[str, tuple[float, float]]
    last_step: int
    total: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Says when an attempt is killed: `delay` seconds after a phase is seen, or after the start."""

    phase: str
    delay: float
    not_before: float = 0.0


def setup_of(mode: str, folder: Path) -> Setup:
    """Returns what is started in a mode; writes its inputs."""
    config = write_inputs(folder / "inputs")
    return Setup(config, folder / mode / "cache", MODES[mode][0])


def undisturbed(mode: str, setup: Setup, folder: Path) -> Reference:
    """Returns what an undisturbed run is like; runs FOLDER/MODE/whole where it is missing.

    Phases are timed in a second run of the mode "single", which must equal the first; the steps
    are the same in every mode.
    """
    run, path = folder / mode / "whole", folder / "reference.json"
    if mode != "single":
        if not path.exists():
            alone = dataclasses.replace(setup, cache=folder / "single" / "cache", processes=1)
            undisturbed("single", alone, folder)
        if not (run / "results.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            finish(setup, run)
        return read_reference(path)
    if not path.exists():
        again = folder / mode / "again"
        for rest in (run, again):
            shutil.rmtree(rest, ignore_errors=True)
        errors = finish(setup, run).errors[0]  # compiles
        steps = [int(p.name.split(".")[0]) for p in run.glob("checkpoints/*/*.digest.json")]
        last_step, total = max(steps), bar_total(errors)
        if not total:
            raise RuntimeError(f"no progress bar of a training in {errors}: see phases.py")
        with started(setup, again) as attempt:
            watch = Watch(again, attempt.began, attempt.errors[0], last_step, total)
            seen: list[tuple[float, str]] = []
            while attempt.running():
                seen.append((time.time() - attempt.began, watch.phase()))
                time.sleep(0.01)
        if names := differing_bits(run, again)[1]:
            raise RuntimeError(f"two undisturbed runs differ: {names}")
        shutil.rmtree(again)
        made = Reference(seen[-1][0], phases_of(seen), last_step, total)
        write_json(path, dataclasses.asdict(made))
    return read_reference(path)


def read_reference(path: Path) -> Reference:
    """Reads what `undisturbed` wrote."""
    return Reference(**read_json(path))


def phases_of(seen: Iterable[tuple[float, str]]) -> dict[str, tuple[float, float]]:
    """Returns for each phase the seconds of the longest stay in it, and when it was last seen."""
    found: dict[str, tuple[float, float]] = {}
    last, since = "", 0.0
    for at, phase in seen:
        if phase != last:
            last, since = phase, at
        found[phase] = max(found.get(phase, (0.0, 0.0))[0], at - since), at
    return found


def plan_kill(rng: random.Random, hit: Counter, known: Reference, ahead: list[str]) -> Plan:
    """Chooses when to kill: at any time, or in the phase that was hit least of those ahead.

    A time is that of an undisturbed run: a phase, as often as it is long, and a moment in it.
    """
    stays = [known.phases.get(phase, (0.2, 0.0))[0] for phase in ahead]
    least = min(hit[phase] for phase in ahead)
    if rng.random() < 0.4:
        phase = rng.choices(ahead, stays)[0]
    else:
        phase = rng.choice([phase for phase in ahead if hit[phase] == least])
    stay, last = known.phases.get(phase, (0.2, 0.0))
    # Checkpoints are written from the search on: not always the first of an attempt.
    not_before = rng.uniform(0, 0.7 * last) if phase == "checkpoint" else 0.0
    return Plan(phase, rng.uniform(0, stay), not_before)


def phases_ahead(run: Path, last_step: int) -> list[str]:
    """Returns the phases that an attempt at a run will go through."""
    done = set()
    if (run / "probe.npz").exists():
        done.add("probe")
    if (run / "rate_search.json").exists():
        done.add("rate search")
    if (run / "checkpoints" / "exits_1_2_3" / f"{last_step}.digest.json").exists():
        done |= {"compile", "training", "checkpoint"}
    return [phase for phase in PHASES if phase not in done]


def await_moment(plan: Plan, watch: Watch, is_alive: Callable[[], bool]) -> bool:
    """Waits for the moment of a plan; returns False where the run has passed it, or has ended."""
    seen = plan.phase == "start-up"
    until = watch.began + (plan.delay if seen else plan.not_before)
    while is_alive():
        now = time.time()
        if seen and now >= until:
            return True
        if not seen:
            phase = watch.phase()
            if phase == plan.phase and now >= until:
                seen, until = True, now + plan.delay
            elif place_of(phase) > place_of(plan.phase):
                return False
        time.sleep(min(0.01, max(0.0, until - now)) or 0.01)
    return False


def await_kill(
    choose: Callable[[list[str]], Plan], ahead: list[str], watch: Watch, is_alive
) -> Plan | None:
    """Waits for a moment at which to kill; one that was missed is chosen anew of those ahead.

    choose: makes a plan from the phases that are ahead. Returns None where the run ended before.
    """
    while ahead and is_alive():
        plan = choose(ahead)
        if await_moment(plan, watch, is_alive):
            return plan
        now = place_of(watch.phase())
        ahead = [phase for phase in ahead if place_of(phase) >= now]
    return None


def end_now(
    rng: random.Random, plan: Plan, watch: Watch, attempt: Attempt, how: signal.Signals
) -> dict[str, Any] | None:
    """Sends a signal to one process, or to all; waits until all ended.

    Returns the record of the kill, None where the run ended before.
    """
    everyone = list(range(len(attempt.processes)))
    victims = [rng.choice(everyone)]
    if len(everyone) > 1 and rng.random() < _ALL:
        victims = everyone
    for number in victims:
        attempt.processes[number].send_signal(how)
    if how == signal.SIGKILL:
        for number in victims:
            attempt.processes[number].wait()
        if not all(attempt.processes[n].returncode == -signal.SIGKILL for n in victims):
            return None
    record: dict[str, Any] = {"phase": watch.phase(), "victims": victims, "aimed": plan.phase}
    left = [n for n in everyone if n not in victims or how != signal.SIGKILL]
    if left:
        joined = "Gloo" in (attempt.errors[0].parent / "0.out").read_text(errors="replace")
        joined = joined or len(everyone) == 1
        # Before they have found each other they wait for five minutes: not here.
        ended = attempt.wait(_TOGETHER if joined else 3.0, left)
        if all(process.poll() == 0 for process in attempt.processes):
            return None  # a SIGTERM that came too late
        record |= {
            "joined": joined,
            "seconds": max(ended.values(), default=0.0),
            "waiting": len(left) - len(ended) if joined else 0,
            "said": sorted({last_words(attempt, n) for n in ended}),
        }
    return record


def last_words(attempt: Attempt, number: int) -> str:
    """Returns how a process that was left explained its end."""
    text = attempt.said(number)
    signs = ("Traceback", "stopped by SIGTERM", "another process is gone", "another task died")
    for sign in signs:
        if sign in text:
            return sign
    return f"status {attempt.processes[number].returncode}: {text[-300:]}"


def run_round(mode: str, number: int, folder: Path, seed: int, hit: Counter) -> dict[str, Any]:
    """Kills one run until it ends by itself; returns the record of all its kills.

    Raises RuntimeError if the command fails, or does not end; one that nobody killed and that JAX
    ended because the machine is too busy is started again, and counted.
    """
    setup, how = setup_of(mode, folder.parent), MODES[mode][1]
    known = undisturbed(mode, setup, folder.parent)
    run, rng = folder / f"run-{seed}-{number}", random.Random(f"{seed}/{mode}/{number}")
    if cold := rng.random() < _COLD:  # compiled programs that were half written are killed too
        setup = dataclasses.replace(setup, cache=folder / f"{run.name}-cache")
    kills, restarts = KillLog(folder / f"{run.name}-kills.jsonl"), 0
    while True:
        with started(setup, run) as attempt:
            watch = Watch(run, attempt.began, attempt.errors[0], known.last_step, known.total)
            killed, plan = None, None
            if len(kills.read()) < MOST:
                choose = functools.partial(plan_kill, rng, hit + kills.phases(), known)
                ahead = phases_ahead(run, known.last_step)
                if plan := await_kill(choose, ahead, watch, attempt.is_whole):
                    killed = end_now(rng, plan, watch, attempt, how)
            if killed is None:
                attempt.wait(LAST)
        if killed is not None:
            kills.add(killed)
            print(f"{mode} {number}: killed {killed}", flush=True)
        elif not (statuses := {process.returncode for process in attempt.processes} - {0}):
            break
        elif plan is None or statuses != {-signal.SIGKILL}:  # else a kill at a process's end
            ended = [n for n, each in enumerate(attempt.processes) if each.returncode]
            texts = [attempt.said(n) for n in ended]
            restarts += 1
            # Each of them: one that failed by itself would make the others wait.
            starved = all(any(words in text for words in _STARVED) for text in texts)
            if not starved or restarts > _RESTARTS:
                said = "\n".join(text[-2000:] for text in texts)
                raise RuntimeError(f"{run} did not resume:\n{said}")
            print(f"{mode} {number}: started again: the machine is too busy", flush=True)
    bits, names = differing_bits(folder / "whole", run)
    left = [str(p.relative_to(run)) for p in run.rglob("*") if ".part" in p.name]
    record = {"mode": mode, "round": number, "cold": cold, "kills": kills.read(), "bits": bits}
    record |= {"differing": count_bits(names), "names": names[:20], "left": left}
    record |= {"restarts": restarts}
    print(f"{mode} {number}: {record['differing']} of {bits} bits differ {names[:5]}", flush=True)
    if not names:
        for path in folder.glob(f"{run.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return record


class KillLog:
    """Keeps the kills of a run that has not ended, for a script that is stopped and resumed."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Returns the records so far."""
        return read_rounds(self.path)

    def phases(self) -> Counter:
        """Returns how often each phase was hit."""
        return Counter(kill["phase"] for kill in self.read())

    def add(self, kill: dict[str, Any]) -> None:
        """Appends a record."""
        with self.path.open("a") as file:
            file.write(json.dumps(kill) + "\n")


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """Returns the records of the rounds in a file, as far as they were written."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def count_kills(rounds: Iterable[dict[str, Any]]) -> int:
    """Returns the number of kills in some rounds."""
    return sum(len(record["kills"]) for record in rounds)


def run_kills(mode: str, kills: int, folder: Path, seed: int, run_one=run_round) -> None:
    """Runs rounds of a mode until as many kills are recorded in FOLDER/MODE.SEED.jsonl."""
    path = folder / f"{mode}.{seed}.jsonl"
    (folder / mode).mkdir(parents=True, exist_ok=True)
    while count_kills(rounds := read_rounds(path)) < kills:
        hit = Counter(kill["phase"] for record in rounds for kill in record["kills"])
        number = len(rounds)
        record = run_one(mode, number, folder / mode, seed, hit)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
