"""The fields of /v1/chat/completions that make its prompt: messages, and what else a chat template is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic_ep.gateway.fields import (
    Boolean,
    Field,
    ListOf,
    Object,
    OneOf,
    Schema,
    String,
    bad_value,
    object_schema,
    read_fields,
    wrong_type,
)
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.chat_template import RESERVED

_NO_TOOLS = "the model is not told of tools"
_OF_THE_REQUEST = RESERVED | {"chat_template", "continue_final_message"}
_TEXT_PART = (Field("type", OneOf(("text",)), required=True), Field("text", String(), required=True))


@dataclass(frozen=True, slots=True)
class OpenObject:
    """An object read by a table; what the table does not list stays as it is: a chat template may know it."""

    table: tuple[Field, ...]

    def read(self, value: Any, param: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(param, "an object", value)
        known = read_fields(value, self.table, f"{param}.")
        return {**value, **{name: one for name, one in known.items() if name in value}}

    def schema(self) -> Schema:
        return object_schema(self.table)


@dataclass(frozen=True, slots=True)
class Content:
    """A message's content: a string, or OpenAI's list of text parts; the template gets it in the form it wants."""

    def read(self, value: Any, param: str) -> str | list[dict[str, Any]]:
        if isinstance(value, list):
            return list(ListOf(OpenObject(_TEXT_PART)).read(value, param))
        return String().read(value, param)

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "string"}, ListOf(OpenObject(_TEXT_PART)).schema()]}


@dataclass(frozen=True, slots=True)
class TemplateVariables:
    """Variables for the chat template, but for those that fields of the request give it."""

    def read(self, value: Any, param: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(param, "an object", value)
        for name in sorted(_OF_THE_REQUEST & value.keys()):
            raise bad_value(f"{param}.{name}", "belongs beside 'chat_template_kwargs', not into it.")
        return value

    def schema(self) -> Schema:
        return {
            "type": "object",
            "not": {"anyOf": [{"required": [name]} for name in sorted(_OF_THE_REQUEST)]},
        }


_MESSAGE = OpenObject(
    (
        Field("role", String(min_length=1, max_length=64), required=True),
        Field("content", Content()),
        Field("name", String()),
        Field("reasoning_content", String()),
        Field("tool_calls", OneOf(([],), _NO_TOOLS)),
        Field("function_call", OneOf((), _NO_TOOLS)),
        Field("audio", OneOf((), "it takes and gives text alone")),
    )
)


def prompt_fields(settings: ApiSettings) -> tuple[Field, ...]:
    return (
        Field("messages", ListOf(_MESSAGE, min_items=1, max_items=settings.max_model_len), required=True),
        Field("add_generation_prompt", Boolean(), about="Default true, unless continue_final_message is."),
        Field(
            "continue_final_message", Boolean(), False, about="Go on with the last message, do not close it."
        ),
        Field("add_special_tokens", Boolean(), False),
        Field("chat_template_kwargs", TemplateVariables(), about="Variables for the chat template."),
        _chat_template(settings),
        Field("documents", ListOf(Object()), about="For chat templates that show documents."),
        Field("tools", OneOf(([],), _NO_TOOLS)),
    )


def _chat_template(settings: ApiSettings) -> Field:
    if settings.trust_request_chat_template:
        return Field(
            "chat_template", String(), about="A template, or the name of one of the model's, to use instead."
        )
    why = "the server has to be started with --trust-request-chat-template"
    return Field("chat_template", OneOf(("",), why), about=f"Refused: {why}.")


def add_generation_prompt(values: Mapping[str, Any]) -> bool:
    """Whether to begin a new message: as told, or unless the last one is gone on with."""
    told = values["add_generation_prompt"]
    return not values["continue_final_message"] if told is None else bool(told)
