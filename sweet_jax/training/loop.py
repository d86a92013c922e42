"""The loop around the compiled step: logging, checkpoints, and a clean stop on SIGTERM.

Shape letters: R replica, E exit.
"""

import collections
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from sweet_jax.distributed import PreemptedError, is_primary, preemption_requested
from sweet_jax.training.expected_time import ExpectedTime
from sweet_jax.training.job import TrainingJob
from sweet_jax.training.losses import StepMetrics
from sweet_jax.training.metrics import MetricsLog
from sweet_jax.training.parallel import ExecutionPlan
from sweet_jax.training.trackers import open_tracker

log = logging.getLogger(__name__)


class StepRange(NamedTuple):
    """Holds the range of steps to take, and the intervals of what happens between them."""

    start: int
    stop: int
    epoch: int  # steps per epoch
    every: int  # steps between two checkpoints
    rows: np.ndarray  # training rows of each step over all replicas, int [stop]
    check: int = 0  # steps between two evaluations on tuning rows; 0 without evaluations
    rates: np.ndarray | None = None  # learning rates, float32 [steps of the whole training, R]


class StepLog:
    """Logs the metrics of each step a few steps later, so that no device waits for the log.

    Metrics are written to `metrics`, which is None in a process that writes no log.
    """

    def __init__(
        self,
        training: str,
        exits: Sequence[int],
        steps: StepRange,
        metrics: MetricsLog | None,
        bar: tqdm,
        expected: ExpectedTime,
    ):
        self.steps, self.metrics, self._expected = steps, metrics, expected
        self._training, self._exits, self._bar = training, exits, bar
        self._late: collections.deque[tuple[int, int, list[StepMetrics]]] = collections.deque()
        self._diverged: set[tuple[int, int]] = set()

    def add(self, number: int, length: int, parts: list[StepMetrics], lag: int) -> None:
        """Adds the metrics of a step, and logs those of steps at least `lag` steps earlier."""
        self._late.append((number, length, parts))
        self._expected.dispatched(length, lag)
        self._write(left=lag)

    def flush(self) -> None:
        """Logs all steps added so far, and flushes the log."""
        self._write(left=0)
        if self.metrics is not None:
            self.metrics.flush()

    def _write(self, left: int) -> None:
        while len(self._late) > left:
            number, length, parts = self._late.popleft()
            fetched = jax.device_get(parts)
            if expectation := self._expected.done(length):
                with self._bar.external_write_mode(sys.stdout):  # keeps the line out of the bar
                    log.info(expectation)
            self._bar.update(int(self.steps.rows[number]))
            if self.metrics is None:
                continue
            values = jax.tree.map(lambda *x: np.concatenate(x, axis=-1), *fetched)  # [R, E]
            if values.loss.ndim == 1:  # a single replica has no axis R
                values = jax.tree.map(lambda x: x[None], values)
            self._warn_of_divergence(number, values.loss)
            self.metrics.add(number, number // self.steps.epoch, length, values)
            if self.steps.rates is not None:
                self.metrics.add_rates(number, self.steps.rates[number].tolist())

    def _warn_of_divergence(self, number: int, loss: np.ndarray) -> None:
        """Warns once about each replica and exit whose loss [R, E] is not finite."""
        for replica, index in np.argwhere(~np.isfinite(loss)).tolist():
            if (replica, index) not in self._diverged:
                where = (replica, self._exits[index], self._training, number)
                log.warning("replica %d, exit %d of %s: the loss is not finite at step %d", *where)
            self._diverged.add((replica, index))


@contextlib.contextmanager
def open_step_log(job: TrainingJob, steps: StepRange) -> Iterator[StepLog]:
    """Opens the log and the progress bar of a training; only the primary process writes them."""
    training, exits = job.model.name, job.model.exits
    with contextlib.ExitStack() as stack:
        metrics = None
        if is_primary():
            # The folder of a learning-rate search is removed, so no remote tracker should log it.
            name = "tensorboard" if job.short else job.config.log_to
            tracker = open_tracker(name, job.workdir, training, steps.start)
            file = MetricsLog(job.workdir, training, steps.start, exits, tracker)
            metrics = stack.enter_context(contextlib.closing(file))
        bar = tqdm(
            desc=_bar_title(job),
            total=int(steps.rows.sum()),
            initial=int(steps.rows[: steps.start].sum()),
            unit=" rows",
            disable=not is_primary(),
        )
        following = None if job.following is None else job.following / job.step_work
        expected = ExpectedTime(steps.stop - steps.start, following)
        yield StepLog(training, exits, steps, metrics, stack.enter_context(bar), expected)


def _bar_title(job: TrainingJob) -> str:
    """Returns the title of a training's progress bar."""
    if job.short:
        rates = ", ".join(f"{rate:g}" for rate in job.config.learning_rates)
        return f"learning rate{'s' * (len(job.config.learning_rates) > 1)} {rates}"
    exits = job.model.exits
    return f"training, {len(exits)} exits" if len(exits) > 1 else f"training, exit {exits[0]}"


def run_steps(
    plan: ExecutionPlan,
    state: Any,
    batch: Callable[[int], tuple[Any, int]],
    step_log: StepLog,
    save: Callable[[int, Any], None],
    evaluate: Callable[[int, Any], None] | None = None,
) -> Any:
    """Takes the steps of a training; returns the state after the last one.

    Args:
      plan: plan that executes each step.
      state: state before the first step, as the plan's step takes it.
      batch: function of a step's number that returns (batch on the devices, its length).
      step_log: log of the metrics; its `steps` are the steps to take.
      save: function of (number of steps taken, state) that saves a checkpoint.
      evaluate: function of (number of steps taken, state) that evaluates the state, called every
        `check` steps and after the last one; None for no evaluation.

    Raises:
      PreemptedError: if SIGTERM was received; the state is saved first.

    """
    steps = step_log.steps
    with stop_requested() as stops_now:
        for number in range(steps.start, steps.stop):
            inputs, length = batch(number)
            state, values = plan.step(number, state, inputs)
            step_log.add(number, length, values, plan.lag)
            last, stopped = number + 1 == steps.stop, stops_now()
            if evaluate is not None and (last or (number + 1) % steps.check == 0):
                step_log.flush()  # an evaluation is logged after the steps before it
                evaluate(number + 1, state)
            if last or (number + 1) % steps.every == 0 or stopped:
                step_log.flush()
                save(number + 1, state)
            if stopped:
                raise PreemptedError(f"stopped by SIGTERM after step {number + 1} of {steps.stop}")
    return state


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether to stop, to be called after every step.

    It returns True once SIGTERM has been received. With several processes, JAX handles the signal,
    and all of them stop after the same step, whichever of them received it.
    """
    if jax.process_count() > 1:
        yield preemption_requested
        return
    with termination_event() as event:
        yield event.is_set


@contextlib.contextmanager
def termination_event(
    signals: Sequence[signal.Signals] = (signal.SIGTERM,),
) -> Iterator[threading.Event]:
    """Yields an event that the signals set, instead of ending the process at once.

    Only the main thread may handle signals: in any other thread, the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = [signal.signal(number, lambda *_: event.set()) for number in signals]
    try:
        yield event
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
