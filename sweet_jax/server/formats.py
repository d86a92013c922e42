"""The formats of requests and responses: the definition of a format, and sweet_jax's own."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from starlette.responses import JSONResponse, Response

from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.predictions import (
    ExitPrediction,
    Prediction,
    is_finite,
    make_exit_predictions,
)
from sweet_jax.server.refusals import Refusal, RefusedError
from sweet_jax.server.requests import (
    TARGET_KEYS,
    Answered,
    Limits,
    Question,
    check_flags,
    check_sizes,
    read_target,
)


class Format(NamedTuple):
    """Describes a format.

    Attributes:
      key: key of the body by which the format is recognized.
      parse: function from (body, model, limits) to a question; raises RefusedError.
      refuse: function from a refusal to the response.

    """

    key: str
    parse: Callable[[Mapping[str, Any], ModelArtifact, Limits], Question]
    refuse: Callable[[Refusal], Response]


def _parse(values: Mapping[str, Any], _: ModelArtifact, limits: Limits) -> Question:
    keys = ("texts", TARGET_KEYS[0], "detail", *TARGET_KEYS[1:])
    unknown = sorted(values.keys() - set(keys))
    if unknown:
        choices = ", ".join(keys)
        raise RefusedError(400, f"unknown key {unknown[0]!r}: choose from {choices}")
    (detail,) = check_flags(values, "detail")
    policy, target = read_target(values)
    texts = values.get("texts")
    if not isinstance(texts, list) or not texts:
        raise RefusedError(400, "texts must be a list of at least one text")
    check_sizes(texts, limits)
    return Question(texts, functools.partial(_answer, detail=bool(detail)), policy, target)


def _answer(model: ModelArtifact, answered: Answered, *, detail: bool) -> dict[str, Any]:
    answers = []
    for prediction, request in answered:
        exits = make_exit_predictions(model, request) if detail else None
        answers.append(_as_json(prediction, exits))
    return {"answers": answers}


def _as_json(prediction: Prediction, exits: list[ExitPrediction] | None) -> dict[str, Any]:
    """Returns an element of "answers"; with `exits`, it includes every exit that was reached."""
    check_finite(prediction)
    answer: dict[str, Any] = {"label": prediction.label}
    if prediction.probability is not None:  # a regression has none
        answer["probability"] = prediction.probability
    answer |= {"exit": prediction.exit, "cost": prediction.cost}
    if exits is not None:
        answer["exits"] = [
            exit._asdict()
            if is_finite(exit.label, exit.probability)
            else {"layer": exit.layer, "label": None, "probability": None}  # the exit diverged
            for exit in exits
        ]
    return answer


def check_finite(prediction: Prediction) -> None:
    """Raises RefusedError if a prediction is not finite, since the model's training diverged."""
    if not prediction.is_finite:
        message = "the model's answer is not a number: its training diverged"
        raise RefusedError(500, message, "Backend")


def _refuse(refusal: Refusal) -> Response:
    return JSONResponse({"error": refusal.message}, refusal.status, refusal.headers)


NATIVE = Format("texts", _parse, _refuse)
