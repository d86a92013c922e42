"""The loop around the compiled step: the log, checkpoints, and the end by SIGTERM.

Shape letters: R replica, E exit.
"""

import collections
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from sweet_jax.distributed import PreemptedError, is_primary, preemption_requested
from sweet_jax.training.losses import StepMetrics
from sweet_jax.training.metrics import MetricsLog
from sweet_jax.training.parallel import ExecutionPlan

log = logging.getLogger(__name__)


class StepRange(NamedTuple):
    """The steps of one training that are taken now."""

    start: int
    stop: int
    epoch: int  # steps in one
    every: int  # steps from checkpoint to checkpoint
    check: int = 0  # steps between two evaluations on tuning rows; 0 for none


@contextlib.contextmanager
def open_log_and_progress(
    workdir: Path, training: str, exits: Sequence[int], span: StepRange, examples: int
) -> Iterator[tuple[MetricsLog | None, tqdm]]:
    """The log and the progress bar of a training, those of the first process only.

    examples: rows of a step, of all replicas.
    """
    with contextlib.ExitStack() as stack:
        metrics = None
        if is_primary():
            log_of = MetricsLog(workdir, training, span.start, exits)
            metrics = stack.enter_context(contextlib.closing(log_of))
        bar = tqdm(
            desc=training,
            total=span.stop * examples,
            initial=span.start * examples,
            unit=" examples",
            disable=not is_primary(),
        )
        yield metrics, stack.enter_context(bar)


def run_steps(
    plan: ExecutionPlan,
    state: Any,
    batch: Callable[[int], tuple[Any, int]],
    span: StepRange,
    metrics: MetricsLog | None,
    bar: tqdm,
    exits: Sequence[int],
    save: Callable[[int, Any], None],
    evaluate: Callable[[int, Any], bool] | None = None,
) -> Any:
    """Takes the steps; metrics are read some steps late, so that no device waits for them.

    Args:
      plan: what a step is, and where.
      state: what the plan's step takes.
      batch: gives the batch of a step on the devices, and its length.
      span: which steps.
      metrics: the log, None for none.
      bar: its total is that of all steps from 0.
      exits: layer numbers, for what is said of an exit.
      save: saves a state as of a step.
      evaluate: evaluates a state as of a step, every `span.check` steps and after the last one;
        returns whether training ends with it.

    Returns:
      The state after the last step.

    Raises:
      StoppedError: SIGTERM came; the state was saved.

    """
    late: collections.deque[tuple[int, int, list[StepMetrics]]] = collections.deque()
    diverged: set[tuple[int, int]] = set()

    def log_late(left: int) -> None:
        while len(late) > left:
            number, length, parts = late.popleft()
            each = jax.device_get(parts)
            bar.update(bar.total // span.stop)
            if metrics is None:
                continue
            values = jax.tree.map(lambda *x: np.concatenate(x, axis=-1), *each)  # [R, E]
            if values.loss.ndim == 1:  # a single replica's, without the axis R
                values = jax.tree.map(lambda x: x[None], values)
            for replica, index in np.argwhere(~np.isfinite(values.loss)).tolist():
                if (replica, index) not in diverged:
                    log.warning(
                        "replica %d, exit %d of %s: the loss is not finite at step %d",
                        replica, exits[index], bar.desc, number,
                    )  # fmt: skip
                diverged.add((replica, index))
            metrics.add(number, number // span.epoch, length, values)

    with stop_requested() as stops_now:
        for number in range(span.start, span.stop):
            inputs, length = batch(number)
            state, values = plan.step(number, state, inputs)
            late.append((number, length, values))
            log_late(left=plan.lag)
            last, stopped = number + 1 == span.stop, stops_now()
            if evaluate is not None and (last or (number + 1) % span.check == 0):
                last = evaluate(number + 1, state) or last
            if last or (number + 1) % span.every == 0 or stopped:
                log_late(left=0)
                if metrics is not None:
                    metrics.flush()
                save(number + 1, state)
            if stopped:
                raise PreemptedError(f"stopped by SIGTERM after step {number + 1} of {span.stop}")
            if last:
                break
    return state


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Whether to stop after a step, as SIGTERM asks; to be asked after every step.

    Several processes stop after the same step, whichever of them got the signal, which JAX listens
    to then.
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
    """An event that the signals set, in place of ending the process at once."""
    event = threading.Event()
    before = [signal.signal(number, lambda *_: event.set()) for number in signals]
    try:
        yield event
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
