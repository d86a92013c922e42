"""An estimate of the training time, made after the first few steps."""

import time
from collections.abc import Callable

_TIMED = 5  # number of timed steps, none of which waits for compilation


class ExpectedTime:
    """Times the first steps of a training and estimates once how long the run will train.

    A step is timed only if its length, and the length of the step dispatched while it ran, occurred
    before; otherwise it may have waited for compilation. The time of a step is assumed to be
    proportional to its number of tokens.

    Args:
      steps: number of steps left in this training.
      following: work of the trainings that follow, in steps of this one; None means no estimate.
      clock: function that returns the time in seconds.

    """

    def __init__(
        self, steps: int, following: float | None, clock: Callable[[], float] = time.perf_counter
    ):
        self._steps, self._following, self._clock = steps, following, clock
        self._seen: set[int] = set()  # lengths that occurred so far
        self._lengths: list[int] = []  # lengths of the steps so far
        self._skip = 0  # number of the next steps that are not timed
        self._last: float | None = None
        self._count, self._seconds, self._tokens = 0, 0.0, 0
        self._said = following is None

    def dispatched(self, length: int, lag: int) -> None:
        """Records that a step with rows of `length` tokens was dispatched.

        Up to `lag` further steps may be dispatched before it is done.
        """
        if length not in self._seen:
            self._skip = lag + 2
        self._seen.add(length)
        self._lengths.append(length)

    def done(self, length: int) -> str:
        """Records that the next step is done; returns the estimate as text once it is known.

        Returns "" at all other steps.
        """
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
        duration = f"{whole / 60:.1f} minutes" if whole >= 60 else f"{whole:.0f} seconds"
        return (
            f"expected training time: about {duration}, at {step:.2g} s per step (compilation and "
            "evaluation not included)"
        )
