"""The application: what is asked over HTTP, checked, and answered."""

import asyncio
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sweet_jax.config import UserError
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.inference.predictions import Prediction
from sweet_jax.inference.scheduler import Request as TextRequest
from sweet_jax.server.worker import QueueFullError, Worker, WorkerStoppedError

_DIALS = ("cost", "accuracy", "threshold", "risk", "agreement", "milliseconds", "level")
_PAGE = Path(__file__).parent / "page.html"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may be: texts, characters of each, bytes; texts waiting; seconds."""

    texts: int = 256
    characters: int = 100_000
    body: int = 1 << 20
    waiting: int = 2048
    timeout: float = 30.0


class _Refused(Exception):  # noqa: N818 - an answer, not an error
    """A request that gets no answer: status and the reason."""

    def __init__(self, status: int, reason: str):
        self.status, self.reason = status, reason


class _Metrics:
    """What /metrics tells."""

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sweet_jax_requests", "By status", ["status"], registry=self.registry
        )
        self.texts = Counter(
            "sweet_jax_texts", "Answered, by the layer", ["exit"], registry=self.registry
        )
        self.seconds = Histogram(
            "sweet_jax_request_seconds", "Of an answer", registry=self.registry
        )
        waiting = Gauge("sweet_jax_waiting_texts", "Not yet answered", registry=self.registry)
        waiting.set_function(lambda: worker.waiting)


def make_app(classifier: AdaptiveClassifier, batch_size: int, limits: Limits) -> Starlette:
    """The application, answering at the classifier's dial where a request names none."""
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

    async def tell(_: Request) -> Response:
        return PlainTextResponse(
            generate_latest(metrics.registry), media_type="text/plain; version=0.0.4"
        )

    async def page(_: Request) -> Response:
        about = {
            "task": classifier.model.about["task"],
            "layers": list(classifier.layers),
            "columns": list(classifier.text_columns),
        }
        values = json.dumps(about).replace("<", "\\u003c")
        return HTMLResponse(_PAGE.read_text().replace("__ABOUT__", values))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    routes = [
        Route("/predict", predict, methods=["POST"]),
        Route("/healthz", healthz),
        Route("/metrics", tell),
        Route("/", page),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def _guarded(answer: Callable[[], Awaitable[Response]], limits: Limits) -> Response:
    """The answer, or the refusal that an exception stands for."""
    try:
        return await answer()
    except _Refused as refused:
        # A body that was not read to its end would be taken for the next request.
        close = {"Connection": "close"} if refused.status in (408, 413) else None
        return JSONResponse({"error": refused.reason}, refused.status, close)
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
    asked = _parsed(await _body(request, limits))
    own = await _at(worker, asked)
    wanted = _texts(asked, limits)
    async with asyncio.timeout(limits.timeout):
        found = await worker.answer(own, wanted)
    detail = bool(asked.get("detail"))
    answers = [_answer(own, *pair, detail) for pair in found]
    for prediction, _ in found:
        metrics.texts.labels(prediction.exit).inc()
    metrics.seconds.observe(time.perf_counter() - began)
    return JSONResponse({"answers": answers})


# Of a body up to so many times too large all is read, and dropped: a connection closed before the
# client is done sending would take the answer with it.
_DROPPED = 16


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, or `_Refused` where it is too large or comes too slowly."""
    too_large = _Refused(413, f"a request may have {limits.body} bytes")
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
        raise _Refused(408, f"no whole request within {limits.timeout:g} seconds") from error
    return b"".join(parts)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, "the body is not JSON") from error
    if not isinstance(asked, dict):
        raise _Refused(400, 'the body must be an object: {"texts": [...]}')
    unknown = sorted(asked.keys() - {"texts", "policy", "detail", *_DIALS})
    if unknown:
        raise _Refused(
            400, f"unknown key {unknown[0]!r}; known are texts, policy, detail and dials"
        )
    if not isinstance(asked.get("detail"), bool | None):
        raise _Refused(400, f"detail must be true or false; got {asked['detail']!r:.40}")
    return asked


async def _at(worker: Worker, asked: Mapping[str, Any]) -> AdaptiveClassifier:
    policy = asked.get("policy")
    dial = {name: asked[name] for name in _DIALS if asked.get(name) is not None}
    if policy is not None and not isinstance(policy, str):
        raise _Refused(400, "policy must be a name")
    for name, value in dial.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) < 1e6:
            raise _Refused(400, f"{name} must be a number; got {value!r:.40}")
    if "level" in dial and not {"risk", "agreement"} & dial.keys():
        raise _Refused(400, "level is of a certificate: give risk or agreement too")
    return await asyncio.to_thread(worker.at, policy, dial)  # a certificate takes a while


def _texts(asked: Mapping[str, Any], limits: Limits) -> list:
    texts = asked.get("texts")
    if not isinstance(texts, list) or not texts:
        raise _Refused(400, "texts must be a list of one text or more")
    if len(texts) > min(limits.texts, limits.waiting):
        raise _Refused(413, f"a request may have {limits.texts} texts; got {len(texts)}")
    for text in texts:
        parts = [text] if isinstance(text, str) else text if isinstance(text, list) else []
        if any(isinstance(p, str) and len(p) > limits.characters for p in parts):
            raise _Refused(413, f"a text may have {limits.characters} characters")
    return texts


def _answer(
    classifier: AdaptiveClassifier, found: Prediction, row: TextRequest, detail: bool
) -> dict[str, Any]:
    if not math.isfinite(found.probability):
        raise _Refused(500, "the model's answer is not a number: its training diverged")
    answer: dict[str, Any] = {"label": found.label, "probability": found.probability}
    answer |= {"exit": found.exit, "cost": found.cost}
    if detail:
        answer["exits"] = [
            {"layer": layer, "label": label, "probability": probability}
            if math.isfinite(probability)
            else {"layer": layer, "label": None, "probability": None}  # its training diverged
            for layer, label, probability in classifier.passed(row)
        ]
    return answer
