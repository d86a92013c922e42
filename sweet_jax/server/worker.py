"""The thread that runs the scheduler, where the texts of all HTTP requests share batches."""

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
_CACHED = 256  # number of operating points of HTTP requests that are kept once resolved
_WAKE = object()


class QueueFullError(Exception):
    """Raised if more texts would wait than the limit allows."""


class WorkerStoppedError(Exception):
    """Raised if the thread has ended."""


@dataclasses.dataclass(eq=False)
class Submission:
    """Holds the texts of one HTTP request, which are classified at the same operating point."""

    classifier: AdaptiveClassifier  # classifier at that operating point
    texts: Sequence[Text]
    truncation: str | None = None  # see `encode_requests`
    # Resolves to the scheduler's requests, one for each text; canceled if nobody waits for them.
    future: Future[list[Request]] = dataclasses.field(default_factory=Future)
    requests: list[Request] = dataclasses.field(default_factory=list)  # set once encoded
    pending: int = 0  # number of requests that have not exited


class Worker:
    """Classifies submissions in one thread; their texts share batches as in throughput mode.

    The thread is never idle while a text waits: it runs a full batch if there is one, or else the
    batch that has waited longest. A text after which more than 16 batches of texts were admitted
    runs before anything else.

    Args:
      classifier: classifier at the operating point of HTTP requests that do not set one.
      batch_size: maximum number of texts computed at once.
      limit: maximum number of texts that wait or are being computed.
      audit: audit that computes a share of the texts by all exits while no text waits; None for no
        audit.

    Attributes:
      scheduler: scheduler that the thread runs.
      waiting: number of texts submitted and not yet classified.
      alive: whether the thread classifies texts.

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
        # full=False even if the server's own operating point is the full model, since a request may
        # set another.
        self.scheduler = classifier.make_scheduler(batch_size, 16 * batch_size, full=False)
        # With this many texts in the scheduler, submissions stay in the inbox, where they can still
        # be canceled.
        self._enough = 4 * self.scheduler.slots
        # None ends the thread; _WAKE makes it check the audit.
        self._inbox: queue.SimpleQueue[Submission | object | None] = queue.SimpleQueue()
        # By policy and target, the most recently used last.
        self._points: dict[Any, AdaptiveClassifier] = {}
        self._lock = threading.Lock()  # guards what several threads read and write
        self._submissions: dict[int, Submission] = {}  # by number of the scheduler's request
        self._admitted = 0  # number of the scheduler's requests so far
        self._thread = threading.Thread(target=self._loop, name="sweet_jax.worker", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self.alive = True
        self._thread.start()

    def stop(self) -> None:
        """Waits until all submitted texts are classified, then closes the audit's log."""
        self._inbox.put(None)
        self._thread.join()
        if self.audit is not None:
            self.audit.close()

    def wake(self) -> None:
        """Makes the thread check the audit, in case it is waiting for texts."""
        self._inbox.put(_WAKE)

    def known(self, policy: str | None, target: Mapping[str, float]) -> AdaptiveClassifier | None:
        """Returns the classifier at a policy and target if it is cached, else None."""
        if policy is None and not target:
            return self.classifier
        key = (policy, *sorted(target.items()))
        with self._lock:
            classifier = self._points.pop(key, None)
            if classifier is not None:
                self._points[key] = classifier
        return classifier

    def at(self, policy: str | None, target: Mapping[str, float]) -> AdaptiveClassifier:
        """Returns the classifier at an HTTP request's policy and target.

        Raises UserError, see `AdaptiveClassifier`.
        """
        if (classifier := self.known(policy, target)) is None:
            classifier = self.classifier.at(policy, **cast("Target", target))
            with self._lock:
                self._points[policy, *sorted(target.items())] = classifier
                while len(self._points) > _CACHED:
                    del self._points[next(iter(self._points))]
        return classifier

    async def predict(
        self, classifier: AdaptiveClassifier, texts: Sequence[Text], truncation: str | None = None
    ) -> list[tuple[Prediction, Request]]:
        """Returns the prediction of each text, in order, with the scheduler's request.

        If it is canceled before the texts are admitted to the scheduler, they are dropped. Raises
        QueueFullError if too many texts wait, WorkerStoppedError if the thread has ended, and
        UserError, see `encode_requests`.
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
        except Exception:  # for example of the device: nothing can be computed any more
            log.exception("the worker stopped")
            with self._lock:  # from here on, `predict` raises WorkerStoppedError
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
        except Exception as error:  # one submission's error must not affect the others
            self._settle(submission, error)
            return
        submission.pending = len(submission.requests)
        for request in submission.requests:
            # So far, numbers count within the submission, for its error messages.
            request.number += self._admitted
            self._submissions[request.number] = submission
            self.scheduler.admit(request)
        self._admitted += len(submission.requests)

    def _claim(self, submission: Submission) -> bool:
        """Returns whether somebody waits for a submission, and then prevents its cancellation.

        Otherwise, drops the submission.
        """
        claimed = submission.future.set_running_or_notify_cancel()
        if not claimed:
            self._forget(submission)
        return claimed

    def _settle(self, submission: Submission, error: Exception | None = None) -> None:
        self._forget(submission)
        if error is not None:
            submission.future.set_exception(error)
        else:
            submission.future.set_result(submission.requests)

    def _forget(self, submission: Submission) -> None:
        with self._lock:
            self.waiting -= len(submission.texts)
