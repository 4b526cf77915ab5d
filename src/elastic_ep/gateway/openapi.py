"""The OpenAPI 3.1 description of the HTTP API, made from the models that requests are read with."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from elastic_ep.gateway.bodies import (
    Drain,
    Kill,
    Relaunch,
    Scale,
    chat_body,
    completion_body,
    detokenize_body,
    tokenize_body,
)
from elastic_ep.gateway.fields import Body, Schema, Schemas
from elastic_ep.gateway.messages.body import count_body, messages_body
from elastic_ep.gateway.responses.body import responses_body
from elastic_ep.gateway.responses.store import MOST_LISTED
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.group import port

_INTEGER: Schema = {"type": "integer", "minimum": 0}
_STRING: Schema = {"type": "string"}
_NULLABLE: Schema = {"type": ["object", "null"]}
_OBJECT: Schema = {"type": "object"}
_EMPTY = {"description": "No body."}
_FINISH: Schema = {"enum": ["stop", "length"]}


def description(settings: ApiSettings) -> dict[str, Any]:
    """The whole document. With API keys, all but the probes and metrics ask for one."""
    guarded = bool(settings.api_keys)
    schemas = {"Error": _error_schema(), "MessagesError": _messages_error_schema()}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "elastic_ep", "version": settings.version},
        "paths": {**_generating_paths(settings), **_admin_paths(settings)},
        "components": {"schemas": schemas},
    }
    if settings.root_path:
        document["servers"] = [{"url": settings.root_path}]
    for path in document["paths"].values():
        _gather(path, schemas)
    if guarded:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in ("/live", "/health", "/health_generate", "/ping", "/metrics"):
            for method in document["paths"][path].values():
                method["security"] = []
    return document


def _generating_paths(settings: ApiSettings) -> dict[str, Any]:
    text_choice = _object(index=_INTEGER, text=_STRING, logprobs=_NULLABLE, finish_reason=_FINISH)
    message = _object(role={"const": "assistant"}, content={"type": ["string", "null"]})
    finish: Schema = {"enum": ["stop", "length", "tool_calls"]}
    chat_choice = _object(index=_INTEGER, message=message, logprobs=_NULLABLE, finish_reason=finish)
    return {
        "/v1/completions": _generating(
            "Continue a text.", completion_body(settings), _answer("text_completion", text_choice)
        ),
        "/v1/responses": _generating(
            "Answer items.", responses_body(settings), _object(id=_STRING, object={"const": "response"})
        ),
        "/v1/responses/{id}": {
            "parameters": [_id("id")],
            **_get("A response that is kept.", _object(id=_STRING, object={"const": "response"}), 400, 404),
            "delete": _by_id("Keep it no longer.", 404),
        },
        "/v1/responses/{id}/cancel": {
            "parameters": [_id("id")],
            "post": _by_id("End a response that is made in the background.", 400, 404),
        },
        "/v1/responses/{id}/input_items": {
            "parameters": [
                _id("id"),
                _query("limit", {"type": "integer", "minimum": 1, "maximum": MOST_LISTED}),
                _query("order", {"enum": ["asc", "desc"]}),
                _query("after", _STRING),
            ],
            **_get("What it was asked.", _object(object={"const": "list"}), 400, 404),
        },
        "/v1/messages": _generating(
            "Answer in a conversation, by Anthropic's API.",
            messages_body(settings),
            _object(id=_STRING, type={"const": "message"}),
            error="MessagesError",
        ),
        "/v1/messages/count_tokens": _generating(
            "How long the prompt is.",
            count_body(settings),
            _object(input_tokens=_INTEGER),
            error="MessagesError",
            streams=False,
        ),
        "/v1/chat/completions": _generating(
            "Answer in a conversation.", chat_body(settings), _answer("chat.completion", chat_choice)
        ),
    }


def _admin_paths(settings: ApiSettings) -> dict[str, Any]:
    model = _object(id=_STRING, object={"const": "model"}, created=_INTEGER, max_model_len=_INTEGER)
    models = _object(object={"const": "list"}, data={"type": "array", "items": model})
    generates = _json("Whether one is, and why not.", _object(healthy={"type": "boolean"}, reason=_STRING))
    health = _json("The service as a whole, and why nobody serves at this moment.", _schema(port.Health))
    name = {"name": "model", "in": "path", "required": True, "schema": _STRING}
    tokens = {"type": "array", "items": _INTEGER}
    tokenized = _object(tokens=tokens, count=_INTEGER, max_model_len=_INTEGER)
    return {
        "/v1/models": _get("The model that is served.", models),
        "/v1/models/{model}": {"parameters": [name], **_get("One model.", model, 404)},
        "/v1/fault_tolerance/status": _get("Each rank's state.", _schema(port.FaultToleranceStatus)),
        "/v1/fault_tolerance/experts": _get("Who holds which expert.", _schema(port.ExpertsStatus)),
        "/v1/fault_tolerance/verify": {
            "post": {
                "summary": "Have every rank re-check the bytes of its experts.",
                "responses": {"200": _json("What differs.", _schema(port.Verification)), **_errors(401)},
            }
        },
        "/v1/fault_tolerance/relaunch": _post(
            "Launch dead ranks now: the one that is named, or all. One that runs is left alone.",
            Relaunch,
            _json("Which ranks are launched, which run already.", _schema(port.Relaunch)),
            404,
            503,
            required=False,
        ),
        "/v1/fault_tolerance/kill": _post(
            "Kill one incarnation of a rank. Only with the admin key.",
            Kill,
            _json("Whether this call had it killed.", _schema(port.Killing)),
            403,
            404,
            503,
        ),
        "/v1/fault_tolerance/drain": _post(
            "Have a rank leave once its requests have ended or moved. Only with the admin key.",
            Drain,
            _json("What has become of it by now.", _schema(port.Draining)),
            403,
            404,
            409,
            503,
        ),
        "/scale_elastic_ep": _post(
            "Have so many ranks take part; answers when they do. Only with the admin key.",
            Scale,
            _json("Who takes part.", _schema(port.Scaled)),
            403,
            408,
            409,
            503,
        ),
        "/is_scaling_elastic_ep": {
            "post": {
                "summary": "Are ranks leaving, or on their way back?",
                "responses": {
                    "200": _json("Whether.", _object(is_scaling_elastic_ep={"type": "boolean"})),
                    **_errors(401),
                },
            }
        },
        "/rebalance": {
            "post": {
                "summary": "Spread the experts over the ranks by the load of late.",
                "responses": {
                    "200": _json("Copies planned and made.", _schema(port.Rebalancing)),
                    **_errors(401),
                },
            }
        },
        "/version": _get("The server's version.", _object(version=_STRING)),
        "/live": _get("The process answers.", _object(status=_STRING)),
        "/health": {
            "get": {"summary": "Can a request be served?", "responses": {"200": health, "503": health}}
        },
        "/health_generate": {
            "get": {"summary": "Is a token generated?", "responses": {"200": generates, "503": generates}}
        },
        "/ping": {
            method: {"summary": "As /health, without a body.", "responses": {"200": _EMPTY, "503": _EMPTY}}
            for method in ("get", "post")
        },
        "/load": _get("Requests that are being answered.", _object(server_load=_INTEGER)),
        "/server_info": _get("What the server was started with.", _object(version=_STRING, model=_STRING)),
        "/get_server_info": _get("As /server_info.", _object(version=_STRING, model=_STRING)),
        **{
            path: _get("The model.", _object(model_path=_STRING, is_generation={"const": True}))
            for path in ("/model_info", "/get_model_info")
        },
        "/tokenizer_info": _get("The tokenizer.", _object(vocab_size=_INTEGER, special_tokens=_OBJECT)),
        "/metrics": {"get": {"summary": "Prometheus metrics.", "responses": {"200": _text("text/plain")}}},
        "/tokenize": _post(
            "A text or a conversation to token ids.",
            tokenize_body(settings),
            _json("Token ids.", tokenized),
            404,
            429,
        ),
        "/detokenize": _post(
            "Token ids to text.", detokenize_body(settings), _json("Text.", _object(prompt=_STRING)), 404, 429
        ),
    }


def _generating(
    summary: str,
    body: type[Body],
    answer: Schema,
    *errors: int,
    error: str = "Error",
    streams: bool = True,
) -> dict[str, Any]:
    success = _json("The whole answer, or server-sent events with 'stream'." if streams else summary, answer)
    if streams:
        success["content"]["text/event-stream"] = {"schema": {}}
    return _post(summary, body, success, 404, 429, 503, *errors, error=error)


def _post(
    summary: str,
    body: type[Body],
    success: dict[str, Any],
    *errors: int,
    required: bool = True,
    error: str = "Error",
) -> dict[str, Any]:
    asked = {"required": required, "content": {"application/json": {"schema": _schema(body)}}}
    responses = {"200": success, **_errors(400, 401, 413, *errors, error=error)}
    return {"post": {"summary": summary, "requestBody": asked, "responses": responses}}


def _get(summary: str, schema: Schema, *errors: int) -> dict[str, Any]:
    return {
        "get": {"summary": summary, "responses": {"200": _json(summary, schema), **_errors(401, *errors)}}
    }


def _by_id(summary: str, *errors: int) -> dict[str, Any]:
    kept = _object(id=_STRING, object={"const": "response"})
    return {"summary": summary, "responses": {"200": _json(summary, kept), **_errors(401, *errors)}}


def _query(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "schema": schema}


def _id(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _STRING}


def _errors(*statuses: int, error: str = "Error") -> dict[str, Any]:
    return {str(status): _json("An error.", {"$ref": f"#/components/schemas/{error}"}) for status in statuses}


def _json(summary: str, schema: Schema) -> dict[str, Any]:
    return {"description": summary, "content": {"application/json": {"schema": schema}}}


def _text(media_type: str) -> dict[str, Any]:
    return {"description": "Text.", "content": {media_type: {"schema": _STRING}}}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _answer(kind: str, choice: Schema) -> Schema:
    usage = _object(
        prompt_tokens=_INTEGER,
        completion_tokens=_INTEGER,
        total_tokens=_INTEGER,
        prompt_tokens_details=_object(cached_tokens=_INTEGER),
    )
    choices = {"type": "array", "items": choice}
    return _object(
        id=_STRING, object={"const": kind}, created=_INTEGER, model=_STRING, choices=choices, usage=usage
    )


def _error_schema() -> Schema:
    optional = {"type": ["string", "null"]}
    return _object(error=_object(message=_STRING, type=_STRING, param=optional, code=optional))


def _messages_error_schema() -> Schema:
    return _object(type={"const": "error"}, error=_object(type=_STRING, message=_STRING))


def _schema(kind: type) -> Schema:
    """Of a body, asked or answered."""
    return TypeAdapter(kind).json_schema(
        ref_template="#/components/schemas/{model}",
        schema_generator=Schemas,
        mode="validation" if issubclass(kind, Body) else "serialization",
    )


def _gather(node: Any, schemas: Schema) -> None:
    """Put what pydantic defines within a schema where the document has it."""
    if isinstance(node, dict):
        schemas.update(node.pop("$defs", {}))
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _gather(inner, schemas)
