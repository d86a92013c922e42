"""Plans at which moment of a run to kill it, and waits for that moment."""

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.faults.phases import PHASES, Watch, phase_order
from experiments.faults.reference import Reference

_ANY_TIME = 0.4  # share of the kills at any time of a run
_UNKNOWN = (0.2, 0.0)  # stay in a phase that was not seen in the undisturbed run


@dataclasses.dataclass(frozen=True)
class Plan:
    """Describes a moment of a run.

    Attributes:
      phase: phase in which it lies.
      delay: seconds after the phase is first seen; for the start-up, after the start.
      not_before: seconds after the start before which the phase does not count.

    """

    phase: str
    delay: float
    not_before: float = 0.0


def plan_kill(
    rng: random.Random, hits: Counter, reference: Reference, phases: Sequence[str]
) -> Plan:
    """Chooses a moment: at any time of the run, or in the phase that was hit least.

    Args:
      rng: generator of random numbers.
      hits: number of earlier kills in each phase.
      reference: durations of the phases, in proportion to which a time of the run is chosen.
      phases: phases to choose from.

    """
    stays = [reference.phases.get(phase, _UNKNOWN)[0] for phase in phases]
    least = min(hits[phase] for phase in phases)
    if rng.random() < _ANY_TIME:
        phase = rng.choices(phases, stays)[0]
    else:
        phase = rng.choice([phase for phase in phases if hits[phase] == least])
    stay, last = reference.phases.get(phase, _UNKNOWN)
    # Otherwise always the first checkpoint of an attempt would be hit, in the search.
    not_before = rng.uniform(0, 0.7 * last) if phase == "checkpoint" else 0.0
    return Plan(phase, rng.uniform(0, stay), not_before)


def phases_ahead(run: Path, last_step: int) -> list[str]:
    """Returns the phases that an attempt at a run will go through; last_step is of a whole run."""
    finished = set()
    if (run / "probe.npz").exists():
        finished.add("probe")
    if (run / "rate_search.json").exists():
        finished.add("rate search")
    if (run / "checkpoints" / "exits_1_2_3" / f"{last_step}.digest.json").exists():
        finished |= {"compile", "training", "checkpoint"}
    return [phase for phase in PHASES if phase not in finished]


def wait_for_moment(plan: Plan, watch: Watch, is_alive: Callable[[], bool]) -> bool:
    """Waits for the moment of a plan; returns False if the run has passed it or has ended."""
    seen = plan.phase == "start-up"
    until = watch.start + (plan.delay if seen else plan.not_before)
    while is_alive():
        now = time.time()
        if seen and now >= until:
            return True
        if not seen:
            phase = watch.phase()
            if phase == plan.phase and now >= until:
                seen, until = True, now + plan.delay
            elif phase_order(phase) > phase_order(plan.phase):
                return False
        time.sleep(min(0.01, max(0.0, until - now)) or 0.01)
    return False


def wait_for_plan(
    choose: Callable[[Sequence[str]], Plan],
    phases: Sequence[str],
    watch: Watch,
    is_alive: Callable[[], bool],
) -> Plan | None:
    """Waits for the moment of a plan, and chooses another plan whenever the moment was missed.

    Args:
      choose: makes a plan from the phases that are still ahead.
      phases: phases that are ahead.
      watch: watch of the attempt.
      is_alive: returns whether the attempt is still running.

    Returns:
      The plan whose moment has come, or None if the run has ended.

    """
    while phases and is_alive():
        plan = choose(phases)
        if wait_for_moment(plan, watch, is_alive):
            return plan
        now = phase_order(watch.phase())
        phases = [phase for phase in phases if phase_order(phase) >= now]
    return None
