"""The body of POST /v1/messages, and the conversation that it amounts to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Discriminator, Field, Tag, create_model
from typing_extensions import TypedDict

from elastic_ep.gateway import blocks, unsupported
from elastic_ep.gateway.bodies import Stops, labels, of_chat_alone
from elastic_ep.gateway.conversation import MOST_TOOLS, Content, Effort, Name
from elastic_ep.gateway.fields import Array, Body, Integer, Refused, Text, as_written, bad_value
from elastic_ep.gateway.fields import unsupported as refusal
from elastic_ep.gateway.settings import ApiSettings

RENAMED = {
    "max_completion_tokens": "max_tokens", "stop": "stop_sequences", "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format", "chat_template_kwargs": "thinking",
    "include_reasoning": "thinking.display", "continue_final_message": "messages",
    "parameters": "input_schema",
}  # fmt: skip
"""Fields of a conversation by the names that they have here."""
_SAME = ("model", "temperature", "top_p", "top_k", "max_tokens")


@as_written
class MessageParam(TypedDict):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[Text, Tag("|text")] | Annotated[list[dict[str, Any]], Array(), Tag("|blocks")],
        Discriminator(lambda value: "|blocks" if isinstance(value, list) else "|text"),
    ]


@as_written
class Tool(TypedDict):
    name: Name
    type: NotRequired[Annotated[Any, Refused(("custom",), "tools are called by the client")]]
    description: NotRequired[Text | None]
    input_schema: dict[str, Any]
    defer_loading: NotRequired[Annotated[Any, unsupported.MESSAGES_TOOL["defer_loading"]]]
    allowed_callers: NotRequired[Annotated[Any, unsupported.MESSAGES_TOOL["allowed_callers"]]]
    input_examples: NotRequired[Annotated[Any, unsupported.MESSAGES_TOOL["input_examples"]]]


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int | None, Integer(1)] = None
    display: Literal["summarized", "omitted"] | None = None


class Format(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    refused = unsupported.MESSAGES_OUTPUT
    effort: Effort | None = None
    format: Format | None = None


class Prompt(Body):
    """Of both endpoints."""

    refused = unsupported.MESSAGES
    model: Text
    messages: Annotated[list[MessageParam], Array(1)]
    system: Content | None = None
    tools: Annotated[list[Tool], Array(most=MOST_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(
        None,
        description="budget_tokens is for chat templates that know thinking_budget; what bounds an answer with its "
        "reasoning is max_tokens.",
    )
    output_config: OutputConfig | None = None
    cache_control: Any = Field(None, description="Accepted. It never changes an answer.")
    user_profile_id: Any = Field(None, description="Accepted. It never changes an answer.")


class Messages(Prompt):
    max_tokens: Annotated[int, Integer(1)]
    temperature: Annotated[float | None, Field(ge=0, le=1)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Integer(-1)] = None
    stop_sequences: Stops = Field(default_factory=list)
    stream: bool = False


@cache
def messages_body(settings: ApiSettings) -> type[Messages]:
    made = create_model("Messages", __base__=Messages, **labels())
    made.refused = of_chat_alone(settings, made.model_fields, RENAMED) | Messages.refused
    return made


@cache
def count_body(settings: ApiSettings) -> type[Prompt]:
    made = create_model("CountTokens", __base__=Prompt, **labels())
    made.refused = Prompt.refused
    return made


@dataclass(frozen=True, slots=True)
class Model:
    """What a conversation can tell the model: whether to reason, for how long, and whether it may reason untold."""

    thinks_if_told: bool
    knows_budget: bool
    reasons: bool


def as_chat(body: dict[str, Any], values: Prompt, model: Model) -> dict[str, Any]:
    """The body of a conversation that asks for the same. Raises `ApiError`."""
    chat = {name: body[name] for name in _SAME if body.get(name) is not None}
    messages = [{"role": "system", "content": values.system}] if values.system else []
    for place, message in enumerate(values.messages):
        messages += _as_messages(message, f"messages[{place}]")
    chat["messages"] = messages
    if messages[-1]["role"] == "assistant":  # what the answer begins with
        chat["continue_final_message"] = True
    if values.tools:
        chat["tools"] = [_chat_tool(tool) for tool in values.tools]
    chat |= _choice(values.tool_choice) | _thinking(values.thinking, body.get("max_tokens"), model)
    if values.output_config is not None:
        chat |= _config(values.output_config)
    if isinstance(values, Messages):
        chat |= {"stream": values.stream, "stop": values.stop_sequences}
    return chat


def _choice(choice: ToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    words = {"auto": "auto", "any": "required", "none": "none"}
    if choice.type == "tool" and choice.name is None:
        raise bad_value("tool_choice.name", "is required where a tool is chosen.")
    if choice.type != "tool" and choice.name is not None:
        raise bad_value(
            "tool_choice.name", f"would be ignored beside 'type': '{choice.type}': say 'tool', or no name."
        )
    named = {"type": "function", "function": {"name": choice.name}}
    return {
        "tool_choice": words.get(choice.type, named),
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
    }


def _thinking(thinking: Thinking | None, max_tokens: Any, model: Model) -> dict[str, Any]:
    """`max_tokens` has not been looked at yet, and may be of any type."""
    if thinking is None:
        return {}
    budget, variables = thinking.budget_tokens, {}
    if budget is not None and thinking.type != "enabled":
        raise bad_value("thinking.budget_tokens", "needs 'thinking.type' to be \"enabled\".")
    if budget is not None and type(max_tokens) is int and budget >= max_tokens:
        raise bad_value("thinking.budget_tokens", "must be less than 'max_tokens'.")
    if budget is not None and model.knows_budget:
        variables["thinking_budget"] = budget
    if thinking.type != "adaptive":
        variables |= _told(thinking.type == "enabled", model)
    shown = {"include_reasoning": False} if thinking.display == "omitted" else {}
    return shown | ({"chat_template_kwargs": variables} if variables else {})


def _told(wanted: bool, model: Model) -> dict[str, Any]:
    """A model that does not reason is not told to stop."""
    if model.thinks_if_told:
        return {"enable_thinking": wanted}
    if wanted or model.reasons:
        raise refusal(
            "thinking.type",
            f'cannot be honoured here with "{"enabled" if wanted else "disabled"}": the chat template leaves it to the '
            'model: see "adaptive".',
        )
    return {}


def _config(config: OutputConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if config.effort is not None:
        found["reasoning_effort"] = config.effort
    if config.format is not None:
        schema = {"name": "output", "schema": config.format.schema_, "strict": True}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    return found


def _chat_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool["name"]}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _as_messages(message: MessageParam, where: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, before what else the user says."""
    content = message["content"]
    if isinstance(content, str):
        return [{"role": message["role"], "content": content}]
    texts: list[str] = []
    results: list[dict[str, Any]] = []
    made: dict[str, Any] = {"role": message["role"]}
    for place, block in enumerate(content):
        at = f"{where}.content[{place}]"
        match block.get("type"), message["role"]:
            case "text", _:
                texts.append(blocks.string(block, "text", at))
            case "thinking", "assistant":
                made["reasoning_content"] = made.get("reasoning_content", "") + blocks.string(
                    block, "thinking", at
                )
            case "tool_use", "assistant":
                made.setdefault("tool_calls", []).append(_call(block, at))
            case "tool_result", "user":
                name = blocks.string(block, "tool_use_id", at)
                result = blocks.text(block.get("content") or "", f"{at}.content", ("text",))
                failed = {"is_error": True} if block.get("is_error") else {}  # a template may know it
                results.append({"role": "tool", "tool_call_id": name, "content": result, **failed})
            case _:
                raise blocks.text_alone(f"{at}.type")
    if texts or not results:
        made["content"] = "\n".join(texts) if texts or "tool_calls" not in made else None
        return [*results, made]
    return results


def _call(block: dict[str, Any], at: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise bad_value(f"{at}.input", "must be an object.")
    function = {
        "name": blocks.string(block, "name", at),
        "arguments": json.dumps(arguments, ensure_ascii=False),
    }
    return {"id": blocks.string(block, "id", at), "type": "function", "function": function}
