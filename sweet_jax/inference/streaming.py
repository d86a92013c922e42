"""Streams texts through a scheduler, in order and with bounded memory."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sweet_jax.inference.predictions import InvalidRow, Text
from sweet_jax.inference.scheduler import Request, Scheduler


def stream_in_order(
    scheduler: Scheduler,
    texts: Iterable[Text | InvalidRow],
    encode: Callable[[Sequence[Text | InvalidRow], int], list[Request]],
    *,
    drain: bool,
) -> Iterator[Request | InvalidRow]:
    """Yields the request of each text once it has exited, in the order of the texts.

    Args:
      scheduler: a scheduler without pending requests.
      texts: texts, read batch_size at a time; an InvalidRow is yielded in its place.
      encode: function from (texts, number of the first text) to requests.
      drain: whether each batch_size texts exit before more are read; otherwise, batches run as they
        fill up.

    """
    ready: dict[int, Request | InvalidRow] = {}
    yielded = read = 0
    for chunk in _chunks(texts, scheduler.batch_size):
        for number, text in enumerate(chunk, start=read):
            if isinstance(text, InvalidRow):
                ready[number] = text
                scheduler.count_skipped()
        for request in encode(chunk, read):
            scheduler.admit(request)
        read += len(chunk)
        exited = scheduler.drain() if drain else scheduler.run_ready()
        ready |= {request.number: request for request in exited}
        while yielded in ready:
            yield ready.pop(yielded)
            yielded += 1
    ready |= {request.number: request for request in scheduler.drain()}
    for number in range(yielded, read):
        yield ready.pop(number)


def _chunks(texts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(texts)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk
