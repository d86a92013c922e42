"""The audit of a server: a share of the texts is also computed by all exits, after the response.

The thread that computes predictions does this while no text waits. A response never waits for its
own audit, and for other texts' audits it waits for at most one small batch of one stage.
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

_WAITING = 256  # maximum number of texts that wait for their audit; others are dropped
_BATCH = 8  # texts in a batch; small, since a response may have to wait for one

ServedText = tuple[Request, Text]
_answered: contextvars.ContextVar[list[ServedText] | None] = contextvars.ContextVar(
    "answered", default=None
)


@dataclasses.dataclass(frozen=True)
class AuditSettings:
    """Holds the settings of an audit.

    Attributes:
      share: share of the answered texts that is audited, from 0 to 1, drawn at random.
      seed: random seed of the draws.
      agreement: minimum share of answers that equal the full model's; None for no alarm.
      level: 1 - the probability that either alarm is ever raised falsely.
      webhook: URL that an alarm is posted to; "" for none.
      log: name of the file that rows are written to; "" for none.
      log_size: maximum size of the log, in bytes.
      texts: whether rows hold the text.
      precision: precision of the classifier's engine, which the log records.

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
    """Holds the numbers of an audit's texts.

    Attributes:
      answered: number of texts answered at the server's own operating point.
      dropped: number of texts drawn for the audit but dropped, since too many were waiting.
      waiting: number of texts that wait for their audit.

    """

    answered: int
    dropped: int
    waiting: int


def uniform_draws(seed: int, number: int) -> tuple[float, float]:
    """Returns two uniform draws for text `number`, which depend only on the seed and this number.

    The first decides whether the text is audited, the second breaks ties in the shift test.
    """
    first, second = np.random.Philox(key=seed, counter=number).random_raw(2) / 2.0**64
    return float(first), float(second)


class Audit:
    """Audits texts that were answered at a classifier's own operating point.

    The thread of the HTTP application calls `offer`; the one that computes predictions calls
    `step`.

    Args:
      classifier: classifier that the server answers with.
      settings: settings of the audit.

    Attributes:
      running: False once an error has ended the audit.

    Raises UserError for a regression, and if the log cannot be written.

    """

    def __init__(self, classifier: AdaptiveClassifier, settings: AuditSettings):
        self.settings, self.running = settings, True
        model, rule, engine = classifier.model, classifier.rule, classifier.engine
        self._scheduler = Scheduler(engine, engine.stages(), _BATCH)
        # With infinite patience, no text exits before the last exit, whatever the objective.
        self._rule = ExitRule("patience", np.inf, rule.calibrator, model.layers)
        self._chosen: deque[ServedText] = deque()
        self._under_way: dict[int, ServedText] = {}
        self._answered = self._dropped = 0
        self._statistics = AuditStatistics(model, rule, settings.agreement, settings.level)
        self._lock = threading.Lock()  # guards what several threads read and write
        self._log = _open_log(classifier, settings) if settings.log else None

    @property
    def waiting(self) -> int:
        """Returns the number of texts still to compute; 0 once an error has ended the audit."""
        return len(self._chosen) + len(self._under_way)

    def counts(self) -> AuditCounts:
        """Returns the numbers of texts answered, dropped and waiting."""
        with self._lock:
            return AuditCounts(self._answered, self._dropped, self.waiting)

    def summary(self) -> AuditSummary:
        """Returns the statistics so far."""
        with self._lock:
            return self._statistics.summary()

    def offer(self, answered: Iterable[ServedText]) -> None:
        """Takes texts whose responses were sent, and keeps the share that is drawn."""
        texts = list(answered)
        confidences = self._statistics.answer_confidences([request for request, _ in texts])
        ties = []
        with self._lock:
            for entry in texts:
                self._answered += 1
                draw, tie = uniform_draws(self.settings.seed, self._answered)
                ties.append(tie)
                if draw >= self.settings.share or not self.running:
                    continue
                if self.waiting < _WAITING:
                    self._chosen.append(entry)
                else:
                    self._dropped += 1
            raised = self._statistics.add_answered(confidences, ties)
        if raised:
            self._warn(
                "shift",
                f"the confidences of {self._answered} texts show that the texts have changed since "
                "the server started",
            )

    def step(self) -> None:
        """Computes one batch of one stage for the chosen texts. An error ends the audit."""
        try:
            while self._chosen and len(self._under_way) < _BATCH:
                answered = self._chosen.popleft()
                request = answered[0]
                tokens = (request.input_ids, request.token_type_ids, request.length)
                whole = Request(request.number, *tokens, self._rule, request.second_start)
                self._under_way[id(whole)] = answered
                self._scheduler.admit(whole)
            for whole in self._scheduler.step():
                self._record(whole, *self._under_way.pop(id(whole)))
        except Exception:  # an error in the audit must not affect predictions
            log.exception("the audit has ended with an error; the server continues without it")
            with self._lock:  # from here on, `offer` keeps no texts
                self.running = False
                self._chosen.clear()
                self._under_way.clear()

    def close(self) -> None:
        """Closes the log; call it once the thread that computes has ended."""
        if self._log is not None:
            self._log.close()

    def _record(self, whole: Request, answered: Request, text: Text) -> None:
        """Adds a text that all exits have computed to the statistics and the log."""
        scores = np.asarray(whole.exit_scores, np.float32) if whole.exit_scores else None
        kept_text = text if self.settings.texts else None
        row = self._statistics.row(np.stack(whole.logits), scores, answered.exit, kept_text)
        if self._log is not None:
            try:  # before the text counts as audited: every text counted is then in the log
                self._log.add(row, self._rule.layers)
            except OSError as error:  # for example a full disk; the statistics do not need the log
                log.warning(
                    "the audit continues without its log: %s cannot be written (%s)",
                    self.settings.log,
                    error.strerror,
                )
                self._log.close()
                self._log = None
        with self._lock:
            raised = self._statistics.add(row)
        if raised:
            summary = self.summary()
            self._warn(
                "agreement",
                f"the agreement of {summary.audited} audited answers with the full model is "
                f"{summary.agreement:.4f}; the target is at least {summary.target:.4f}",
            )

    def _warn(self, kind: str, text: str) -> None:
        """Reports an alarm in the server's log and to the webhook."""
        summary = self.summary()
        log.warning(
            "AUDIT ALARM: %s; the probability of a false alarm is at most %.3g",
            text,
            1 - summary.level,
        )
        if self.settings.webhook:
            body = {"alarm": kind, "text": text, "audited": summary.audited, "level": summary.level}
            body |= {"agreement": summary.agreement, "target": summary.target}
            # JSON has no NaN: nothing may have been audited yet.
            body = {k: None if v != v else v for k, v in body.items()}
            arguments = (self.settings.webhook, body)
            threading.Thread(target=_post, args=arguments, name="audit", daemon=True).start()


def _open_log(classifier: AdaptiveClassifier, settings: AuditSettings) -> AuditLog:
    """Opens the log. Raises UserError if it cannot be written."""
    model, threshold = classifier.model, classifier.rule.threshold
    header = describe_audited(model, settings.precision)
    header |= {"model": str(model.folder), "policy": classifier.policy_name}
    header |= {"threshold": min(threshold, NEVER)}
    header |= {"share": settings.share, "seed": settings.seed}
    return AuditLog(settings.log, header, settings.log_size)


def _post(url: str, body: dict[str, Any]) -> None:
    """Posts JSON; logs a failure."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        # No proxies from the environment, since the address is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(request, timeout=5).close()
    except OSError as error:
        log.warning("the alarm could not be posted to %s: %s", url, error)


def note_answered(answered: Iterable[ServedText]) -> None:
    """Records texts answered for the current HTTP request, for `AuditMiddleware`."""
    noted = _answered.get()
    if noted is not None:
        noted.extend(answered)


class AuditMiddleware:
    """Offers the answered texts of an HTTP request to the audit, after the response is sent.

    Args:
      app: the ASGI application.
      audit: audit that the texts are offered to.
      wake: function called afterwards, which wakes the thread that computes.

    """

    def __init__(self, app: Any, audit: Audit, wake: Callable[[], None]):
        self._app, self._audit, self._wake = app, audit, wake

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one request."""
        noted: list[ServedText] = []
        token = _answered.set(noted)
        try:
            await self._app(scope, receive, send)
        finally:
            _answered.reset(token)
        if noted:
            self._audit.offer(noted)
            self._wake()
