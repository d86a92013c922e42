r"""The server under load: right answers, bounded memory, nothing accepted is lost.

    pip install -e ".[serve,onnx]"
    python -m experiments.benchmarks.serve_load --model=runs/sst2/model --data_dir=DIR
    python -m experiments.benchmarks.serve_load --model=runs/sst2/model --data_dir=DIR \
        --engine=onnxruntime --precision=int8 --plain

Starts python -m sweet_jax.serve as a process of its own and sends it, over loopback, for a minute,
the requests of 200 clients at once: most ask for 1 to 8 real validation texts at one of four
targets, some send their body slowly, some send rubbish, some 10 MB, some close the connection
before the answer. Every answer is compared with what this process computes itself. SIGTERM comes
while they all still ask; whatever the server had read must be answered. --plain then does the same
with `plain_server`, the full model alone, whose clients ask without a target. Prints, for each
server, the seconds until it was ready, requests and texts a second, the latencies of good requests,
processor time a text, statuses, wrong and lost answers, and its memory over time. Exit status 1
where an answer of sweet_jax.serve was wrong or lost. With --rate=171 the clients send 171 requests
a second together; without it each asks again as soon as it is answered. 2 to 6 minutes a server on
2 cores, which the clients share with it.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from sweet_jax import AdaptiveClassifier
from sweet_jax.inference.predictions import Predictions

TARGETS = ({}, {"threshold": 0.7}, {"policy": "patience", "threshold": 2}, {"cost": 0.5})
CLIENTS = 200
# What a client does, and how often.
KINDS = {"good": 80, "slow": 6, "rubbish": 6, "large": 3, "killed": 5}


@dataclasses.dataclass
class Tally:
    """Counts what all clients received."""

    statuses: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    seconds: list[float] = dataclasses.field(default_factory=list)
    texts: int = 0
    wrong: int = 0
    lost: int = 0  # good requests, wholly sent before SIGTERM, without an answer
    closing: bool = False
    spent: float = 0.0  # seconds of the server's processors for a text


@dataclasses.dataclass
class Server:
    """A server to measure, and what its clients ask and expect.

    Attributes:
      name: for what is printed.
      command: starts it.
      port: that it listens at.
      targets: of requests.
      expected: the predictions of every text at each target.
      tolerance: of a probability.

    """

    name: str
    command: list[str]
    port: int
    targets: Sequence[Mapping[str, Any]]
    expected: list[Predictions]
    tolerance: float
    rate: float  # requests a second of all clients; 0 for as many as it answers


def predictions_at(
    classifier: AdaptiveClassifier, target: Mapping[str, Any], texts: list[str]
) -> Predictions:
    """Returns the predictions of every text at a target."""
    other = {name: value for name, value in target.items() if name != "policy"}
    return (classifier.at(target.get("policy"), **other) if target else classifier).predict(texts)


async def exchange(port: int, body: bytes, kind: str) -> tuple[int, bytes]:
    """(status, body) of one request; (0, b"") where the connection was closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        writer.write((head + "Connection: close\r\n\r\n").encode())
        if kind == "slow":
            for start in range(0, len(body), max(1, len(body) // 5)):
                writer.write(body[start : start + max(1, len(body) // 5)])
                await writer.drain()
                await asyncio.sleep(0.3)
        else:
            writer.write(body)
        if kind == "killed":
            writer.transport.abort()
            return 0, b""
        await writer.drain()
        found = await reader.read()
        top, _, rest = found.partition(b"\r\n\r\n")
        return (int(top.split()[1]) if top else 0), rest
    except ConnectionError:
        return 0, b""
    finally:
        writer.close()


def right(answers: list[dict], server: Server, number: int, picked: list[int]) -> bool:
    """Returns whether they are those of the `picked` texts at the target of that number."""
    wanted = server.expected[number]
    return len(answers) == len(picked) and all(
        answer.get("exit", wanted.exits[place]) == wanted.exits[place]
        and answer["label"] == wanted.labels[place]
        and abs(answer["probability"] - wanted.probabilities[place].max()) < server.tolerance
        for answer, place in zip(answers, picked, strict=True)
    )


async def client(server: Server, seed: int, texts: list[str], tally: Tally) -> None:
    """Asks until the server closes."""
    rng = random.Random(seed)
    pause = CLIENTS / server.rate if server.rate else 0.0
    due = time.perf_counter() + rng.random() * pause
    while not tally.closing:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        due = max(due + pause, time.perf_counter()) if pause else 0.0
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        number, picked = (
            rng.randrange(len(server.targets)),
            rng.choices(range(len(texts)), k=rng.randint(1, 8)),
        )
        asked = {"texts": [texts[p] for p in picked], **server.targets[number]}
        body = json.dumps(asked).encode()
        if kind == "rubbish":
            body = rng.randbytes(rng.randint(1, 2000))
        elif kind == "large":
            body = b"x" * 10_000_000
        began = time.perf_counter()
        try:
            status, found = await exchange(server.port, body, kind)
        except OSError:  # it no longer listens
            return
        if kind == "good" and not tally.closing:
            tally.seconds.append(time.perf_counter() - began)
        tally.statuses[kind, status] += 1
        if status == 200:
            tally.texts += len(picked)
            tally.wrong += not right(json.loads(found)["answers"], server, number, picked)
        elif kind == "good" and status != 503 and not tally.closing:
            tally.lost += 1


def memory(process: subprocess.Popen) -> float:
    """Returns the MiB of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmRSS")).split()[1]) / 1024


def processor_seconds(process: subprocess.Popen) -> float:
    """Returns the seconds that the processors have spent on a process."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(
    process: subprocess.Popen, server: Server, texts: list[str], seconds: float
) -> tuple[Tally, list[float]]:
    """All clients for so long, then SIGTERM while they continue to ask."""
    tally, sizes, spent = Tally(), [], processor_seconds(process)
    clients = [asyncio.create_task(client(server, seed, texts, tally)) for seed in range(CLIENTS)]
    for _ in range(6):
        await asyncio.sleep(seconds / 6)
        sizes.append(memory(process))
    tally.spent = (processor_seconds(process) - spent) / max(tally.texts, 1)
    # These are read by the server before the signal: each must be answered.
    last = [
        asyncio.create_task(
            exchange(server.port, json.dumps({"texts": texts[i : i + 8]}).encode(), "good")
        )
        for i in range(40)
    ]
    await asyncio.sleep(0.5)
    tally.closing = True
    process.send_signal(signal.SIGTERM)
    for task in last:
        status, _ = await task
        tally.statuses["at SIGTERM", status] += 1
        tally.lost += status not in (200, 503)
    await asyncio.gather(*clients, return_exceptions=True)
    return tally, sizes


def wait_until_ready(process: subprocess.Popen, port: int) -> None:
    """Returns once something listens at the port."""
    while True:
        assert process.poll() is None, "the server did not start"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)


def measure(server: Server, texts: list[str], seconds: float) -> bool:
    """Prints what one server does under load; returns whether it did all that it must."""
    began = time.perf_counter()
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL)
    wait_until_ready(process, server.port)
    print(f"{server.name}: ready after {time.perf_counter() - began:.1f} s")
    before, began = memory(process), time.perf_counter()
    tally, sizes = asyncio.run(load(process, server, texts, seconds))
    took = time.perf_counter() - began
    status = process.wait(timeout=120)
    p50, p95, p99 = np.quantile(tally.seconds, [0.5, 0.95, 0.99])
    requests = sum(tally.statuses.values())
    print(
        f"  {requests / took:.1f} requests/s, {tally.texts / took:.1f} texts/s answered, "
        f"{1e3 * tally.spent:.2f} ms of the processors a text"
    )
    print(f"  good requests: p50 {p50:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s ({CLIENTS} clients)")
    for (kind, code), count in sorted(tally.statuses.items()):
        print(f"    {kind}: status {code or 'connection closed'}: {count}")
    print(f"  memory, MiB: {before:.0f} before, then {', '.join(f'{s:.0f}' for s in sizes)}")
    print(f"  wrong answers {tally.wrong}, lost answers {tally.lost}, exit status {status}")
    return not (tally.wrong or tally.lost or status)


def free_port() -> int:
    """Returns a port at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model/ of a run")
    parser.add_argument("--data_dir", required=True, help="<task>/validation.parquet")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--rate", type=float, default=0.0, help="requests a second (default: as many as it answers)"
    )
    parser.add_argument("--engine", default="jax", help="of sweet_jax's server (default jax)")
    parser.add_argument("--precision", default="float32", help="of both servers")
    parser.add_argument("--plain", action="store_true", help="measure plain_server too")
    parser.add_argument("--serve", default="", help="more options of sweet_jax.serve")
    options = parser.parse_args()
    engine = {"engine": options.engine, "precision": options.precision}
    classifier = AdaptiveClassifier.from_pretrained(options.model, **engine)
    (column,) = classifier.text_columns
    table = pyarrow.parquet.read_table(
        Path(options.data_dir) / classifier.model.task / "validation.parquet"
    )
    texts = table[column].to_pylist()[:300]
    common = [f"--model={options.model}", f"--precision={options.precision}"]
    port = free_port()
    own = [sys.executable, "-m", "sweet_jax.serve", *common, f"--port={port}"]
    own += ["--warm_up", "--batch_size=16", f"--engine={options.engine}", *options.serve.split()]
    wanted = [predictions_at(classifier, target, texts) for target in TARGETS]
    sides = [Server("sweet_jax.serve", own, port, TARGETS, wanted, 1e-5, options.rate)]
    if options.plain:
        port = free_port()
        plain = [sys.executable, "-m", "experiments.benchmarks.plain_server", *common]
        plain += [f"--port={port}"]
        full = [predictions_at(classifier, {"threshold": float("inf")}, texts)]
        # One graph instead of several rounds otherwise, and int8 rounds to its own steps.
        tolerance = 1e-4 if options.precision == "float32" else 0.02
        sides.append(Server("plain_server", plain, port, ({},), full, tolerance, options.rate))
    print(f"{classifier.model.task}, {options.precision}, {classifier.engine.description}")
    done = [measure(side, texts, options.seconds) for side in sides]
    return int(not done[0])  # the plain server need not do all of that


if __name__ == "__main__":
    sys.exit(main())
