"""How long a training will take, said after a few of its steps."""

import time
from collections.abc import Callable

_TIMED = 5  # steps, none of which waits for a program to compile


class ExpectedTime:
    """Times the first steps of a training, and says once how long the run's trainings will take.

    A step is counted where its length, and that of the step dispatched while it ran, had been seen
    before: else it may have waited for a program to compile. Time is taken as proportional to the
    tokens of a step.

    Args:
      steps: of this training, from now on.
      following: what the trainings that follow take, in steps of this one; None: nothing is said.
      clock: seconds.

    """

    def __init__(
        self, steps: int, following: float | None, clock: Callable[[], float] = time.perf_counter
    ):
        self._steps, self._following, self._clock = steps, following, clock
        self._seen: set[int] = set()  # lengths
        self._lengths: list[int] = []  # of the steps so far
        self._skip = 0  # steps to come that are not counted
        self._last: float | None = None
        self._count, self._seconds, self._tokens = 0, 0.0, 0
        self._said = following is None

    def dispatched(self, length: int, lag: int) -> None:
        """Notes that a step of so many tokens was dispatched, up to `lag` before it is done."""
        if length not in self._seen:
            self._skip = lag + 2
        self._seen.add(length)
        self._lengths.append(length)

    def done(self, length: int) -> str:
        """Notes that the next step, of so many tokens, is done; returns what there is to say."""
        now = self._clock()
        if self._said:
            return ""
        self._steps -= 1
        if self._skip or self._last is None:
            self._skip = max(0, self._skip - 1)
        else:
            self._count += 1
            self._seconds += now - self._last
            self._tokens += length
        self._last = now
        self._said = self._count == _TIMED
        return self._estimate() if self._said else ""

    def _estimate(self) -> str:
        step = self._seconds / self._tokens * sum(self._lengths) / len(self._lengths)
        whole = step * (self._steps + (self._following or 0))
        shown = f"{whole / 60:.1f} minutes" if whole >= 60 else f"{whole:.0f} seconds"
        return (
            f"expected: about {shown} of training, at {step:.2g} s a step (compiling and "
            "evaluating not counted)"
        )
