"""The format of POST /predict of text-embeddings-inference 1.9, for its clients.

A request is {"inputs": ...}: a text, a pair of texts, or a batch [[text], [text, text], ...]. The
response is [{"score", "label"}, ...], with the most probable class first; for a batch, it is a list
of such lists. Unknown keys are ignored, as in text-embeddings-inference.

Shape letters: C classes.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.responses import JSONResponse, Response

from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.server.formats import Format, check_finite
from sweet_jax.server.refusals import Refusal, RefusedError
from sweet_jax.server.requests import (
    Answered,
    Limits,
    Question,
    check_flags,
    check_sizes,
    read_target,
)

# The status of each error_type in this format, except for errors with status 408 and 413.
ERROR_STATUSES = {"Empty": 400, "Validation": 422, "Backend": 424, "Overloaded": 429}


def _parse(values: Mapping[str, Any], model: ModelArtifact, limits: Limits) -> Question:
    raw_scores, truncate = check_flags(values, "raw_scores", "truncate")
    side = values.get("truncation_direction")
    if side is not None and (not isinstance(side, str) or side.lower() not in ("left", "right")):
        raise RefusedError(400, f"truncation_direction must be left or right; got {side!r:.40}")
    policy, target = read_target(values)
    texts, batch = _read_inputs(values.get("inputs"))
    check_sizes(texts, limits)
    _check_texts(texts, pairs=len(model.text_columns) == 2)
    return Question(
        texts,
        functools.partial(_answer, raw_scores=bool(raw_scores), batch=batch),
        policy,
        target,
        "none" if truncate is False else side and side.lower(),
    )


def _read_inputs(inputs: Any) -> tuple[list[list[str]], bool]:
    """Returns the texts, each as a list of one or two, and whether the request is a batch."""
    if isinstance(inputs, str):
        return [[inputs]], False
    if inputs == []:
        raise RefusedError(400, "`inputs` cannot be empty", "Empty")
    if isinstance(inputs, list) and isinstance(inputs[0], str):
        inputs, batch = [inputs], False
    else:
        batch = True
    if not isinstance(inputs, list) or not all(_is_text(text) for text in inputs):
        message = "`inputs` must be a text, a pair of texts, or a batch of either [[text], ...]"
        raise RefusedError(400, message)
    return inputs, batch


def _is_text(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) in (1, 2)
        and all(isinstance(part, str) for part in value)
    )


def _check_texts(texts: list[list[str]], *, pairs: bool) -> None:
    """Raises RefusedError for empty texts, and for texts that do not match the model.

    A model takes either single texts or pairs of texts.
    """
    if any(len(text) != 1 + pairs for text in texts):
        expected = (
            "pairs of texts: [text, text]" if pairs else "single texts; a batch is [[text], ...]"
        )
        raise RefusedError(400, f"this model takes {expected}")
    if not all(any(text) for text in texts):
        raise RefusedError(400, "`inputs` cannot be empty", "Empty")


def _answer(
    model: ModelArtifact, answered: Answered, *, raw_scores: bool, batch: bool
) -> list[Any]:
    answers = []
    for prediction, request in answered:
        check_finite(prediction)
        scores = request.logits[-1] if raw_scores else prediction.probabilities  # [C]
        if not len(scores):  # a regression has a number instead of probabilities
            scores = np.asarray([prediction.label], np.float64)
        order = np.argsort(-scores, kind="stable")
        answers.append([{"score": float(scores[c]), "label": model.classes[c]} for c in order])
    return answers if batch else answers[0]


def _refuse(refusal: Refusal) -> Response:
    status = refusal.status
    if status not in (408, 413):
        status = ERROR_STATUSES[refusal.error_type]
    content = {"error": refusal.message, "error_type": refusal.error_type}
    return JSONResponse(content, status, refusal.headers)


TEI = Format("inputs", _parse, _refuse)
