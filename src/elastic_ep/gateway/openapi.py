"""The OpenAPI 3.1 description of the HTTP API, made from the tables that requests are read with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from elastic_ep.gateway.bodies import (
    chat_fields,
    completion_fields,
    detokenize_fields,
    relaunch_fields,
    tokenize_fields,
)
from elastic_ep.gateway.fields import Field, Schema, object_schema
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.wire.messages import RankState

_INTEGER: Schema = {"type": "integer", "minimum": 0}
_STRING: Schema = {"type": "string"}
_NULLABLE: Schema = {"type": ["object", "null"]}
_FINISH: Schema = {"enum": ["stop", "length"]}


def description(settings: ApiSettings) -> dict[str, Any]:
    """The whole document. With API keys, all but the probes and metrics ask for one."""
    guarded = bool(settings.api_keys)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "elastic_ep", "version": settings.version},
        "paths": {**_generating_paths(settings), **_admin_paths(settings)},
        "components": {"schemas": {"Error": _error_schema()}},
    }
    if guarded:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in ("/live", "/health", "/metrics"):
            document["paths"][path]["get"]["security"] = []
    return document


def _generating_paths(settings: ApiSettings) -> dict[str, Any]:
    text_choice = _object(index=_INTEGER, text=_STRING, logprobs=_NULLABLE, finish_reason=_FINISH)
    message = _object(role={"const": "assistant"}, content=_STRING)
    chat_choice = _object(index=_INTEGER, message=message, logprobs=_NULLABLE, finish_reason=_FINISH)
    return {
        "/v1/completions": _generating(
            "Continue a text.", completion_fields(settings), _answer("text_completion", text_choice)
        ),
        "/v1/chat/completions": _generating(
            "Answer in a conversation.", chat_fields(settings), _answer("chat.completion", chat_choice)
        ),
    }


def _admin_paths(settings: ApiSettings) -> dict[str, Any]:
    model = _object(id=_STRING, object={"const": "model"}, created=_INTEGER, max_model_len=_INTEGER)
    models = _object(object={"const": "list"}, data={"type": "array", "items": model})
    health = _json(
        "The service as a whole, and why nobody serves at this moment.",
        _object(healthy={"type": "boolean"}, state=_STRING, serving_ranks=_INTEGER, reason=_STRING),
    )
    name = {"name": "model", "in": "path", "required": True, "schema": _STRING}
    tokens = {"type": "array", "items": _INTEGER}
    tokenized = _object(tokens=tokens, count=_INTEGER, max_model_len=_INTEGER)
    return {
        "/v1/models": _get("The model that is served.", models),
        "/v1/models/{model}": {"parameters": [name], **_get("One model.", model, 404)},
        "/v1/fault_tolerance/status": _get("Each rank's state.", _status_schema()),
        "/v1/fault_tolerance/experts": _get("Who holds which expert.", _experts_schema()),
        "/v1/fault_tolerance/verify": {
            "post": {
                "summary": "Have every rank re-check the bytes of its experts.",
                "responses": {"200": _json("What differs.", _verification_schema()), **_errors(401)},
            }
        },
        "/v1/fault_tolerance/relaunch": _post(
            "Launch dead ranks now: the one that is named, or all. One that runs is left alone.",
            relaunch_fields(),
            _json("Which ranks are launched, which run already.", _relaunch_schema()),
            404,
            503,
            required=False,
        ),
        "/rebalance": {
            "post": {
                "summary": "Spread the experts over the ranks by the load of late.",
                "responses": {
                    "200": _json("Copies planned and made.", _rebalancing_schema()),
                    **_errors(401),
                },
            }
        },
        "/version": _get("The server's version.", _object(version=_STRING)),
        "/live": _get("The process answers.", _object(status=_STRING)),
        "/health": {
            "get": {"summary": "Can a request be served?", "responses": {"200": health, "503": health}}
        },
        "/metrics": {"get": {"summary": "Prometheus metrics.", "responses": {"200": _text("text/plain")}}},
        "/tokenize": _post("Text to token ids.", tokenize_fields(), _json("Token ids.", tokenized)),
        "/detokenize": _post(
            "Token ids to text.", detokenize_fields(settings), _json("Text.", _object(prompt=_STRING))
        ),
    }


def _generating(summary: str, table: Iterable[Field], answer: Schema) -> dict[str, Any]:
    success = _json("The answer, or its server-sent events with `stream`.", answer)
    success["content"]["text/event-stream"] = {"schema": {}}
    return _post(summary, table, success, 404, 429, 503)


def _post(
    summary: str, table: Iterable[Field], success: dict[str, Any], *errors: int, required: bool = True
) -> dict[str, Any]:
    body = {"required": required, "content": {"application/json": {"schema": object_schema(table)}}}
    responses = {"200": success, **_errors(400, 401, 413, *errors)}
    return {"post": {"summary": summary, "requestBody": body, "responses": responses}}


def _get(summary: str, schema: Schema, *errors: int) -> dict[str, Any]:
    return {
        "get": {"summary": summary, "responses": {"200": _json(summary, schema), **_errors(401, *errors)}}
    }


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): _json("An error.", {"$ref": "#/components/schemas/Error"}) for status in statuses}


def _json(summary: str, schema: Schema) -> dict[str, Any]:
    return {"description": summary, "content": {"application/json": {"schema": schema}}}


def _text(media_type: str) -> dict[str, Any]:
    return {"description": "Text.", "content": {media_type: {"schema": _STRING}}}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _answer(kind: str, choice: Schema) -> Schema:
    usage = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
    choices = {"type": "array", "items": choice}
    return _object(
        id=_STRING, object={"const": kind}, created=_INTEGER, model=_STRING, choices=choices, usage=usage
    )


def _error_schema() -> Schema:
    optional = {"type": ["string", "null"]}
    return _object(error=_object(message=_STRING, type=_STRING, param=optional, code=optional))


def _status_schema() -> Schema:
    engine = _object(
        id=_INTEGER,
        status={"enum": ["healthy", "unhealthy", "dead"]},
        state={"enum": [state.value for state in RankState]},
        incarnation=_INTEGER,
        pid={"type": ["integer", "null"]},
        running=_INTEGER,
        waiting=_INTEGER,
        reason=_STRING,
    )
    engines = {"type": "array", "items": engine}
    return _object(
        state=_STRING, epoch=_INTEGER, step={"type": "integer"}, tolerates=_INTEGER, engines=engines
    )


def _experts_schema() -> Schema:
    slot = _object(
        physical=_INTEGER,
        rank=_INTEGER,
        logical={"type": ["integer", "null"]},
        alive={"type": "boolean"},
        checksum={"type": ["string", "null"]},
    )
    layer = _object(layer=_INTEGER, tolerates=_INTEGER, slots={"type": "array", "items": slot})
    return _object(version=_INTEGER, tolerates=_INTEGER, layers={"type": "array", "items": layer})


def _relaunch_schema() -> Schema:
    ranks = {"type": "array", "items": _INTEGER}
    return _object(relaunched=ranks, running=ranks)


def _rebalancing_schema() -> Schema:
    number: Schema = {"type": "number", "minimum": 0}
    return _object(
        planned=_INTEGER, made=_INTEGER, imbalance_before=number, imbalance=number, version=_INTEGER
    )


def _verification_schema() -> Schema:
    corrupt = _object(layer=_INTEGER, physical=_INTEGER, rank=_INTEGER)
    return _object(
        checked=_INTEGER,
        differ={"type": "array", "items": corrupt},
        silent={"type": "array", "items": _INTEGER},
    )
