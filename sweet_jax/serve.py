"""Serves a saved model over HTTP; the texts of all requests share batches.

  pip install ".[serve]"
  python -m sweet_jax.serve --model=runs/x/model --port=8000 --cost=0.5
  curl localhost:8000/predict -d '{"texts": ["a text", "another"], "accuracy": 0.9}'

POST /predict   {"texts": [...]} and, if not the server's own, policy and one of cost, accuracy,
                threshold, risk, agreement (with level) → {"answers": [{"label", "probability",
                "exit", "cost"}, ...]}; with "detail": true also every exit on the way. A pair of
                texts is a list of two.
GET /healthz    200 while texts are answered
GET /metrics    in Prometheus' text format
GET /           a page to try texts on

Refused are: what is malformed 400, a body or a text that is too large 413, a body that comes too
slowly 408, more texts than may wait 503, what is not answered in time 504. SIGTERM: what was taken
in is answered, then the server ends.

"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from sweet_jax.config import UserError
from sweet_jax.flags import Parser, command, dials, policy_lines
from sweet_jax.inference import AdaptiveClassifier, Prediction
from sweet_jax.serving.flow import Row
from sweet_jax.serving.programs import keep_programs
from sweet_jax.serving.saved import open_model
from sweet_jax.serving.worker import FullError, Worker

try:
    import uvicorn
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise SystemExit(f'error: the server needs {error.name}: pip install ".[serve]"') from error

_DIALS = ("cost", "accuracy", "threshold", "risk", "agreement", "level")
_PAGE = Path(__file__).parent / "serving" / "page.html"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("sweet_jax.serve", f"{__doc__}{policy_lines()}")
    parser.add_argument("--model", required=True, help="folder model/ of a run, or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default 8000)")
    parser.add_dials()
    limits = {
        "batch_size": (32, "texts computed at once, at most"),
        "max_texts": (256, "of a request"),
        "max_characters": (100_000, "of a text"),
        "max_body": (1 << 20, "bytes of a request"),
        "max_waiting": (2048, "texts waiting or under way"),
        "max_connections": (1024, "open at once"),
    }
    for name, (default, text) in limits.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds to read or answer a request (30)"
    )
    parser.add_argument(
        "--warm_up", action="store_true", help="compile every program before the first request"
    )
    options = parser.parse_args(argv)
    dials(options)
    for name in (*limits, "timeout"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} must be more than 0; got {getattr(options, name)}")
    return options


def _run(options: argparse.Namespace) -> None:
    keep_programs()
    model = open_model(options.model)
    classifier = AdaptiveClassifier(model, options.policy, **dials(options))
    if options.warm_up:
        print(f"compiled {classifier.warm_up(options.batch_size)} programs", flush=True)
    settings = uvicorn.Config(
        make_app(classifier, options),
        options.host,
        options.port,
        log_level="warning",
        limit_concurrency=options.max_connections,
        timeout_graceful_shutdown=int(options.timeout) + 1,
    )
    server = uvicorn.Server(settings)
    print(f"serving {options.model} at http://{options.host}:{options.port}", flush=True)
    try:
        server.run()
    except SystemExit as error:  # it could not bind, and has said so
        raise UserError(f"could not serve at {options.host}:{options.port}") from error


class _Refused(Exception):  # noqa: N818 - an answer, not an error
    """A request that gets no answer: status and the reason."""

    def __init__(self, status: int, reason: str):
        self.status, self.reason = status, reason


def make_app(classifier: AdaptiveClassifier, options: argparse.Namespace) -> Starlette:
    """The application; `options` are the limits of the command line."""
    worker = Worker(classifier, options.batch_size, options.max_waiting)
    registry = CollectorRegistry()
    requests = Counter("sweet_jax_requests", "By status", ["status"], registry=registry)
    texts = Counter("sweet_jax_texts", "Answered, by the layer", ["exit"], registry=registry)
    seconds = Histogram("sweet_jax_request_seconds", "Of an answer", registry=registry)
    Gauge("sweet_jax_waiting_texts", "Not yet answered", registry=registry).set_function(
        lambda: worker.waiting
    )

    async def predict(request: Request) -> Response:
        began = time.perf_counter()
        try:
            asked = _parsed(await _body(request, options))
            own = _at(worker, asked)
            wanted = _texts(asked, options)
            async with asyncio.timeout(options.timeout):
                found = await worker.answer(own, wanted)
        except _Refused as refused:
            return refuse(refused.status, refused.reason)
        except UserError as error:
            return refuse(400, str(error))
        except FullError:
            return refuse(503, "too many texts wait: try again", {"Retry-After": "1"})
        except TimeoutError:
            return refuse(504, f"not answered within {options.timeout:g} seconds")
        except ClientDisconnect:
            return refuse(400, "the connection was closed")
        for prediction, _ in found:
            texts.labels(prediction.exit).inc()
        requests.labels(200).inc()
        seconds.observe(time.perf_counter() - began)
        detail = bool(asked.get("detail"))
        return JSONResponse({"answers": [_answer(own, *pair, detail) for pair in found]})

    def refuse(status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
        requests.labels(status).inc()
        # A body that was not read to its end would be taken for the next request.
        more = {"Connection": "close"} if status in (408, 413) else {}
        return JSONResponse({"error": reason}, status, {**(headers or {}), **more})

    async def healthz(_: Request) -> Response:
        if worker.alive:
            return JSONResponse({"status": "ok", "waiting": worker.waiting})
        return JSONResponse({"status": "the worker stopped"}, 503)

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

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
        Route("/metrics", metrics),
        Route("/", page),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def _body(request: Request, options: argparse.Namespace) -> bytes:
    """The body, or `_Refused` as soon as it is too large, or comes too slowly."""
    too_large = _Refused(413, f"a request may have {options.max_body} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > options.max_body:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(options.timeout):
            async for part in request.stream():
                size += len(part)
                if size > options.max_body:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise _Refused(408, f"no whole request within {options.timeout:g} seconds") from error
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
    return asked


def _at(worker: Worker, asked: Mapping[str, Any]) -> AdaptiveClassifier:
    policy = asked.get("policy")
    dial = {name: asked[name] for name in _DIALS if asked.get(name) is not None}
    if policy is not None and not isinstance(policy, str):
        raise _Refused(400, "policy must be a name")
    for name, value in dial.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) < 1e6:
            raise _Refused(400, f"{name} must be a number; got {value!r:.40}")
    return worker.at(policy, dial)


def _texts(asked: Mapping[str, Any], options: argparse.Namespace) -> list:
    texts = asked.get("texts")
    if not isinstance(texts, list) or not texts:
        raise _Refused(400, "texts must be a list of one text or more")
    if len(texts) > min(options.max_texts, options.max_waiting):
        raise _Refused(413, f"a request may have {options.max_texts} texts; got {len(texts)}")
    for text in texts:
        parts = [text] if isinstance(text, str) else text if isinstance(text, list) else []
        if any(isinstance(p, str) and len(p) > options.max_characters for p in parts):
            raise _Refused(413, f"a text may have {options.max_characters} characters")
    return texts


def _answer(
    classifier: AdaptiveClassifier, found: Prediction, row: Row, detail: bool
) -> dict[str, Any]:
    answer: dict[str, Any] = {"label": found.label, "probability": found.probability}
    answer |= {"exit": found.exit, "cost": found.cost}
    if detail:
        answer["exits"] = [
            {"layer": layer, "label": label, "probability": probability}
            for layer, label, probability in classifier.passed(row)
        ]
    return answer


if __name__ == "__main__":
    sys.exit(main())
