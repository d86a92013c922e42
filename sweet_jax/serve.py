"""Serves a saved model over HTTP, with the texts of all requests sharing batches.

  pip install -e ".[serve]"
  sweet-jax serve --model=runs/x/model --port=8000 --cost=0.5
  curl localhost:8000/predict -d '{"texts": ["a text", "another"], "cost": 0.5}'

POST /predict   {"texts": [...]} and, to override the server's, policy and one of cost, accuracy,
                error, threshold, milliseconds, risk, agreement (the last two with level) →
                {"answers": [{"label", "probability", "exit", "cost"}, ...]}; with "detail": true
                also every exit that the text reached. A pair of texts is a list of two.
                {"inputs": ...} is answered as by text-embeddings-inference: [{"score", "label"},
                ...]
POST /v1/predict  the same, but only for {"texts": [...]}
GET /openapi.json  all requests and answers, as an OpenAPI document
GET /healthz    200 while texts are classified (/health for text-embeddings-inference's clients)
GET /metrics    metrics in Prometheus' text format
GET /           a page to try the model
GET /audit      with --audit, the results of the audit

With --audit=0.02, two out of a hundred texts also go through all layers, after their answers are
sent and while no other text waits. The agreement of the answers with the full model is monitored:
an alarm is raised when it has fallen below --audit_agreement, by default the agreement that the
calibration rows certify at the operating point. Another alarm is raised when recent texts are no
longer like earlier ones. Both tests are anytime-valid: they may be read at any time (Waudby-Smith
and Ramdas 2024; Vovk et al. 2021).

Statuses: 400 malformed request, 408 body arrives too slowly, 413 body or text too large, 503 too
many texts waiting, 504 not answered in time. On SIGTERM the server answers the requests it has
accepted, and exits. A connection is closed after --timeout seconds without a request, or 5 seconds
after an answer.

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
from sweet_jax.errors import UserError, missing_package
from sweet_jax.exits.targets import check_targets
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.inference.engine_choice import describe_default
from sweet_jax.inference.engine_table import ENGINES
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
    parser.add_argument("--port", type=int, default=8000, help="port to bind (default 8000)")
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
        raise UserError(f"--port must be from 0 (any free port) to 65535; got {options.port}")
    check_audit_arguments(options)
    return options


def _parse_target(options: argparse.Namespace) -> dict[str, float]:
    """Returns the target of the answers. Raises UserError, see `check_targets`.

    With --audit, --level without --risk or --agreement sets the confidence of the default alarm
    threshold, see `make_audit`.
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
            # The worker may need all exits: a request may have another target than the server.
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
            # Reading a request may take one timeout, and answering it another.
            timeout_graceful_shutdown=2 * math.ceil(options.timeout) + 1,
            ws="none",
        )
        close_silent_connections(settings, options.timeout)
        _listen(listener)  # from here on, requests wait instead of being refused
        if options.engine is None:
            precision = options.precision or "float32"
            print(describe_default(classifier.model, precision), file=sys.stderr, flush=True)
        host, port = listener.getsockname()[:2]
        print(f"serving {options.model} at http://{host}:{port}", flush=True)
        # uvicorn answers the accepted requests and then raises the signal again, which is ignored.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        uvicorn.Server(settings).run(sockets=[listener])


def _bound(host: str, port: int) -> socket.socket:
    """Returns a socket bound to the address, before anything is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        if os.name != "nt":  # on Windows, the option would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except UnicodeError as error:  # a part of the name is empty, or longer than 63 characters
        raise UserError(f"cannot serve at {host}:{port}: this is not a host name") from error
    except OSError as error:
        raise UserError(f"cannot serve at {host}:{port}: {error.strerror or error}") from error
    return listener


def _listen(listener: socket.socket) -> None:
    """Listens on a socket. Raises UserError if another process bound the address meanwhile."""
    try:
        listener.listen(1024)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise UserError(f"cannot serve at {host}:{port}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
