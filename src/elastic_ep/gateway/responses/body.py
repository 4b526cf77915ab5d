"""The body of POST /v1/responses, and the conversation that it amounts to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Discriminator, Field, Tag, create_model, model_validator
from typing_extensions import TypedDict

from elastic_ep.gateway import blocks, unsupported
from elastic_ep.gateway.bodies import chat_body, labels, of_chat_alone
from elastic_ep.gateway.conversation import MOST_TOOLS, Effort, Function, Name
from elastic_ep.gateway.fields import Array, Body, Integer, Refused, Text, bad_value, fault
from elastic_ep.gateway.fields import unsupported as refusal
from elastic_ep.gateway.settings import ApiSettings

Item = dict[str, Any]
SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos", "logit_bias", "allowed_token_ids", "bad_words",
    "skip_special_tokens", "include_stop_str_in_output", "parallel_tool_calls", "chat_template_kwargs",
)  # fmt: skip
"""What is as in a conversation."""
RENAMED = {
    "messages": "input", "max_completion_tokens": "max_output_tokens", "max_tokens": "max_output_tokens",
    "response_format": "text.format", "reasoning_effort": "reasoning.effort",
}  # fmt: skip
"""Fields of a conversation by the names that they have here."""
_LOGPROBS = "message.output_text.logprobs"
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_ROLES = ("user", "assistant", "system", "developer")


class Tool(Function):
    type: Annotated[Any, Refused(("function",), "tools are functions that the client calls")]


class NamedTool(TypedDict):
    type: Annotated[Any, Refused(("function",), "a choice is a word or names a function")]
    name: Name


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("|word")] | Annotated[NamedTool, Tag("|named")],
    Discriminator(lambda value: "|named" if isinstance(value, dict) else "|word"),
]
Input = Annotated[
    Annotated[Text, Tag("|text")] | Annotated[list[dict[str, Any]], Array(1), Tag("|items")],
    Discriminator(lambda value: "|items" if isinstance(value, list) else "|text"),
]


class Reasoning(Body):
    refused = unsupported.RESPONSES_REASONING
    effort: Effort | None = None
    summary: Literal["auto"] | None = Field(None, description="Reasoning is told whole.")


class Format(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"

    @model_validator(mode="after")
    def _known(self) -> Self:
        """As of every field that says what a text has to be: none is ignored."""
        of_schema = ("name", "description", "schema", "strict") if self.type == "json_schema" else ()
        for name in self.model_extra or ():
            if name not in of_schema:
                raise fault("unsupported_parameter", "is not known here.", inside=f".{name[:40]}")
        return self


class TextOptions(Body):
    refused = unsupported.RESPONSES_TEXT
    format: Format | None = None


class StreamOptions(Body):
    refused = unsupported.STREAM_OPTIONS


class Responses(Body):
    refused = unsupported.RESPONSES
    input: Input
    instructions: Text | None = None
    tools: Annotated[list[Tool], Array(most=MOST_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    max_output_tokens: Annotated[int | None, Integer(1)] = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    top_logprobs: int | None = None
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] = Field(
        default_factory=list, description="Reasoning is told as text in any case."
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    store: bool = Field(True, description="Keep it, within --responses-store-mib, for other requests.")
    background: bool = Field(False, description="Answer at once; ask for the response by its id.")
    previous_response_id: Text | None = Field(None, description="Go on with that conversation.")
    metadata: dict[str, Text] | None = None


class Named(NamedTuple):
    """An item of a request. One that its client did not name has a name of its place."""

    id: str
    json: str

    @classmethod
    def of(cls, item: Item, place: int) -> Named:
        given = item.get("id")
        name = given if isinstance(given, str) and given else f"item_{place}"
        return cls(name, json.dumps({**item, "id": name}))


@dataclass(frozen=True, slots=True)
class About:
    """What an answer needs of its request. Picklable.

    `head`: JSON members that the response repeats. `items`: the conversation so far, a JSON array. `asked`: those of it
    that are of this request.
    """

    head: str
    items: str
    asked: tuple[Named, ...]
    store: bool
    background: bool


@cache
def responses_body(settings: ApiSettings) -> type[Responses]:
    of_chat = chat_body(settings)
    same: dict[str, Any] = {}
    for name in SAME:
        if name in of_chat.refused:
            continue
        known = of_chat.model_fields[name]
        kind: Any = known.annotation
        for one in known.metadata:
            kind = Annotated[kind, one]
        same[name] = (kind, Field(None, description=known.description))
    top: Any = Field(None, description="Alternatives of each token, with 'include'.")
    same["top_logprobs"] = (Annotated[int | None, Integer(0, settings.max_logprobs)], top)
    made = create_model("Responses", __base__=Responses, **same, **labels())
    made.refused = of_chat_alone(settings, made.model_fields, RENAMED) | Responses.refused
    return made


def as_chat(
    body: dict[str, Any], values: Responses, items: Sequence[Item], asked_from: int
) -> dict[str, Any]:
    """The body of a conversation that asks for the same. Raises `ApiError`."""
    chat = {name: body[name] for name in SAME if body.get(name) is not None}
    chat["messages"] = conversation(values.instructions, items, asked_from)
    if values.tools:
        chat["tools"] = [_chat_tool(tool) for tool in values.tools]
    if values.tool_choice is not None:
        chat["tool_choice"] = _choice(values.tool_choice)
    if values.max_output_tokens is not None:
        chat["max_completion_tokens"] = values.max_output_tokens
    if values.reasoning is not None and values.reasoning.effort is not None:
        chat["reasoning_effort"] = values.reasoning.effort
    form = values.text.format if values.text is not None else None
    if form is not None and form.type != "text":
        chat["response_format"] = _format(form)
    if _LOGPROBS in values.include:
        chat |= {"logprobs": True, "top_logprobs": values.top_logprobs or 0}
    elif values.top_logprobs:
        raise bad_value("top_logprobs", f"needs 'include' to have \"{_LOGPROBS}\".")
    chat["stream"] = values.stream
    return chat


def items_of(given: str | list[Item]) -> list[Item]:
    """`input` as items."""
    return [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given


def conversation(
    instructions: str | None, items: Sequence[Item], asked_from: int = 0
) -> list[dict[str, Any]]:
    """Items, of this request from number `asked_from` on, as messages. Raises `ApiError`.

    What one turn of the assistant made is one message, as templates expect.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for place, item in enumerate(items):
        where = f"input[{place - asked_from}]"
        match item.get("type", "message"):
            case "message":
                _add_message(messages, item, where)
            case "reasoning":
                said = _assistant(messages)
                said["reasoning_content"] = said.get("reasoning_content", "") + _reasoning(item, where)
            case "function_call":
                function = {
                    "name": blocks.string(item, "name", where),
                    "arguments": blocks.string(item, "arguments", where),
                }
                call = {"id": blocks.string(item, "call_id", where), "type": "function", "function": function}
                _assistant(messages).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                content = blocks.text(item.get("output"), f"{where}.output", _TEXTS)
                messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": blocks.string(item, "call_id", where),
                        "content": content,
                    }
                )
            case _:
                raise refusal(
                    f"{where}.type",
                    "cannot be honoured here: items are messages, reasoning, and calls of functions.",
                )
    return messages


def _reasoning(item: Item, where: str) -> str:
    parts = item.get("content") or item.get("summary") or []
    if not parts and item.get("encrypted_content"):
        raise refusal(f"{where}.encrypted_content", "cannot be honoured here: reasoning is read as text.")
    return blocks.text(parts, f"{where}.content", _TEXTS)


def _add_message(messages: list[dict[str, Any]], item: Item, where: str) -> None:
    role = item.get("role")
    if role not in _ROLES:
        raise bad_value(f"{where}.role", f"must be one of {', '.join(_ROLES)}.")
    content = blocks.text(item.get("content"), f"{where}.content", _TEXTS)
    role = "system" if role == "developer" else role
    if role == "assistant" and messages and _open(messages[-1]):
        messages[-1]["content"] = content
    elif role == "system" and messages and all(one["role"] == "system" for one in messages):
        # Most templates take one, at the beginning.
        messages[-1]["content"] += f"\n\n{content}"
    else:
        messages.append({"role": role, "content": content})


def _open(message: dict[str, Any]) -> bool:
    """An assistant's message that has reasoning alone."""
    return message["role"] == "assistant" and "content" not in message and "tool_calls" not in message


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The last message if it is the assistant's, or a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    return messages[-1]


def _chat_tool(tool: Any) -> dict[str, Any]:
    function = {name: value for name, value in tool.items() if name != "type" and value is not None}
    return {"type": "function", "function": function}


def _choice(given: Any) -> Any:
    return {"type": "function", "function": {"name": given["name"]}} if isinstance(given, dict) else given


def _format(form: Format) -> dict[str, Any]:
    if form.type == "json_object":
        return {"type": form.type}
    return {"type": form.type, "json_schema": form.model_extra or {}}


_REPEATED = {"parallel_tool_calls", "temperature", "top_p", "reasoning", "text"}
"""HAZARD: of the others some hold, where nothing was given, what is not of their field's type."""


def head(values: Responses, settings: ApiSettings) -> str:
    """What a response repeats of its request, as members of a JSON object."""
    given = values.model_dump(exclude_none=True, include=_REPEATED)
    plain = {
        "instructions": values.instructions,
        "tools": [dict(tool) for tool in values.tools],
        "tool_choice": values.tool_choice or "auto",
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "temperature": given.get("temperature", settings.defaults.temperature),
        "top_p": given.get("top_p", settings.defaults.top_p),
        "max_output_tokens": values.max_output_tokens,
        "previous_response_id": values.previous_response_id,
        "reasoning": {"effort": None, "summary": None, **given.get("reasoning", {})},
        "text": {"format": {"type": "text"}, **given.get("text", {})},
        "metadata": values.metadata or {},
        "store": values.store and settings.responses_store_bytes > 0,
        "background": values.background,
        "truncation": "disabled",
        "top_logprobs": values.top_logprobs or 0,
        "service_tier": "default",
    }
    return json.dumps(plain)[1:-1]
