"""The loop around the compiled step: the log, checkpoints, and the end by SIGTERM.

Shape letters: R replica, E exit.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from tqdm import tqdm

from sweet_jax.training.checkpoint import Checkpoints
from sweet_jax.training.losses import Metrics
from sweet_jax.training.metrics import MetricsLog
from sweet_jax.training.step import State

log = logging.getLogger(__name__)


class StoppedError(Exception):
    """SIGTERM came; the state was saved."""


def take_steps(
    step: Callable[[int, State, dict], tuple[State, Metrics]],
    state: State,
    batch: Callable[[int], dict[str, jax.Array]],
    steps: range,
    epoch: int,
    every: int,
    metrics: MetricsLog,
    checkpoints: Checkpoints,
    bar: tqdm,
) -> State:
    """Takes the steps; metrics are read one step late, so that the device never waits for them."""
    late: tuple[int, int, Metrics] | None = None
    diverged: set[tuple[int, int]] = set()

    def log_late() -> None:
        if late is not None:
            number, length, values = late
            values = jax.device_get(values)
            if values.loss.ndim == 1:  # a single replica's, without the axis R
                values = jax.tree.map(lambda x: x[None], values)
            for replica, index in np.argwhere(~np.isfinite(values.loss)).tolist():
                if (replica, index) not in diverged:
                    log.warning(
                        "replica %d, exit %d of %s: the loss is not finite at step %d",
                        replica, index + 1, bar.desc, number,
                    )  # fmt: skip
                diverged.add((replica, index))
            metrics.add(number, number // epoch, length, values)
            bar.update(len(values.loss) * rows)

    with termination() as terminated:
        for number in steps:
            inputs = batch(number)
            rows, length = inputs["mask"].shape[-2:]
            state, values = step(number, state, inputs)
            log_late()
            late = (number, length, values)
            last = number + 1 == steps.stop
            if last or (number + 1) % every == 0 or terminated.is_set():
                log_late()
                late = None
                metrics.flush()
                checkpoints.save(number + 1, state)
            if terminated.is_set():
                raise StoppedError(f"stopped by SIGTERM after step {number + 1} of {steps.stop}")
    return state


@contextlib.contextmanager
def termination(
    signals: Sequence[signal.Signals] = (signal.SIGTERM,),
) -> Iterator[threading.Event]:
    """An event that the signals set, in place of ending the process at once."""
    event = threading.Event()
    before = [signal.signal(number, lambda *_: event.set()) for number in signals]
    try:
        yield event
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
