r"""Tests a server under load: correct predictions, bounded memory, and no request lost.

    pip install -e ".[serve,onnx]"
    python -m experiments.benchmarks.serve_load --model=runs/sst2/model --data_dir=DIR
    python -m experiments.benchmarks.serve_load --model=runs/sst2/model --data_dir=DIR \
        --engine=onnxruntime --precision=int8 --plain

Starts `python -m sweet_jax.serve` as a process and sends it the requests of 200 concurrent clients
over loopback for a minute. Most requests have 1 to 8 validation texts and one of four targets. Some
send their body slowly, some send random bytes, some send 10 MB, and some close the connection
before the response. Every prediction is compared with one computed in this process. SIGTERM is sent
while the clients still send requests, and the server must respond to all that it had read. With
--plain, the same is done with `plain_server`, the full model alone, whose requests have no target.

Prints for each server the seconds until it was ready, requests and texts per second, latencies of
valid requests, processor time per text, statuses, wrong predictions, lost requests, and its memory
over time. The exit status is 1 if sweet_jax.serve gave a wrong prediction, lost a request or ended
with another status than 0. With --rate=171, all clients together send 171 requests per second;
without it, each client sends the next request as soon as it has a response. Takes 2 to 6 minutes
for each server on 2 cores, which the clients share with it.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.load_clients import CLIENTS, Server, Tally, run_client, send_request
from experiments.benchmarks.validation_texts import read_validation_texts
from sweet_jax import AdaptiveClassifier
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.errors import UserError
from sweet_jax.inference.predictions import Predictions

_TARGETS: tuple[dict[str, Any], ...] = (
    {},
    {"threshold": 0.7},
    {"policy": "patience", "threshold": 2},
    {"cost": 0.5},
)
_TEXTS = 300


def predict_at(
    classifier: AdaptiveClassifier, target: Mapping[str, Any], texts: list[str]
) -> Predictions:
    """Returns the predictions for all texts at a target of `_TARGETS`."""
    target = dict(target)
    policy = target.pop("policy", None)
    return (classifier.at(policy, **target) if target else classifier).predict(texts)


def memory(process: subprocess.Popen) -> float:
    """Returns the resident memory of a process in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmRSS")).split()[1]) / 1024


def processor_seconds(process: subprocess.Popen) -> float:
    """Returns the processor time of a process so far, in seconds."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def run_clients(
    process: subprocess.Popen, server: Server, texts: list[str], seconds: float
) -> tuple[Tally, list[float]]:
    """Runs all clients, and sends SIGTERM after some seconds while they continue.

    Returns the counts, and the server's memory in MiB at six times.
    """
    tally, sizes, before = Tally(), [], processor_seconds(process)
    clients = [
        asyncio.create_task(run_client(server, seed, texts, tally)) for seed in range(CLIENTS)
    ]
    for _ in range(6):
        await asyncio.sleep(seconds / 6)
        sizes.append(memory(process))
    tally.processor_seconds = (processor_seconds(process) - before) / max(tally.texts, 1)
    # The server reads these before the signal, so it must respond to each of them.
    last = [
        asyncio.create_task(
            send_request(server.port, json.dumps({"texts": texts[i : i + 8]}).encode(), "good")
        )
        for i in range(40)
    ]
    await asyncio.sleep(0.5)
    tally.is_closing = True
    process.send_signal(signal.SIGTERM)
    for task in last:
        status, _ = await task
        tally.statuses["at SIGTERM", status] += 1
        tally.lost += status not in (200, 503)
    await asyncio.gather(*clients, return_exceptions=True)
    return tally, sizes


def wait_until_ready(process: subprocess.Popen, port: int) -> None:
    """Returns once the process listens at the port; raises UserError if it ends before."""
    while True:
        if process.poll() is not None:
            raise UserError("the server did not start: its message is above")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)


def measure(server: Server, texts: list[str], seconds: float) -> bool:
    """Prints the measurements of one server; returns whether it passed the test."""
    start = time.perf_counter()
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL)
    try:
        wait_until_ready(process, server.port)
        print(f"{server.name}: ready after {time.perf_counter() - start:.1f} s")
        before, start = memory(process), time.perf_counter()
        tally, sizes = asyncio.run(run_clients(process, server, texts, seconds))
        duration = time.perf_counter() - start
        status = process.wait(timeout=120)
    finally:
        process.kill()
    p50, p95, p99 = np.quantile(tally.latencies, [0.5, 0.95, 0.99])
    requests = sum(tally.statuses.values())
    print(
        f"  {requests / duration:.1f} requests/s, {tally.texts / duration:.1f} texts/s answered, "
        f"{1e3 * tally.processor_seconds:.2f} ms of processor time per text"
    )
    print(f"  good requests: p50 {p50:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s ({CLIENTS} clients)")
    for (kind, code), count in sorted(tally.statuses.items()):
        print(f"    {kind}: status {code or 'connection closed'}: {count}")
    print(f"  memory, MiB: {before:.0f} before, then {', '.join(f'{s:.0f}' for s in sizes)}")
    print(f"  wrong predictions {tally.wrong}, lost requests {tally.lost}, exit status {status}")
    return not (tally.wrong or tally.lost or status)


def find_free_port() -> int:
    """Returns a port at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_servers(
    options: argparse.Namespace, classifier: AdaptiveClassifier, texts: list[str]
) -> list[Server]:
    """Returns sweet_jax's server, and with --plain the plain one."""
    common = [f"--model={options.model}", f"--precision={options.precision}"]
    port = find_free_port()
    command = [sys.executable, "-m", "sweet_jax.serve", *common, f"--port={port}"]
    command += ["--warm_up", "--batch_size=16", f"--engine={options.engine}"]
    command += options.serve.split()
    expected = [predict_at(classifier, target, texts) for target in _TARGETS]
    servers = [Server("sweet_jax.serve", command, port, _TARGETS, expected, 1e-5, options.rate)]
    if options.plain:
        port = find_free_port()
        command = [sys.executable, "-m", "experiments.benchmarks.plain_server", *common]
        command += [f"--port={port}"]
        full = [predict_at(classifier, {"threshold": float("inf")}, texts)]
        # One graph rounds differently from several, and int8 in steps of its own.
        tolerance = 1e-4 if options.precision == "float32" else 0.02
        servers.append(Server("plain_server", command, port, ({},), full, tolerance, options.rate))
    return servers


def main(argv: list[str] | None = None) -> int:
    """Measures the servers; returns 1 if sweet_jax's failed the test, else 0."""
    parser = ArgumentParser("experiments.benchmarks.serve_load", __doc__ or "")
    text = "model/ folder of a run that classifies single texts"
    parser.add_argument("--model", required=True, help=text)
    text = "folder with <task>/validation.parquet, such as GLUE's"
    parser.add_argument("--data_dir", required=True, help=text)
    parser.add_argument("--seconds", type=float, default=60, help="of load (default 60)")
    text = "requests per second of all clients (default: as many as the server responds to)"
    parser.add_argument("--rate", type=float, default=0.0, help=text)
    parser.add_argument("--engine", default="jax", help="engine of sweet_jax.serve (default jax)")
    text = "precision of both servers (default float32)"
    parser.add_argument("--precision", default="float32", help=text)
    parser.add_argument("--plain", action="store_true", help="measure plain_server too")
    parser.add_argument("--serve", default="", help="further options of sweet_jax.serve")
    options = parser.parse_args(argv)
    classifier = AdaptiveClassifier.from_pretrained(
        options.model, engine=options.engine, precision=options.precision
    )
    if len(classifier.text_columns) != 1:
        raise UserError(f"--model={options.model!r} classifies pairs: pass one of single texts")
    texts = read_validation_texts(classifier.model, options.data_dir, _TEXTS)[0]
    servers = make_servers(options, classifier, texts)
    print(f"{classifier.model.task}, {options.precision}, {classifier.engine.description}")
    passed = [measure(server, texts, options.seconds) for server in servers]
    return int(not passed[0])  # the plain server need not pass


if __name__ == "__main__":
    sys.exit(run_command(main))
