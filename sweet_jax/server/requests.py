"""Reads and checks HTTP requests: their body, texts and target."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request

from sweet_jax.errors import check_choice
from sweet_jax.exits.policies import POLICIES
from sweet_jax.exits.targets import TARGET_RANGES
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.predictions import Prediction, Text
from sweet_jax.inference.scheduler import Request as TextRequest
from sweet_jax.server.refusals import RefusedError

TARGET_KEYS = ("policy", *TARGET_RANGES)
LARGEST_NUMBER = 1e6  # a target's absolute value must be less than this

Answered = Sequence[tuple[Prediction, TextRequest]]  # for each text, in order


@dataclasses.dataclass(frozen=True)
class Limits:
    """Holds the limits on requests."""

    texts: int = 256  # maximum number of texts of a request
    characters: int = 100_000  # maximum number of characters of a text
    body: int = 1 << 20  # maximum size of a request's body in bytes
    waiting: int = 2048  # maximum number of texts that wait or are being computed
    timeout: float = 30.0  # maximum seconds to read a request, and to answer it


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """Holds the contents of one request.

    Attributes:
      texts: the texts to classify.
      answer: function from (model, predictions) to the content of the response.
      policy: name of an exit policy; None for the server's.
      target: target by name in TARGET_RANGES; empty for the server's.
      truncation: side on which a text that is too long is truncated, "left" or "right"; "none"
        refuses such a text; None for the model's own side.

    """

    texts: Sequence[Text]
    answer: Callable[[ModelArtifact, Answered], Any]
    policy: str | None = None
    target: Mapping[str, float] = dataclasses.field(default_factory=dict)
    truncation: str | None = None


# A body of up to this many times the limit is read to its end and dropped: if the connection were
# closed while the client is still sending, the client would not get the response.
_DROPPED = 16


async def read_body(request: Request, limits: Limits) -> bytes:
    """Reads the body. Raises RefusedError if it is too large or takes too long."""
    too_large = RefusedError(413, f"a request may have at most {limits.body} bytes")
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
        message = f"the request body was not received within {limits.timeout:g} seconds"
        raise RefusedError(408, message) from error
    return b"".join(parts)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses a body as a JSON object. Raises RefusedError for anything else."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is not valid JSON") from error
    if not isinstance(values, dict):
        raise RefusedError(400, 'the body must be a JSON object, such as {"texts": [...]}')
    return values


def check_flags(values: Mapping[str, Any], *names: str) -> list[bool | None]:
    """Returns the values of some keys. Raises RefusedError for a value that is not a boolean."""
    for name in names:
        if not isinstance(values.get(name), bool | None):
            raise RefusedError(400, f"{name} must be true or false; got {values[name]!r:.40}")
    return [values.get(name) for name in names]


def read_target(values: Mapping[str, Any]) -> tuple[str | None, dict[str, float]]:
    """Returns the policy and the target of a request.

    Raises RefusedError for invalid values, and UserError for an unknown policy.
    """
    policy = values.get("policy")
    target = {name: values[name] for name in TARGET_RANGES if values.get(name) is not None}
    if policy is not None and not isinstance(policy, str):
        raise RefusedError(400, f"policy must be a string; got {policy!r:.40}")
    if policy is not None:
        # Only these: a name "module:function" would make the server import code.
        check_choice("policy", policy, POLICIES)
    for name, value in target.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < LARGEST_NUMBER:
            expected = f"a number with an absolute value below {LARGEST_NUMBER:,.0f}"
            raise RefusedError(400, f"{name} must be {expected}; got {value!r:.40}")
    return policy, target


def check_sizes(texts: Sequence[Any], limits: Limits) -> None:
    """Raises RefusedError for too many texts, or a text with too many characters."""
    most = min(limits.texts, limits.waiting)
    if len(texts) > most:
        raise RefusedError(413, f"a request may have at most {most} texts; got {len(texts)}")
    for text in texts:
        strings = [text] if isinstance(text, str) else text if isinstance(text, list) else []
        if any(isinstance(p, str) and len(p) > limits.characters for p in strings):
            raise RefusedError(413, f"a text may have at most {limits.characters} characters")
