"""The OpenAPI 3.1 document of the server, for one model and its limits.

It is written by hand; a test compares it with the routes and their responses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sweet_jax import __version__
from sweet_jax.arguments import target_descriptions
from sweet_jax.exits.targets import TARGET_RANGES
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.server.requests import LARGEST_NUMBER, Limits
from sweet_jax.server.tei import ERROR_STATUSES

_NATIVE_REFUSALS = {
    400: "The request is malformed, or its target cannot be met",
    408: "The body was not received in time",
    413: "The body or a text is too large, or there are too many texts",
    500: "The answer is not a number: the model's training diverged",
    503: "Too many texts are waiting, or the model can no longer be run",
    504: "The texts were not classified in time",
}
_TEI_REFUSALS = {
    400: "`inputs` is empty",
    408: _NATIVE_REFUSALS[408],
    413: _NATIVE_REFUSALS[413],
    422: _NATIVE_REFUSALS[400],
    424: "The model cannot be run, or its answer is not a number",
    429: "Too many texts are waiting, or the texts were not classified in time",
}
_STRING = {"type": "string"}
_FLAG: dict[str, Any] = {"type": ["boolean", "null"], "default": False}
_PROBABILITY = {"type": "number", "minimum": 0, "maximum": 1}


def describe_api(model: ModelArtifact, limits: Limits) -> dict[str, Any]:
    """Returns the document, as JSON values."""
    description = (
        f"Classifies each text at the first of {len(model.layers)} exits that is confident enough."
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"sweet_jax: {model.task}",
            "description": description,
            "version": __version__,
        },
        "paths": _describe_paths(),
        "components": {"schemas": _native_schemas(model, limits) | _tei_schemas(model, limits)},
    }


def _describe_paths() -> dict[str, Any]:
    native, tei = _names(""), _names("Tei")
    either = [{"anyOf": pair} for pair in zip(native, tei, strict=True)]
    statuses = {
        status: "; with `inputs`: ".join(
            texts[status] for texts in (_NATIVE_REFUSALS, _TEI_REFUSALS) if status in texts
        )
        for status in sorted(_NATIVE_REFUSALS.keys() | _TEI_REFUSALS.keys())
    }
    health, unhealthy = _reference("Health"), _reference("TeiError")
    return {
        "/predict": {"post": _post("Classifies texts, in either format", either, statuses)},
        "/v1/predict": {"post": _post("Classifies texts", native, _NATIVE_REFUSALS)},
        "/": {
            "get": _get("A page to try the model", _content(_STRING, "text/html")),
            "post": _post("Like /predict of text-embeddings-inference", tei, _TEI_REFUSALS),
        },
        "/healthz": {"get": _get("Whether the server works", _content(health), health)},
        "/health": {"get": _get("Like /health of text-embeddings-inference", {}, unhealthy)},
        "/metrics": {"get": _get("Metrics for Prometheus", _content(_STRING, "text/plain"))},
        "/audit": {"get": _audit_page()},
        "/openapi.json": {"get": _get("This document", _content({"type": "object"}))},
    }


def _audit_page() -> dict[str, Any]:
    operation = _get("The results of the audit", _content(_STRING, "text/html"))
    missing = {"description": "The server runs without an audit"}
    operation["responses"]["404"] = missing | _content(_reference("Error"))
    return operation


def _names(prefix: str) -> list[dict[str, Any]]:
    """Returns the schemas of a format's request, response and error."""
    return [_reference(prefix + name) for name in ("PredictRequest", "PredictResponse", "Error")]


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: Mapping[str, Any], media_type: str = "application/json") -> dict[str, Any]:
    return {"content": {media_type: {"schema": schema}}}


def _post(summary: str, schemas: Sequence[Any], refusals: Mapping[int, str]) -> dict[str, Any]:
    """Returns an operation, whose schemas are those of its request, response and error."""
    request, answer, refusal = schemas
    responses = {"200": {"description": "The predictions"} | _content(answer)}
    for status, text in refusals.items():
        responses[str(status)] = {"description": text} | _content(refusal)
    body = {"required": True} | _content(request)
    return {"summary": summary, "requestBody": body, "responses": responses}


def _get(summary: str, content: Mapping[str, Any], unhealthy: Any = None) -> dict[str, Any]:
    responses = {"200": {"description": summary, **content}}
    if unhealthy is not None:
        description = {"description": "The server can no longer classify texts"}
        responses["503"] = description | _content(unhealthy)
    return {"summary": summary, "responses": responses}


def _object(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> Any:
    optional = optional or {}
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _target_schemas(model: ModelArtifact) -> dict[str, Any]:
    """Returns the schemas of the policy and of the targets, of which a request has at most one."""
    policies = sorted(model.resolver.fronts)
    description = "Exit policy; defaults to the server's"
    properties: dict[str, Any] = {"policy": {"enum": [*policies, None], "description": description}}
    for name, text in target_descriptions().items():
        low, high = TARGET_RANGES[name]
        bounds: dict[str, float] = {}
        if abs(low) < LARGEST_NUMBER:
            bounds["minimum"] = low
        else:
            bounds["exclusiveMinimum"] = -LARGEST_NUMBER
        if high < LARGEST_NUMBER:
            bounds["maximum"] = high
        else:
            bounds["exclusiveMaximum"] = LARGEST_NUMBER
        properties[name] = {"type": ["number", "null"], **bounds, "description": text}
    return properties


def _native_schemas(model: ModelArtifact, limits: Limits) -> dict[str, Any]:
    text = {"type": "string", "maxLength": limits.characters}
    if len(model.text_columns) == 2:
        text = {"type": "array", "items": text, "minItems": 2, "maxItems": 2}
    texts = {"type": "array", "items": text, "minItems": 1}
    texts["maxItems"] = min(limits.texts, limits.waiting)
    label, layer = _label_schema(model), {"enum": list(model.layers)}
    nothing = {"type": "null"}  # for an exit that diverged
    exits = _object(
        {
            "layer": layer,
            "label": {"anyOf": [label, nothing]},
            "probability": {"anyOf": [_PROBABILITY, nothing]},
        }
    )
    properties = {"label": label, "exit": layer, "cost": {"type": "number"}}
    if model.objective.categorical is not None:
        properties["probability"] = _PROBABILITY
    prediction = _object(properties, {"exits": {"type": "array", "items": exits}})
    options = {"detail": _FLAG | {"description": "Include every exit that a text reached"}}
    request = _object({"texts": texts}, options | _target_schemas(model))
    return {
        "PredictRequest": request | {"additionalProperties": False},
        "PredictResponse": _object({"answers": {"type": "array", "items": prediction}}),
        "Error": _object({"error": _STRING}),
        "Health": _object({"status": _STRING}, {"waiting": {"type": "integer"}}),
    }


def _label_schema(model: ModelArtifact) -> dict[str, Any]:
    """Returns the schema of a label: a class, a list of labels, or a number."""
    if model.objective.categorical is None:
        return {"type": "number"}
    name = {"enum": list(model.classes)}
    return {"type": "array", "items": name} if model.objective.column.several else name


def _tei_schemas(model: ModelArtifact, limits: Limits) -> dict[str, Any]:
    count = len(model.text_columns)
    string = {"type": "string", "minLength": 1, "maxLength": limits.characters}
    text = {"type": "array", "items": string, "minItems": count, "maxItems": count}
    batch = {"type": "array", "items": text, "minItems": 1}
    batch["maxItems"] = min(limits.texts, limits.waiting)
    rank = _object({"score": {"type": "number"}, "label": {"enum": list(model.classes)}})
    ranks = {"type": "array", "items": rank}
    options = {
        "raw_scores": _FLAG | {"description": "Return logits instead of probabilities"},
        "truncate": _FLAG
        | {"default": True, "description": "Truncate texts that are too long; false refuses them"},
        "truncation_direction": {"enum": ["left", "right", "Left", "Right", None]},
    }
    inputs = {"anyOf": [*([string] if count == 1 else []), text, batch]}
    kinds = {"enum": [*ERROR_STATUSES, "Unhealthy"]}
    return {
        "TeiPredictRequest": _object({"inputs": inputs}, options | _target_schemas(model)),
        "TeiPredictResponse": {"anyOf": [ranks, {"type": "array", "items": ranks}]},
        "TeiError": _object({"error": _STRING, "error_type": kinds}),
    }
