"""The HTTP application: has the worker classify the texts of each request, and responds.

The formats of requests and responses are in `formats.py` and `tei.py`, checks of requests in
`requests.py`, errors in `refusals.py`, and the description of the API in `openapi.py`.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sweet_jax.errors import UserError
from sweet_jax.exits.policies import policy_rule
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.inference.latency import read_latency
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.server.audit import Audit, AuditMiddleware
from sweet_jax.server.audit_page import AuditCollector, render_page
from sweet_jax.server.formats import NATIVE, Format
from sweet_jax.server.openapi import describe_api
from sweet_jax.server.refusals import make_refusal
from sweet_jax.server.requests import Answered, Limits, Question, parse_object, read_body
from sweet_jax.server.tei import TEI
from sweet_jax.server.worker import Worker

_PAGE = Path(__file__).parent / "page.html"


class _Metrics:
    """Holds the counters that GET /metrics reports."""

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sweet_jax_requests",
            "Prediction requests by HTTP status",
            ["status"],
            registry=self.registry,
        )
        self.texts = Counter(
            "sweet_jax_texts", "Texts by the layer they exited at", ["exit"], registry=self.registry
        )
        self.seconds = Histogram(
            "sweet_jax_request_seconds",
            "Seconds to answer a prediction request",
            registry=self.registry,
        )
        waiting = Gauge(
            "sweet_jax_waiting_texts", "Texts not yet classified", registry=self.registry
        )
        waiting.set_function(lambda: worker.waiting)


class _Service(NamedTuple):
    """Holds what every request needs."""

    worker: Worker
    metrics: _Metrics
    limits: Limits
    audit: Audit | None


def make_app(
    classifier: AdaptiveClassifier, batch_size: int, limits: Limits, audit: Audit | None = None
) -> Starlette:
    """Returns the application.

    Args:
      classifier: classifier at the operating point of requests that set no policy and no target.
      batch_size: maximum number of texts computed at once.
      limits: limits on requests.
      audit: audit of the answered texts; None for no audit.

    """
    worker = Worker(classifier, batch_size, limits.waiting, audit)
    service = _Service(worker, _Metrics(worker), limits, audit)
    if audit is not None:
        service.metrics.registry.register(AuditCollector(audit))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    after = [] if audit is None else [Middleware(AuditMiddleware, audit, worker.wake)]
    app = Starlette(
        routes=_make_routes(service),
        lifespan=lifespan,
        middleware=after,
        exception_handlers={HTTPException: _refuse_route},
    )
    # A path with an additional slash is not found, as documented.
    app.router.redirect_slashes = False
    return app


def _make_routes(service: _Service) -> list[Route]:
    worker, classifier = service.worker, service.worker.classifier
    document = describe_api(classifier.model, service.limits)

    def predicts(*formats: Format) -> Callable[[Request], Any]:
        async def predict(request: Request) -> Response:
            try:
                response = await _predict(request, formats, service)
            except Exception:  # a bug: Starlette responds with status 500
                service.metrics.requests.labels(500).inc()
                raise
            service.metrics.requests.labels(response.status_code).inc()
            return response

        return predict

    async def healthz(_: Request) -> Response:
        if worker.alive:
            return JSONResponse({"status": "ok", "waiting": worker.waiting})
        return JSONResponse({"status": "the worker stopped"}, 503)

    async def health(_: Request) -> Response:  # compatible with text-embeddings-inference
        if worker.alive:
            return Response()
        return JSONResponse({"error": "unhealthy", "error_type": "Unhealthy"}, 503)

    async def metrics_text(_: Request) -> Response:
        text = generate_latest(service.metrics.registry)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def page(_: Request) -> Response:
        return HTMLResponse(_render_page(classifier))

    async def audit_page(_: Request) -> Response:
        if service.audit is None:
            return JSONResponse({"error": "no audit: start the server with --audit=0.02"}, 404)
        return HTMLResponse(render_page(service.audit, classifier.model.task))

    async def openapi(_: Request) -> Response:
        return JSONResponse(document)

    return [
        Route("/predict", predicts(NATIVE, TEI), methods=["POST"]),
        Route("/v1/predict", predicts(NATIVE), methods=["POST"]),
        Route("/", predicts(TEI), methods=["POST"]),
        Route("/audit", audit_page),
        Route("/", page),
        Route("/healthz", healthz),
        Route("/health", health),
        Route("/metrics", metrics_text),
        Route("/openapi.json", openapi),
    ]


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Returns a JSON response for an unknown path or method; Starlette's own is plain text."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = "no such path; see /openapi.json for the available ones"
    if error.status_code == 405:
        message = f"this path does not support {request.method}; see /openapi.json for its methods"
    return JSONResponse({"error": message}, error.status_code, error.headers)


def _render_page(classifier: AdaptiveClassifier) -> str:
    values = {
        "task": classifier.model.task,
        "layers": list(classifier.layers),
        "columns": list(classifier.text_columns),
        "targets": _describe_targets(classifier),
    }
    page = _PAGE.read_text(encoding="utf-8")
    return page.replace("__ABOUT__", json.dumps(values).replace("<", "\\u003c"))


def _describe_targets(classifier: AdaptiveClassifier) -> dict[str, str]:
    """Returns the words for each target that the page offers, by name in TARGET_RANGES."""
    model = classifier.model
    metric = model.objective.metric(model.metric)
    shown = ShownMetric.of(metric.name).name.replace("_", " ")
    described = {"threshold": "confidence threshold", "cost": "mean cost at most"}
    if metric.is_error:
        described["error"] = f"{shown} at most"
    else:
        reads_accuracy = policy_rule(classifier.policy).curve
        described["accuracy"] = f"{'accuracy' if reads_accuracy else shown} at least"
    with contextlib.suppress(UserError):  # the times were measured on another machine
        if read_latency(model, classifier.engine) is not None:
            described["milliseconds"] = "mean milliseconds at most"
    return described


async def _predict(request: Request, formats: Sequence[Format], service: _Service) -> Response:
    """Returns the response, in the format whose key the body has, or else in the first format."""
    began, chosen, limits = time.perf_counter(), formats[0], service.limits
    model = service.worker.classifier.model
    try:
        values = parse_object(await read_body(request, limits))
        if chosen.key not in values:
            chosen = next((other for other in formats if other.key in values), chosen)
        question = chosen.parse(values, model, limits)
        answered = await _classify(question, service.worker, limits)
        content = question.answer(model, answered)
    except Exception as error:
        return chosen.refuse(make_refusal(error, limits.timeout))
    for prediction, _ in answered:
        service.metrics.texts.labels(prediction.exit).inc()
    service.metrics.seconds.observe(time.perf_counter() - began)
    return JSONResponse(content)


async def _classify(question: Question, worker: Worker, limits: Limits) -> Answered:
    """Returns the predictions for a question."""
    point = question.policy, question.target
    classifier = worker.known(*point)
    if classifier is None:
        # In a thread, since computing a certificate takes a while.
        classifier = await asyncio.to_thread(worker.at, *point)
    async with asyncio.timeout(limits.timeout):
        return await worker.predict(classifier, question.texts, question.truncation)
