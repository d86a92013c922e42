"""The thread that runs the scheduler: the texts of all HTTP requests share batches."""

import asyncio
import dataclasses
import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, cast

from sweet_jax.exits.targets import Target
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.inference.predictions import Prediction, Text, make_prediction
from sweet_jax.inference.scheduler import Request
from sweet_jax.server.audit import Audit, note_answered

log = logging.getLogger(__name__)
_CACHED = 256  # operating points of HTTP requests, so that each is resolved once
_WAKE = object()


class QueueFullError(Exception):
    """Raised where more texts wait than the limit."""


class WorkerStoppedError(Exception):
    """Raised where the thread has ended."""


@dataclasses.dataclass(eq=False)
class Submission:
    """Holds the texts of one HTTP request, classified together at its operating point."""

    classifier: AdaptiveClassifier  # at that operating point
    texts: Sequence[Text]
    truncation: str | None = None  # see `encode_requests`
    # Of the scheduler's requests, one for each text; cancelled where nobody waits for them.
    future: Future[list[Request]] = dataclasses.field(default_factory=Future)
    requests: list[Request] = dataclasses.field(default_factory=list)  # once they are encoded
    pending: int = 0  # how many of them have not exited


class Worker:
    """Classifies submissions in one thread, their texts pooled as in throughput mode.

    It is never idle while a text waits: a full batch runs first, else the one that waits longest; a
    text that 16 batches were admitted after runs before anything else.

    Args:
      classifier: at the operating point of HTTP requests that name none.
      batch_size: texts computed at once, at most.
      limit: texts that may wait or be under way.
      audit: computes a share of the texts by all exits, while no text waits; None for none.

    Attributes:
      scheduler: that the thread runs.
      waiting: texts submitted and not yet classified.
      alive: whether it classifies.

    """

    def __init__(
        self,
        classifier: AdaptiveClassifier,
        batch_size: int,
        limit: int,
        audit: Audit | None = None,
    ):
        self.classifier, self.limit, self.audit = classifier, limit, audit
        self.waiting = 0
        self.alive = False
        # With all exits even if the server's own operating point is the full model: a request may
        # have another.
        self.scheduler = classifier.make_scheduler(batch_size, 16 * batch_size, full=False)
        # Beyond these, submissions stay in the inbox, where they can still be cancelled.
        self._enough = 4 * self.scheduler.slots
        # None ends the thread, _WAKE has it look at the audit.
        self._inbox: queue.SimpleQueue[Submission | object | None] = queue.SimpleQueue()
        self._points: dict[Any, AdaptiveClassifier] = {}  # by policy and target, the newest last
        self._lock = threading.Lock()  # of what several threads read and write
        self._submissions: dict[int, Submission] = {}  # by number of the scheduler's request
        self._admitted = 0  # the scheduler's requests so far
        self._thread = threading.Thread(target=self._loop, name="sweet_jax.worker", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self.alive = True
        self._thread.start()

    def stop(self) -> None:
        """Returns when all that was submitted is classified, and the audit's log is closed."""
        self._inbox.put(None)
        self._thread.join()
        if self.audit is not None:
            self.audit.close()

    def wake(self) -> None:
        """Has the thread, which may wait for texts, look at the audit."""
        self._inbox.put(_WAKE)

    def known(self, policy: str | None, target: Mapping[str, float]) -> AdaptiveClassifier | None:
        """Returns the classifier at a policy and target that was asked for lately, else None."""
        if policy is None and not target:
            return self.classifier
        key = (policy, *sorted(target.items()))
        with self._lock:
            found = self._points.pop(key, None)
            if found is not None:
                self._points[key] = found
        return found

    def at(self, policy: str | None, target: Mapping[str, float]) -> AdaptiveClassifier:
        """Returns the classifier at an HTTP request's policy and target.

        Raises UserError, see `AdaptiveClassifier`.
        """
        if (found := self.known(policy, target)) is None:
            found = self.classifier.at(policy, **cast("Target", target))
            with self._lock:
                self._points[policy, *sorted(target.items())] = found
                while len(self._points) > _CACHED:
                    del self._points[next(iter(self._points))]
        return found

    async def predict(
        self, classifier: AdaptiveClassifier, texts: Sequence[Text], truncation: str | None = None
    ) -> list[tuple[Prediction, Request]]:
        """Returns the prediction of each text, in order, with the scheduler's request.

        Raises QueueFullError where too many wait, WorkerStoppedError where none will be classified,
        UserError see `encode_requests`. When it is cancelled before its texts are admitted to the
        scheduler, they are dropped.
        """
        with self._lock:
            if not self.alive:
                raise WorkerStoppedError
            if self.waiting + len(texts) > self.limit:
                raise QueueFullError
            self.waiting += len(texts)
            submission = Submission(classifier, texts, truncation)
            self._inbox.put(submission)
        requests = await asyncio.wrap_future(submission.future)
        if self.audit is not None and classifier is self.classifier:
            note_answered(zip(requests, texts, strict=True))
        return [(make_prediction(classifier.model, r), r) for r in requests]

    def _loop(self) -> None:
        try:
            self._serve()
        except Exception:  # of the device: nothing can be computed any more
            log.exception("the worker stopped")
            with self._lock:  # after which `predict` refuses
                self.alive = False
            for submission in set(self._submissions.values()):
                self._settle(submission, WorkerStoppedError())
            while not self._inbox.empty():
                unread = self._inbox.get()
                if isinstance(unread, Submission) and self._claim(unread):
                    self._settle(unread, WorkerStoppedError())

    def _serve(self) -> None:
        running = True
        while running or len(self.scheduler):
            # Blocks only when there is nothing to compute.
            while running and (not len(self.scheduler) or not self._inbox.empty()):
                if len(self.scheduler) >= self._enough:
                    break
                if self.audit is not None and self.audit.waiting and self._inbox.empty():
                    self.audit.step()
                    continue
                submission = self._inbox.get()
                if isinstance(submission, Submission):
                    self._admit(submission)
                elif submission is None:
                    running = False
            for request in self.scheduler.step():
                submission = self._submissions.pop(request.number)
                submission.pending -= 1
                if not submission.pending:
                    self._settle(submission)

    def _admit(self, submission: Submission) -> None:
        if not self._claim(submission):
            return
        try:
            submission.requests = submission.classifier.encode(
                submission.texts, truncation=submission.truncation
            )
        except Exception as error:  # one submission's texts must not end the others'
            self._settle(submission, error)
            return
        submission.pending = len(submission.requests)
        for request in submission.requests:
            # Numbered within the submission until here, for its errors.
            request.number += self._admitted
            self._submissions[request.number] = submission
            self.scheduler.admit(request)
        self._admitted += len(submission.requests)

    def _claim(self, submission: Submission) -> bool:
        """Returns whether anybody waits for it, who cannot cancel it any more; else drops it."""
        wanted = submission.future.set_running_or_notify_cancel()
        if not wanted:
            self._forget(submission)
        return wanted

    def _settle(self, submission: Submission, error: Exception | None = None) -> None:
        self._forget(submission)
        if error is not None:
            submission.future.set_exception(error)
        else:
            submission.future.set_result(submission.requests)

    def _forget(self, submission: Submission) -> None:
        with self._lock:
            self.waiting -= len(submission.texts)
