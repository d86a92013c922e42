"""The HTTP application: parses and checks a request, has the worker classify its texts, replies."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sweet_jax.config import UserError
from sweet_jax.exits.targets import TARGET_RANGES
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.inference.predictions import (
    ExitPrediction,
    Prediction,
    is_finite,
    make_exit_predictions,
)
from sweet_jax.server.worker import QueueFullError, Worker, WorkerStoppedError

_PAGE = Path(__file__).parent / "page.html"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Holds the largest values that are accepted."""

    texts: int = 256  # of a request
    characters: int = 100_000  # of a text
    body: int = 1 << 20  # bytes of a request
    waiting: int = 2048  # texts waiting or being computed
    timeout: float = 30.0  # seconds to read a request, and to answer it


class _Metrics:
    """Holds the counters that GET /metrics reports."""

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sweet_jax_requests", "HTTP requests by status", ["status"], registry=self.registry
        )
        self.texts = Counter(
            "sweet_jax_texts", "Texts by the layer they exited at", ["exit"], registry=self.registry
        )
        self.seconds = Histogram(
            "sweet_jax_request_seconds", "Seconds to answer a request", registry=self.registry
        )
        waiting = Gauge(
            "sweet_jax_waiting_texts", "Texts not yet classified", registry=self.registry
        )
        waiting.set_function(lambda: worker.waiting)


def make_app(classifier: AdaptiveClassifier, batch_size: int, limits: Limits) -> Starlette:
    """Returns the application; a request without a target is answered at the classifier's own."""
    worker = Worker(classifier, batch_size, limits.waiting)
    metrics = _Metrics(worker)

    async def predict(request: Request) -> Response:
        response = await _guarded(lambda: _predict(request, worker, metrics, limits), limits)
        metrics.requests.labels(response.status_code).inc()
        return response

    async def healthz(_: Request) -> Response:
        if worker.alive:
            return JSONResponse({"status": "ok", "waiting": worker.waiting})
        return JSONResponse({"status": "the worker stopped"}, 503)

    async def metrics_text(_: Request) -> Response:
        return PlainTextResponse(
            generate_latest(metrics.registry), media_type="text/plain; version=0.0.4"
        )

    async def page(_: Request) -> Response:
        return HTMLResponse(_render_page(classifier))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    routes = [
        Route("/predict", predict, methods=["POST"]),
        Route("/healthz", healthz),
        Route("/metrics", metrics_text),
        Route("/", page),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def _render_page(classifier: AdaptiveClassifier) -> str:
    values = {
        "task": classifier.model.task,
        "layers": list(classifier.layers),
        "columns": list(classifier.text_columns),
    }
    return _PAGE.read_text().replace("__ABOUT__", json.dumps(values).replace("<", "\\u003c"))


async def _guarded(respond: Callable[[], Awaitable[Response]], limits: Limits) -> Response:
    """Returns the response, or the refusal that an exception stands for."""
    try:
        return await respond()
    except HTTPException as refused:
        # A body that was not read to its end would be taken for the next request.
        close = {"Connection": "close"} if refused.status_code in (408, 413) else None
        return JSONResponse({"error": refused.detail}, refused.status_code, close)
    except UserError as error:
        return JSONResponse({"error": str(error)}, 400)
    except QueueFullError:
        return JSONResponse({"error": "too many texts wait: try again"}, 503, {"Retry-After": "1"})
    except WorkerStoppedError:
        return JSONResponse({"error": "the server cannot compute any more"}, 503)
    except TimeoutError:
        return JSONResponse({"error": f"not answered within {limits.timeout:g} seconds"}, 504)
    except ClientDisconnect:
        return JSONResponse({"error": "the connection was closed"}, 400)


async def _predict(request: Request, worker: Worker, metrics: _Metrics, limits: Limits) -> Response:
    began = time.perf_counter()
    values = _parse(await _read_body(request, limits))
    classifier = await _resolve_target(worker, values)
    texts = _check_texts(values, limits)
    async with asyncio.timeout(limits.timeout):
        found = await worker.predict(classifier, texts)
    detail, answers = bool(values.get("detail")), []
    for prediction, text in found:
        exits = make_exit_predictions(classifier.model, text) if detail else None
        answers.append(_as_json(prediction, exits))
    for prediction, _ in found:
        metrics.texts.labels(prediction.exit).inc()
    metrics.seconds.observe(time.perf_counter() - began)
    return JSONResponse({"answers": answers})


# A body up to so many times too large is read to its end, and dropped: a connection closed before
# the client has sent it would take the response with it.
_DROPPED = 16


async def _read_body(request: Request, limits: Limits) -> bytes:
    """Reads the body. Raises HTTPException where it is too large or comes too slowly."""
    too_large = HTTPException(413, f"a request may have {limits.body} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limits.body:
        if int(length) <= _DROPPED * limits.body:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limits.timeout):
                    async for _ in request.stream():
                        pass
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.timeout):
            async for part in request.stream():
                size += len(part)
                if size > limits.body:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise HTTPException(408, f"no whole request within {limits.timeout:g} seconds") from error
    return b"".join(parts)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is not JSON") from error
    if not isinstance(values, dict):
        raise HTTPException(400, 'the body must be an object: {"texts": [...]}')
    unknown = sorted(values.keys() - {"texts", "policy", "detail", *TARGET_RANGES})
    if unknown:
        known = ", ".join(("texts", "policy", "detail", *TARGET_RANGES))
        raise HTTPException(400, f"unknown key {unknown[0]!r}: choose from {known}")
    if not isinstance(values.get("detail"), bool | None):
        raise HTTPException(400, f"detail must be true or false; got {values['detail']!r:.40}")
    return values


async def _resolve_target(worker: Worker, values: Mapping[str, Any]) -> AdaptiveClassifier:
    policy = values.get("policy")
    target = {name: values[name] for name in TARGET_RANGES if values.get(name) is not None}
    if policy is not None and not isinstance(policy, str):
        raise HTTPException(400, "policy must be a name")
    for name, value in target.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) < 1e6:
            raise HTTPException(400, f"{name} must be a number; got {value!r:.40}")
    if "level" in target and not {"risk", "agreement"} & target.keys():
        raise HTTPException(400, "level is of a certificate: give risk or agreement too")
    return await asyncio.to_thread(worker.at, policy, target)  # a certificate takes a while


def _check_texts(values: Mapping[str, Any], limits: Limits) -> list:
    texts = values.get("texts")
    if not isinstance(texts, list) or not texts:
        raise HTTPException(400, "texts must be a list of one text or more")
    if len(texts) > min(limits.texts, limits.waiting):
        raise HTTPException(413, f"a request may have {limits.texts} texts; got {len(texts)}")
    for text in texts:
        parts = [text] if isinstance(text, str) else text if isinstance(text, list) else []
        if any(isinstance(p, str) and len(p) > limits.characters for p in parts):
            raise HTTPException(413, f"a text may have {limits.characters} characters")
    return texts


def _as_json(prediction: Prediction, exits: list[ExitPrediction] | None) -> dict[str, Any]:
    """Returns an element of "answers"; with `exits`, also every exit that the text reached."""
    if not prediction.is_finite:
        raise HTTPException(500, "the model's answer is not a number: its training diverged")
    answer: dict[str, Any] = {"label": prediction.label}
    if prediction.probability is not None:  # a regression has none
        answer["probability"] = prediction.probability
    answer |= {"exit": prediction.exit, "cost": prediction.cost}
    if exits is not None:
        answer["exits"] = [
            exit._asdict()
            if is_finite(exit.label, exit.probability)
            else {"layer": exit.layer, "label": None, "probability": None}  # its training diverged
            for exit in exits
        ]
    return answer
