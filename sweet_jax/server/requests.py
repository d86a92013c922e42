"""Reads and checks requests: their body, texts and target."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request

from sweet_jax.config import check_choice
from sweet_jax.exits.policies import POLICIES
from sweet_jax.exits.targets import TARGET_RANGES
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.predictions import Prediction, Text
from sweet_jax.inference.scheduler import Request as TextRequest
from sweet_jax.server.refusals import RefusedError

TARGET_KEYS = ("policy", *TARGET_RANGES)
LARGEST_NUMBER = 1e6  # of a target, exclusive

Answered = Sequence[tuple[Prediction, TextRequest]]  # of each text, in order


@dataclasses.dataclass(frozen=True)
class Limits:
    """Holds the largest values that are accepted."""

    texts: int = 256  # of a request
    characters: int = 100_000  # of a text
    body: int = 1 << 20  # bytes of a request
    waiting: int = 2048  # texts waiting or being computed
    timeout: float = 30.0  # seconds to read a request, and to answer it


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """Holds what one request asks.

    Attributes:
      texts: to classify.
      answer: makes the content of the response of their predictions.
      policy: name of an exit policy; None for the server's.
      target: by name in TARGET_RANGES; empty for the server's.
      truncation: "left" or "right", the side on which a text that is too long is cut; "none" where
        such a text is refused; None for the model's own side.

    """

    texts: Sequence[Text]
    answer: Callable[[ModelArtifact, Answered], Any]
    policy: str | None = None
    target: Mapping[str, float] = dataclasses.field(default_factory=dict)
    truncation: str | None = None


# A body up to so many times too large is read to its end, and dropped: a connection closed before
# the client has sent it would take the response with it.
_DROPPED = 16


async def read_body(request: Request, limits: Limits) -> bytes:
    """Reads the body. Raises RefusedError where it is too large or comes too slowly."""
    too_large = RefusedError(413, f"a request may have {limits.body} bytes")
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
        raise RefusedError(408, f"no whole request within {limits.timeout:g} seconds") from error
    return b"".join(parts)


def parse_object(body: bytes) -> dict[str, Any]:
    """Returns the JSON object that a body is. Raises RefusedError for anything else."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is not JSON") from error
    if not isinstance(values, dict):
        raise RefusedError(400, 'the body must be an object: {"texts": [...]}')
    return values


def check_flags(values: Mapping[str, Any], *names: str) -> list[bool | None]:
    """Returns the values of some keys. Raises RefusedError for one that is no truth value."""
    for name in names:
        if not isinstance(values.get(name), bool | None):
            raise RefusedError(400, f"{name} must be true or false; got {values[name]!r:.40}")
    return [values.get(name) for name in names]


def read_target(values: Mapping[str, Any]) -> tuple[str | None, dict[str, float]]:
    """Returns the policy and the target that a request names.

    Raises RefusedError, and UserError for a policy that there is not.
    """
    policy = values.get("policy")
    target = {name: values[name] for name in TARGET_RANGES if values.get(name) is not None}
    if policy is not None and not isinstance(policy, str):
        raise RefusedError(400, "policy must be a name")
    if policy is not None:
        check_choice("policy", policy, POLICIES)  # and no name that Python would import
    for name, value in target.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < LARGEST_NUMBER:
            wanted = f"a number, in size below {LARGEST_NUMBER:,.0f}"
            raise RefusedError(400, f"{name} must be {wanted}; got {value!r:.40}")
    return policy, target


def check_sizes(texts: Sequence[Any], limits: Limits) -> None:
    """Raises RefusedError for too many texts, or one with too many characters."""
    most = min(limits.texts, limits.waiting)
    if len(texts) > most:
        raise RefusedError(413, f"a request may have {most} texts; got {len(texts)}")
    for text in texts:
        parts = [text] if isinstance(text, str) else text if isinstance(text, list) else []
        if any(isinstance(p, str) and len(p) > limits.characters for p in parts):
            raise RefusedError(413, f"a text may have {limits.characters} characters")
