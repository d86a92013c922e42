"""Times the sides of a comparison in turns, so that other load on the machine affects all of them.

Imports no jax: some benchmarks choose their cores before they import it.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any


def time_in_turns(
    sides: Sequence[Callable[[], Any]], rounds: int, calls: int = 1, *, skipped: int = 0
) -> list[list[float]]:
    """Returns the seconds of each side's timed calls: for each side, `rounds * calls` numbers.

    Args:
      sides: functions that return once their work is done.
      rounds: number of turns of each side.
      calls: timed calls per turn.
      skipped: calls at the start of each turn that are not timed, because the side before has
        replaced the contents of the caches.

    """
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, own in zip(sides, seconds, strict=True):
            for _ in range(skipped):
                side()
            for _ in range(calls):
                start = time.perf_counter()
                side()
                own.append(time.perf_counter() - start)
    return seconds


def choose_clock() -> Callable[[], float]:
    """Returns the clock of processor time if this process may use one core, else the wall clock.

    Other programs disturb processor time less, but on several cores it is not the time one waits.
    """
    return time.process_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter
