"""Serves a saved model over HTTP; the texts of all requests share batches.

  pip install -e ".[serve]"
  sweet-jax serve --model=runs/x/model --port=8000 --cost=0.5
  curl localhost:8000/predict -d '{"texts": ["a text", "another"], "accuracy": 0.9}'

POST /predict   {"texts": [...]} and, if not the server's own, policy and one of cost, accuracy,
                error, threshold, milliseconds, risk, agreement (the last two with level) →
                {"answers": [{"label", "probability", "exit", "cost"}, ...]}; with "detail": true
                also every exit that the text reached. A pair of texts is a list of two.
                {"inputs": ...} is answered as text-embeddings-inference would: [{"score",
                "label"}, ...]
POST /v1/predict  the same, {"texts": [...]} alone
GET /openapi.json  all requests and answers, as an OpenAPI document
GET /healthz    200 while texts are classified (/health for text-embeddings-inference's clients)
GET /metrics    in Prometheus' text format
GET /           a page to try texts on
GET /audit      with --audit, what the audit has found

With --audit=0.02 two texts of a hundred go through all layers too, after their answers were sent
and while no other text waits. The agreement of the answers with the full model is watched: an alarm
is raised when it has fallen below --audit_agreement, by default what the calibration rows certify
at the operating point; another one when the texts are no longer what they were. They may be looked
at at any time (Waudby-Smith and Ramdas 2024; Vovk et al. 2021).

Statuses: 400 malformed, 408 a body that arrives too slowly, 413 a body or a text that is too large,
503 more texts than may wait, 504 not answered in time. On SIGTERM the server answers the requests
it has accepted, and ends. A connection without a request is closed after --timeout seconds, and 5
seconds after an answer.

"""

import argparse
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from sweet_jax.arguments import ArgumentParser, parse_targets, policy_help, run_command
from sweet_jax.config import UserError
from sweet_jax.errors import missing_package
from sweet_jax.exits.targets import check_targets
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.inference.engine import ENGINES
from sweet_jax.inference.engine_choice import describe_default
from sweet_jax.inference.warm_up import warm_up
from sweet_jax.server.audit_arguments import (
    add_audit_arguments,
    check_audit_arguments,
    make_audit,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.serve", f"{__doc__ or ''}{policy_help()}")
    parser.add_model_arguments(ENGINES)
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default 8000)")
    limits = {
        "batch_size": (32, "maximum texts in a batch"),
        "max_texts": (256, "maximum texts per request"),
        "max_characters": (100_000, "maximum characters per text"),
        "max_body": (1 << 20, "maximum bytes per request"),
        "max_waiting": (2048, "maximum texts waiting or being computed"),
        "max_connections": (1024, "maximum open connections"),
    }
    for name, (default, text) in limits.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default {default})"
        )
    parser.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        help="seconds to read or answer a request (default 30)",
    )
    parser.add_argument(
        "--warm_up", action="store_true", help="compile every program before the first request"
    )
    add_audit_arguments(parser)
    options = parser.parse_args(argv)
    _parse_target(options)
    for name in (*limits, "timeout"):
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"--{name} must be more than 0; got {getattr(options, name)}")
    if not 0 <= options.port < 1 << 16:
        raise UserError(f"--port must be from 0 (any free one) to 65535; got {options.port}")
    check_audit_arguments(options)
    return options


def _parse_target(options: argparse.Namespace) -> dict[str, float]:
    """Returns the target of the answers. Raises UserError, see `check_targets`.

    Beside an audit a level without a certificate is that of what the calibration rows certify, see
    `make_audit`.
    """
    if options.audit and options.risk is None and options.agreement is None:
        check_targets({"agreement": 0, "level": options.level}, "--")
        options = argparse.Namespace(**vars(options) | {"level": None})
    return parse_targets(options)


def _run(options: argparse.Namespace) -> None:
    try:
        import uvicorn

        from sweet_jax.server.app import Limits, make_app
        from sweet_jax.server.connections import close_silent_connections
    except ImportError as error:
        package = missing_package(error)
        raise UserError(f'the server needs {package}: pip install -e ".[serve]"') from error

    with _bound(options.host, options.port) as listener:
        target = _parse_target(options)
        classifier = AdaptiveClassifier.from_pretrained(
            options.model,
            policy=options.policy,
            engine=options.engine,
            threads=options.threads,
            precision=options.precision,
            **target,  # type: ignore[arg-type] # mypy cannot tell a dict's keys
        )
        if options.warm_up:
            # With all exits, as the worker: a request may have another target than the server.
            warm_up(classifier, options.batch_size, full=False)
        limits = Limits(
            options.max_texts,
            options.max_characters,
            options.max_body,
            options.max_waiting,
            options.timeout,
        )
        audit = make_audit(classifier, options) if options.audit else None
        app = make_app(classifier, options.batch_size, limits, audit)
        settings = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=options.max_connections,
            # A request may be read for one timeout, and answered for another.
            timeout_graceful_shutdown=2 * math.ceil(options.timeout) + 1,
            ws="none",
        )
        close_silent_connections(settings, options.timeout)
        _listen(listener)  # from here on a request waits, and is not refused
        if options.engine is None:
            precision = options.precision or "float32"
            print(describe_default(classifier.model, precision), file=sys.stderr, flush=True)
        host, port = listener.getsockname()[:2]
        print(f"serving {options.model} at http://{host}:{port}", flush=True)
        # uvicorn answers what it has accepted, and then raises the signal again: all is done then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        uvicorn.Server(settings).run(sockets=[listener])


def _bound(host: str, port: int) -> socket.socket:
    """Returns a socket bound to the address, before anything is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except UnicodeError as error:  # a part is empty, or longer than 63 characters
        raise UserError(f"cannot serve at {host}:{port}: not the name of a host") from error
    except OSError as error:
        raise UserError(f"cannot serve at {host}:{port}: {error.strerror or error}") from error
    return listener


def _listen(listener: socket.socket) -> None:
    """Listens. Another process may have bound the address too, while both were loading."""
    try:
        listener.listen(1024)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise UserError(f"cannot serve at {host}:{port}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
