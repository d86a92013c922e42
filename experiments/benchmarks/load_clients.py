"""The clients of `serve_load`: the requests that they send, and checks of the responses."""

import asyncio
import collections
import dataclasses
import json
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sweet_jax.inference.predictions import Predictions

CLIENTS = 200
# The kinds of requests, with their shares in percent.
_KINDS = {"good": 80, "slow": 6, "rubbish": 6, "large": 3, "killed": 5}


@dataclasses.dataclass
class Tally:
    """Counts what all clients received."""

    statuses: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    latencies: list[float] = dataclasses.field(default_factory=list)  # seconds, of good requests
    texts: int = 0  # in responses with predictions
    wrong: int = 0  # responses with a wrong prediction
    lost: int = 0  # good requests, completely sent before SIGTERM, without a response
    is_closing: bool = False  # whether SIGTERM was sent
    processor_seconds: float = 0.0  # of the server, per text


@dataclasses.dataclass(frozen=True)
class Server:
    """Describes a server to measure, and its requests.

    Attributes:
      name: name to print.
      command: command that starts it.
      port: port at which it listens.
      targets: targets of requests.
      expected: predictions for every text at each target.
      tolerance: largest difference of a probability.
      rate: requests per second of all clients, 0 for as many as it responds to.

    """

    name: str
    command: list[str]
    port: int
    targets: Sequence[Mapping[str, Any]]
    expected: list[Predictions]
    tolerance: float
    rate: float


async def send_request(port: int, body: bytes, kind: str) -> tuple[int, bytes]:
    """Returns the status and the body of the response; 0 and b"" if the connection was closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        writer.write((head + "Connection: close\r\n\r\n").encode())
        if kind == "slow":
            size = max(1, len(body) // 5)
            for start in range(0, len(body), size):
                writer.write(body[start : start + size])
                await writer.drain()
                await asyncio.sleep(0.3)
        else:
            writer.write(body)
        if kind == "killed":
            writer.transport.abort()
            return 0, b""
        await writer.drain()
        response = await reader.read()
        top, _, rest = response.partition(b"\r\n\r\n")
        return (int(top.split()[1]) if top else 0), rest
    except ConnectionError:
        return 0, b""
    finally:
        writer.close()


def is_correct(predictions: list[dict], server: Server, target: int, numbers: list[int]) -> bool:
    """Returns whether predictions are the expected ones.

    Args:
      predictions: predictions of a response.
      server: server with the expected predictions.
      target: index of the request's target.
      numbers: indices of the request's texts.

    """
    expected = server.expected[target]
    return len(predictions) == len(numbers) and all(
        prediction.get("exit", expected.exits[n]) == expected.exits[n]
        and prediction["label"] == expected.labels[n]
        and abs(prediction["probability"] - expected.probabilities[n].max()) < server.tolerance
        for prediction, n in zip(predictions, numbers, strict=True)
    )


async def run_client(server: Server, seed: int, texts: list[str], tally: Tally) -> None:
    """Sends requests until SIGTERM is sent or the server no longer listens."""
    rng = random.Random(seed)
    pause = CLIENTS / server.rate if server.rate else 0.0
    due = time.perf_counter() + rng.random() * pause
    while not tally.is_closing:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        due = max(due + pause, time.perf_counter()) if pause else 0.0
        (kind,) = rng.choices(list(_KINDS), list(_KINDS.values()))
        target = rng.randrange(len(server.targets))
        numbers = rng.choices(range(len(texts)), k=rng.randint(1, 8))
        request = {"texts": [texts[n] for n in numbers], **server.targets[target]}
        body = json.dumps(request).encode()
        if kind == "rubbish":
            body = rng.randbytes(rng.randint(1, 2000))
        elif kind == "large":
            body = b"x" * 10_000_000
        start = time.perf_counter()
        try:
            status, response = await send_request(server.port, body, kind)
        except OSError:  # it no longer listens
            return
        if kind == "good" and not tally.is_closing:
            tally.latencies.append(time.perf_counter() - start)
        tally.statuses[kind, status] += 1
        if status == 200:
            tally.texts += len(numbers)
            predictions = json.loads(response)["answers"]
            tally.wrong += not is_correct(predictions, server, target, numbers)
        elif kind == "good" and status != 503 and not tally.is_closing:
            tally.lost += 1
