"""The thread that computes what requests ask for: their texts share batches."""

import asyncio
import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence

from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.inference.predictions import Prediction, Text
from sweet_jax.inference.scheduler import Request

log = logging.getLogger(__name__)
_DIALS_KEPT = 256  # of requests, so that their thresholds are not looked up each time


class QueueFullError(Exception):
    """More texts wait than may."""


class WorkerStoppedError(Exception):
    """The thread has ended."""


@dataclasses.dataclass(eq=False)
class PendingRequest:
    """Texts that are answered together."""

    classifier: AdaptiveClassifier  # at the request's dial
    texts: Sequence[Text]
    done: Callable[["PendingRequest"], None]  # called by the thread when all are answered
    rows: list[Request] = dataclasses.field(default_factory=list)
    left: int = 0  # texts not yet answered
    error: Exception | None = None
    dropped: bool = False  # nobody waits for it any more


class Worker:
    """Answers requests in one thread, their texts pooled into batches as throughput mode does.

    It is never idle while a text waits: what is full runs first, else what has waited longest; what
    has seen 16 batches go by runs before anything else.

    Args:
      classifier: at the dial of requests that name none.
      batch_size: texts computed at once, at most.
      limit: texts that may wait or be under way.

    Attributes:
      waiting: texts taken in and not yet answered.
      alive: whether it answers.

    """

    def __init__(self, classifier: AdaptiveClassifier, batch_size: int, limit: int):
        self.classifier, self.limit = classifier, limit
        self.waiting = 0
        self.alive = False
        # Of all exits even if the server's own dial is the full model: a request may have another.
        self._flow = classifier.flow(batch_size, 16 * batch_size, full=False)
        # Beyond these, requests stay in the inbox, where they can still be dropped.
        self._enough = 4 * self._flow.slots
        self._inbox: queue.SimpleQueue[PendingRequest | None] = queue.SimpleQueue()
        self._dials: dict[tuple, AdaptiveClassifier] = {}
        self._lock = threading.Lock()  # of what several threads look at
        self._owners: dict[int, PendingRequest] = {}  # by number of the row
        self._taken = 0  # rows so far
        self._thread = threading.Thread(target=self._loop, name="sweet_jax.worker", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self.alive = True
        self._thread.start()

    def stop(self) -> None:
        """Returns when all that was taken in is answered."""
        self._inbox.put(None)
        self._thread.join()

    def at(self, policy: str | None, dial: Mapping[str, float]) -> AdaptiveClassifier:
        """The classifier at a request's policy and dial. Raises UserError, see its constructor."""
        if policy is None and not dial:
            return self.classifier
        key = (policy, *sorted(dial.items()))
        with self._lock:
            found = self._dials.get(key)
        if found is None:
            found = self.classifier.at(policy, **dial)  # a certificate takes a while
            with self._lock:
                self._dials[key] = found
                if len(self._dials) > _DIALS_KEPT:
                    del self._dials[next(iter(self._dials))]
        return found

    async def answer(
        self, classifier: AdaptiveClassifier, texts: Sequence[Text]
    ) -> list[tuple[Prediction, Request]]:
        """The answers to texts, in order, and their rows.

        Raises FullError where too many wait, StoppedError where none will be answered, UserError
        for what is no text. When it is cancelled before they are begun, they are dropped.
        """
        with self._lock:
            if not self.alive:
                raise WorkerStoppedError
            if self.waiting + len(texts) > self.limit:
                raise QueueFullError
            self.waiting += len(texts)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def done(request: PendingRequest) -> None:
            def settle() -> None:
                if future.done():
                    return
                if request.error is not None:
                    future.set_exception(request.error)
                else:
                    future.set_result(None)

            loop.call_soon_threadsafe(settle)

        request = PendingRequest(classifier, texts, done)
        self._inbox.put(request)
        try:
            await future
        finally:
            request.dropped = True
        return [(classifier.answer(row), row) for row in request.rows]

    def _loop(self) -> None:
        try:
            self._serve()
        except Exception:  # of the device: nothing can be computed any more
            log.exception("the worker stopped")
            with self._lock:  # after which `answer` refuses
                self.alive = False
            lost = list({id(r): r for r in self._owners.values()}.values())
            while not self._inbox.empty():
                request = self._inbox.get()
                lost += [request] if request is not None else []
            for request in lost:
                request.error = WorkerStoppedError()
                self._settle(request)

    def _serve(self) -> None:
        running = True
        while running or len(self._flow):
            # Blocks only when there is nothing to compute.
            while running and (not len(self._flow) or not self._inbox.empty()):
                if len(self._flow) >= self._enough:
                    break
                request = self._inbox.get()
                if request is None:
                    running = False
                else:
                    self._take(request)
            for row in self._flow.step():
                request = self._owners.pop(row.number)
                request.left -= 1
                if not request.left:
                    self._settle(request)

    def _take(self, request: PendingRequest) -> None:
        if request.dropped:
            self._settle(request)
            return
        try:
            request.rows = request.classifier.encode(request.texts)
        except Exception as error:  # one request's texts must not end the others'
            request.error = error
            self._settle(request)
            return
        request.left = len(request.rows)
        for row in request.rows:
            row.number += self._taken  # numbered within the request until here, for its errors
            self._owners[row.number] = request
            self._flow.admit(row)
        self._taken += len(request.rows)

    def _settle(self, request: PendingRequest) -> None:
        with self._lock:
            self.waiting -= len(request.texts)
        request.done(request)
