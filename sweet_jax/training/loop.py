"""The loop around the compiled step: the log, checkpoints, and the end by SIGTERM.

Shape letters: R replica, E exit.
"""

import collections
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from sweet_jax.processes import StoppedError
from sweet_jax.training.losses import Metrics
from sweet_jax.training.metrics import MetricsLog

log = logging.getLogger(__name__)


def take_steps(
    step: Callable[[int, Any, Any], tuple[Any, list[Metrics]]],
    state: Any,
    batch: Callable[[int], tuple[Any, int]],
    steps: range,
    epoch: int,
    every: int,
    lag: int,
    metrics: MetricsLog | None,
    save: Callable[[int, Any], None],
    bar: tqdm,
) -> Any:
    """Takes the steps; metrics are read `lag` steps late, so that no device waits for them.

    `step` gives the metrics of all exits, or of groups of exits one after the other; `batch` gives
    a batch and its length; the total of `bar` is that of all steps from 0. Without `metrics`, as in
    all processes but the first, nothing is logged.
    """
    late: collections.deque[tuple[int, int, list[Metrics]]] = collections.deque()
    diverged: set[tuple[int, int]] = set()

    def log_late(left: int) -> None:
        while len(late) > left:
            number, length, parts = late.popleft()
            each = jax.device_get(parts)
            bar.update(bar.total // steps.stop)
            if metrics is None:
                continue
            values = jax.tree.map(lambda *x: np.concatenate(x, axis=-1), *each)  # [R, E]
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

    with stop_asked() as stops_after:
        for number in steps:
            inputs, length = batch(number)
            state, values = step(number, state, inputs)
            late.append((number, length, values))
            log_late(left=lag)
            last, stopped = number + 1 == steps.stop, stops_after(number)
            if last or (number + 1) % every == 0 or stopped:
                log_late(left=0)
                if metrics is not None:
                    metrics.flush()
                save(number + 1, state)
            if stopped:
                raise StoppedError(f"stopped by SIGTERM after step {number + 1} of {steps.stop}")
    return state


@contextlib.contextmanager
def stop_asked() -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step, as SIGTERM asks; to be asked after every step.

    Several processes stop after the same step, whichever of them got the signal, which JAX listens
    to then.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    with termination() as event:
        yield lambda _: event.is_set()


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
