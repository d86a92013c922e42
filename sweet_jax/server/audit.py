"""The audit of a server: a share of the texts goes through all layers too, after its answer.

What is audited is computed while no text waits, by the thread that computes the answers: no answer
waits for its own audit, and another one for at most one small batch of one stage.
"""

import contextvars
import dataclasses
import json
import logging
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.exits.certificates import NEVER
from sweet_jax.inference.audit_identity import describe_audited
from sweet_jax.inference.audit_log import AuditLog
from sweet_jax.inference.audit_statistics import AuditStatistics, AuditSummary
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.inference.predictions import Text
from sweet_jax.inference.scheduler import ExitRule, Request, Scheduler

log = logging.getLogger(__name__)

_WAITING = 256  # texts that wait for their audit; more are left out, and counted
_BATCH = 8  # texts of a batch: an answer may have to wait for one

Answered = tuple[Request, Text]
_answered: contextvars.ContextVar[list[Answered] | None] = contextvars.ContextVar(
    "answered", default=None
)


@dataclasses.dataclass(frozen=True)
class AuditSettings:
    """Holds what an audit is asked for.

    Attributes:
      share: of the texts that are answered, 0 to 1, drawn at random.
      seed: of the draws.
      agreement: the share of answers that are to be those of the full model; None: no alarm.
      level: 1 - the chance of a false alarm of either kind, ever.
      webhook: URL that an alarm is posted to, "" for none.
      log: name of the file that rows are written to, "" for none.
      log_size: its bound, in bytes.
      texts: whether rows hold the text.
      precision: that the classifier's engine computes in, which the log names.

    """

    share: float
    seed: int = 0
    agreement: float | None = None
    level: float = 0.95
    webhook: str = ""
    log: str = ""
    log_size: int = 64 << 20
    texts: bool = False
    precision: str = "float32"


class AuditCounts(NamedTuple):
    """Holds the counts of an audit's texts.

    Attributes:
      answered: at the server's own operating point.
      dropped: drawn, and left out since too many waited.
      waiting: for their audit.

    """

    answered: int
    dropped: int
    waiting: int


def uniform_draws(seed: int, number: int) -> tuple[float, float]:
    """Returns two uniform draws for text `number`, which depend on the seed and it alone.

    By the first it is audited or not, by the second ties of the shift test are broken.
    """
    first, second = np.random.Philox(key=seed, counter=number).random_raw(2) / 2.0**64
    return float(first), float(second)


class Audit:
    """Audits the texts that were answered at a classifier's own operating point.

    `offer` is called by the thread of the HTTP application, `step` by the one that computes.

    Args:
      classifier: that the server answers with.
      settings: what is asked for.

    Attributes:
      running: False once an error has ended the audit.

    Raises UserError where the log cannot be written.

    """

    def __init__(self, classifier: AdaptiveClassifier, settings: AuditSettings):
        self.settings, self.running = settings, True
        model, rule, engine = classifier.model, classifier.rule, classifier.engine
        self._scheduler = Scheduler(engine, engine.stages(), _BATCH)
        # An infinite patience: no text leaves before the last exit, whatever the outputs mean.
        self._rule = ExitRule("patience", np.inf, rule.calibrator, model.layers)
        self._chosen: deque[Answered] = deque()
        self._under_way: dict[int, Answered] = {}
        self._answered = self._dropped = 0
        self._statistics = AuditStatistics(model, rule, settings.agreement, settings.level)
        self._lock = threading.Lock()  # of what several threads read and write
        self._log = _open_log(classifier, settings) if settings.log else None

    @property
    def waiting(self) -> int:
        """Returns how many texts are to be computed; 0 once an error has ended the audit."""
        return len(self._chosen) + len(self._under_way)

    def counts(self) -> AuditCounts:
        """Returns how many texts were answered, left out, and wait."""
        with self._lock:
            return AuditCounts(self._answered, self._dropped, self.waiting)

    def summary(self) -> AuditSummary:
        """Returns what was found so far."""
        with self._lock:
            return self._statistics.summary()

    def offer(self, answered: Iterable[Answered]) -> None:
        """Takes texts whose answers were sent, and keeps the share of them that is drawn."""
        texts = list(answered)
        confidences = self._statistics.answer_confidences([request for request, _ in texts])
        ties = []
        with self._lock:
            for each in texts:
                self._answered += 1
                draw, tie = uniform_draws(self.settings.seed, self._answered)
                ties.append(tie)
                if draw >= self.settings.share or not self.running:
                    continue
                if self.waiting < _WAITING:
                    self._chosen.append(each)
                else:
                    self._dropped += 1
            raised = self._statistics.add_answered(confidences, ties)
        if raised:
            self._warn(
                "shift",
                f"the confidences of {self._answered} texts show that the texts have changed since "
                "the server was started",
            )

    def step(self) -> None:
        """Computes one batch of one stage, for texts that were chosen. An error ends the audit."""
        try:
            while self._chosen and len(self._under_way) < _BATCH:
                answered = self._chosen.popleft()
                given = answered[0]
                tokens = (given.input_ids, given.token_type_ids, given.length)
                whole = Request(given.number, *tokens, self._rule, given.second_start)
                self._under_way[id(whole)] = answered
                self._scheduler.admit(whole)
            for whole in self._scheduler.step():
                self._record(whole, *self._under_way.pop(id(whole)))
        except Exception:  # no answer may be lost to it
            log.exception("the audit has ended; texts are answered without it")
            with self._lock:  # after which `offer` keeps none
                self.running = False
                self._chosen.clear()
                self._under_way.clear()

    def close(self) -> None:
        """Closes the log; called once the thread that computes has ended."""
        if self._log is not None:
            self._log.close()

    def _record(self, whole: Request, answered: Request, text: Text) -> None:
        """Adds a text that all exits have computed to what is known."""
        scores = np.asarray(whole.exit_scores, np.float32) if whole.exit_scores else None
        kept = text if self.settings.texts else None
        row = self._statistics.row(np.stack(whole.logits), scores, answered.exit, kept)
        with self._lock:
            raised = self._statistics.add(row)
        if self._log is not None:
            try:
                self._log.add(row, self._rule.layers)
            except OSError as error:  # of a full disk, say: what is watched does not need the log
                log.warning(
                    "the audit goes on without its log: %s cannot be written (%s)",
                    self.settings.log,
                    error.strerror,
                )
                self._log.close()
                self._log = None
        if raised:
            found = self.summary()
            self._warn(
                "agreement",
                f"the agreement of {found.audited} audited answers with the full model is "
                f"{found.agreement:.4f}, where {found.target:.4f} is to be kept",
            )

    def _warn(self, kind: str, text: str) -> None:
        """Says in the log, and at the webhook, that an alarm was raised."""
        found = self.summary()
        log.warning(
            "AUDIT ALARM: %s; a false alarm has at most a chance of %.3g", text, 1 - found.level
        )
        if self.settings.webhook:
            body = {"alarm": kind, "text": text, "audited": found.audited, "level": found.level}
            body |= {"agreement": found.agreement, "target": found.target}
            # JSON has no NaN: nothing may have been audited yet.
            body = {k: None if v != v else v for k, v in body.items()}
            arguments = (self.settings.webhook, body)
            threading.Thread(target=_post, args=arguments, name="audit", daemon=True).start()


def _open_log(classifier: AdaptiveClassifier, settings: AuditSettings) -> AuditLog:
    """Opens the log. Raises UserError where it cannot be written."""
    model, threshold = classifier.model, classifier.rule.threshold
    about = describe_audited(model, settings.precision)
    about |= {"model": str(model.folder), "policy": classifier.policy_name}
    about |= {"threshold": min(threshold, NEVER)}
    about |= {"share": settings.share, "seed": settings.seed}
    return AuditLog(settings.log, about, settings.log_size)


def _post(url: str, body: dict[str, Any]) -> None:
    """Posts JSON; a failure is logged."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        # Without the proxies of the environment: the address is of this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(request, timeout=5).close()
    except OSError as error:
        log.warning("the alarm could not be posted to %s: %s", url, error)


def note_answered(answered: Iterable[Answered]) -> None:
    """Notes texts that the present HTTP request had answered, for its end."""
    noted = _answered.get()
    if noted is not None:
        noted.extend(answered)


class AuditMiddleware:
    """Offers what an HTTP request had answered to the audit, once the response has been sent.

    Args:
      app: the ASGI application.
      audit: that is offered the texts.
      wake: called afterwards, for a thread that waits for work.

    """

    def __init__(self, app: Any, audit: Audit, wake: Callable[[], None]):
        self._app, self._audit, self._wake = app, audit, wake

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one request."""
        noted: list[Answered] = []
        token = _answered.set(noted)
        try:
            await self._app(scope, receive, send)
        finally:
            _answered.reset(token)
        if noted:
            self._audit.offer(noted)
            self._wake()
