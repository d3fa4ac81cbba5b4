"""The description of the interface that the server gives of itself: OpenAPI 3.1."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from losa_export.runtimes.serve.requests import ChatRequest, CompletionRequest

Json = dict[str, Any]

_REFUSALS = {
    400: "a field is wrong, or prompt and answer do not fit",
    401: "the API key is missing or wrong",
    404: "there is no such model here",
    408: "the body came too slowly",
    413: "the body is too long",
    415: "the body is not JSON",
    429: "too many requests wait; Retry-After tells when to ask again",
    500: "the server or the model failed",
    503: "no slot became free in time, or the server is shutting down",
}


def describe(model: str) -> Json:
    """The document. `model` is the name of the model that is served."""
    bodies: list[type[BaseModel]] = [ChatRequest, CompletionRequest]
    _, defined = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": f"losa-export serving {model}", "version": version("losa-export")},
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/chat/completions": {"post": _generate("Continue a conversation", "ChatRequest", "ChatAnswer")},
            "/v1/completions": {"post": _generate("Continue a text", "CompletionRequest", "TextAnswer")},
            "/v1/models": {"get": _read("The model that is served", "Models", (401,))},
            "/v1/models/{name}": {
                "get": _read("One model", "Model", (401, 404))
                | {
                    "parameters": [
                        {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                    ]
                }
            },
            "/health/live": {"get": _health("Whether the process works")},
            "/health/ready": {"get": _health("Whether new requests are welcome")},
            "/metrics": {
                "get": {
                    "summary": "Figures for Prometheus",
                    "security": [],
                    "responses": {"200": {"description": "figures", "content": {"text/plain": {}}}},
                }
            },
        },
        "components": {
            "schemas": {**{name: _nullable(schema) for name, schema in defined["$defs"].items()}, **_ANSWERS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _nullable(schema: Json) -> Json:
    """A body's schema in which each field that may be absent may also be null, as `requests` takes it."""
    required = schema.get("required", [])
    properties = {
        name: field if name in required else {"anyOf": [field, {"type": "null"}]}
        for name, field in schema.get("properties", {}).items()
    }
    return {**schema, "properties": properties}


def _reference(name: str) -> Json:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}


def _refused(statuses: tuple[int, ...]) -> Json:
    retry = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
    return {
        str(status): {
            "description": _REFUSALS[status],
            "content": {"application/json": _reference("Error")},
            **({"headers": retry} if status in (429, 503) else {}),
        }
        for status in statuses
    }


def _generate(summary: str, body: str, answer: str) -> Json:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": _reference(body)}},
        "responses": {
            "200": {
                "description": "the answer; as server-sent events if 'stream' is true",
                "content": {
                    "application/json": _reference(answer),
                    "text/event-stream": {"schema": _object({"data": _TEXT})},
                },
            },
            **_refused(tuple(_REFUSALS)),
        },
    }


def _read(summary: str, answer: str, refusals: tuple[int, ...]) -> Json:
    good = {"200": {"description": "found", "content": {"application/json": _reference(answer)}}}
    return {"summary": summary, "responses": {**good, **_refused(refusals)}}


def _health(summary: str) -> Json:
    content = {"application/json": _reference("Health")}
    return {
        "summary": summary,
        "security": [],
        "responses": {
            "200": {"description": "yes", "content": content},
            "503": {"description": "no", "content": content},
        },
    }


def _object(required: Json, **more: Any) -> Json:
    return {"type": "object", "properties": required, "required": list(required), **more}


_WHOLE, _TEXT = {"type": "integer", "minimum": 0}, {"type": "string"}
_MAYBE_TEXT = {"type": ["string", "null"]}
_FINISH = {"enum": ["stop", "length"]}
_USAGE = _object(
    {
        "prompt_tokens": _WHOLE,
        "completion_tokens": _WHOLE,
        "total_tokens": _WHOLE,
        "prompt_tokens_details": _object({"cached_tokens": _WHOLE}),
    }
)


def _answer(kind: str, said: Json) -> Json:
    choice = _object(
        {"index": _WHOLE, **said, "logprobs": {"type": ["object", "null"]}, "finish_reason": _FINISH},
    )
    head = {"id": _TEXT, "object": {"const": kind}, "created": _WHOLE, "model": _TEXT}
    return _object({**head, "choices": {"type": "array", "items": choice, "minItems": 1}, "usage": _USAGE})


_MODEL = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _WHOLE,
        "owned_by": _TEXT,
        "losa": _object(
            {
                "kernel_row": _MAYBE_TEXT,
                "threads": _WHOLE,
                "slots": _WHOLE,
                "context_tokens": _WHOLE,
                "sparsity_fraction": {"type": ["number", "null"]},
                "values": _MAYBE_TEXT,
                "weights_bytes": _WHOLE,
            }
        ),
    }
)
_MESSAGE = _object({"role": {"const": "assistant"}, "content": _TEXT})
_ANSWERS = {
    "ChatAnswer": _answer("chat.completion", {"message": _MESSAGE}),
    "TextAnswer": _answer("text_completion", {"text": _TEXT}),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}}),
    "Health": _object({"status": {"enum": ["live", "ready", "draining", "hung"]}}),
    "Error": _object(
        {"error": _object({"message": _TEXT, "type": _TEXT, "param": _MAYBE_TEXT, "code": _MAYBE_TEXT})},
    ),
}
