"""The server under load: right answers, bounded memory, nothing accepted is lost.

    pip install -e ".[serve]"
    python -m experiments.benchmarks.serve_load --model=runs/sst2/model --data_dir=DIR

Starts python -m sweet_jax.serve as a process of its own and sends it, over loopback, for a minute,
the requests of 200 clients at once: most ask for 1 to 8 real validation texts at one of four
targets, some send their body slowly, some send rubbish, some 10 MB, some close the connection
before the answer. Every answer is compared with what this process computes itself. SIGTERM comes
while they all still ask; whatever the server had read must be answered. Prints requests and texts a
second, the latencies of good requests, statuses, wrong and lost answers, and the server's memory
over time. Exit status 1 where an answer was wrong or lost. 2 to 6 minutes on 2 cores, which the
clients share with the server.
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from sweet_jax import AdaptiveClassifier

TARGETS = ({}, {"threshold": 0.7}, {"policy": "patience", "threshold": 2}, {"cost": 0.5})
# What a client does, and how often.
KINDS = {"good": 80, "slow": 6, "rubbish": 6, "large": 3, "killed": 5}


@dataclasses.dataclass
class Tally:
    """What all clients saw."""

    statuses: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    seconds: list[float] = dataclasses.field(default_factory=list)
    texts: int = 0
    wrong: int = 0
    lost: int = 0  # good requests, wholly sent before SIGTERM, without an answer
    closing: bool = False


def expected(classifier: AdaptiveClassifier, texts: list[str]) -> list[Any]:
    """Returns the predictions of every text at each target."""
    found = []
    for target in TARGETS:
        policy = target.get("policy")
        other = {k: v for k, v in target.items() if k != "policy"}
        found.append(classifier.at(policy, **other).predict(texts) if target else None)
    found[0] = classifier.predict(texts)
    return found


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


def right(answers: list[dict], wanted: Any, picked: list[int]) -> bool:
    """Returns whether they are those of the `picked` texts."""
    return len(answers) == len(picked) and all(
        answer["exit"] == wanted.exits[place]
        and answer["label"] == wanted.labels[place]
        and abs(answer["probability"] - wanted.probabilities[place].max()) < 1e-5
        for answer, place in zip(answers, picked, strict=True)
    )


async def client(port: int, seed: int, texts: list[str], wanted: list[Any], tally: Tally) -> None:
    """Asks until the server closes."""
    rng = random.Random(seed)
    while not tally.closing:
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        number, picked = (
            rng.randrange(len(TARGETS)),
            rng.choices(range(len(texts)), k=rng.randint(1, 8)),
        )
        asked = {"texts": [texts[p] for p in picked], **TARGETS[number]}
        body = json.dumps(asked).encode()
        if kind == "rubbish":
            body = rng.randbytes(rng.randint(1, 2000))
        elif kind == "large":
            body = b"x" * 10_000_000
        began = time.perf_counter()
        try:
            status, found = await exchange(port, body, kind)
        except OSError:  # it no longer listens
            return
        if kind == "good" and not tally.closing:
            tally.seconds.append(time.perf_counter() - began)
        tally.statuses[kind, status] += 1
        if status == 200:
            tally.texts += len(picked)
            tally.wrong += not right(json.loads(found)["answers"], wanted[number], picked)
        elif kind == "good" and status != 503 and not tally.closing:
            tally.lost += 1


def memory(process: subprocess.Popen) -> float:
    """Returns the MiB of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmRSS")).split()[1]) / 1024


async def load(
    process: subprocess.Popen, port: int, texts: list[str], wanted: list[Any], seconds: float
) -> tuple[Tally, list[float]]:
    """All clients for so long, then SIGTERM while they go on."""
    tally, sizes = Tally(), []
    clients = [asyncio.create_task(client(port, seed, texts, wanted, tally)) for seed in range(200)]
    for _ in range(6):
        await asyncio.sleep(seconds / 6)
        sizes.append(memory(process))
    # These are read by the server before the signal: each must be answered.
    last = [
        asyncio.create_task(
            exchange(port, json.dumps({"texts": texts[i : i + 8]}).encode(), "good")
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model/ of a run")
    parser.add_argument("--data_dir", required=True, help="<task>/validation.parquet")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    classifier = AdaptiveClassifier.from_pretrained(options.model)
    name = classifier.model.task
    (column,) = classifier.text_columns
    table = pyarrow.parquet.read_table(Path(options.data_dir) / name / "validation.parquet")
    texts = table[column].to_pylist()[:300]
    wanted = expected(classifier, texts)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "sweet_jax.serve", f"--model={options.model}"),
            *("--port=0", "--warm_up", "--batch_size=16"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("serving"):
        assert process.poll() is None, "the server did not start"
    port, before = int(line.rsplit(":", 1)[1]), memory(process)
    began = time.perf_counter()
    tally, sizes = asyncio.run(load(process, port, texts, wanted, options.seconds))
    seconds = time.perf_counter() - began
    status = process.wait(timeout=120)
    p50, p95, p99 = np.quantile(tally.seconds, [0.5, 0.95, 0.99])
    requests = sum(tally.statuses.values())
    print(f"{requests / seconds:.1f} requests/s, {tally.texts / seconds:.1f} texts/s answered")
    print(f"good requests: p50 {p50:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s (200 clients at once)")
    for (kind, code), count in sorted(tally.statuses.items()):
        print(f"  {kind}: status {code or 'connection closed'}: {count}")
    print(f"memory, MiB: {before:.0f} before, then {', '.join(f'{s:.0f}' for s in sizes)}")
    print(f"wrong answers {tally.wrong}, lost answers {tally.lost}, exit status {status}")
    return int(bool(tally.wrong or tally.lost or status))


if __name__ == "__main__":
    sys.exit(main())
