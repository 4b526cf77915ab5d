"""How an answer is read into reasoning, content and calls, and the grammar that makes a call certain."""

from __future__ import annotations

from collections.abc import Iterator

from elastic_ep.gateway.bodies import Chat
from elastic_ep.gateway.fields import bad_value, unsupported
from elastic_ep.gateway.guided import certain_arguments, certain_calls, refusal
from elastic_ep.gateway.parsers.base import Tool
from elastic_ep.gateway.parsers.registry import NAMED, REQUIRED, MessageForm, begins_within
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.guided.grammars import BadGrammar
from elastic_ep.models.config_json import shown
from elastic_ep.wire.messages import Grammar


def message_form(settings: ApiSettings, values: Chat, prompt: str, *, guided: bool) -> MessageForm | None:
    """How the answer to `prompt` is read. What follows a grammar (`guided`) is content, as it was asked for.

    Raises `ApiError`.
    """
    reasoning = settings.reasoning_parser if values.separate_reasoning else None
    thinking = False
    if reasoning is not None and not values.continue_final_message:
        thinking = begins_within(prompt, reasoning)
    calls, tools = _calls(settings, values)
    if guided and calls not in (NAMED, REQUIRED):
        return None
    if reasoning is None and calls is None:
        return None
    return MessageForm(
        reasoning, thinking, values.include_reasoning, calls, tools, several=values.parallel_tool_calls
    )


def _calls(settings: ApiSettings, values: Chat) -> tuple[str | None, tuple[Tool, ...]]:
    """By which format calls are read from the answer, and of which tools."""
    choice = values.tool_choice or "auto"
    tools = tuple(Tool.of(tool["function"]) for tool in values.tools)
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise bad_value("tools", f"name {shown(twice)} twice: a call could be of either.")
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        named = tuple(tool for tool in tools if tool.name == name)
        if not named:
            raise bad_value("tool_choice", f"names {shown(name)}, which is none of the tools.")
        return NAMED, named[:1]
    if choice == "required":
        if not tools:
            raise bad_value("tool_choice", "needs 'tools' to be required.")
        return REQUIRED, tools
    if choice == "none" or not tools:
        return None, ()
    if settings.tool_call_parser is None:
        raise unsupported(
            "tool_choice" if values.tool_choice else "tools",
            "cannot be honoured here where the model has the choice: the server has to be started with "
            "--enable-auto-tool-choice and --tool-call-parser.",
        )
    return settings.tool_call_parser, tools


def certain(values: Chat, form: MessageForm) -> Grammar:
    """Of the calls that the client wants for certain. Raises `ApiError`."""
    functions = [tool["function"] for tool in values.tools]
    try:
        if form.calls == NAMED:
            name = form.tools[0].name
            return certain_arguments(next(one for one in functions if one["name"] == name))
        return certain_calls(functions, several=values.parallel_tool_calls)
    except BadGrammar as error:
        raise refusal("tools", error) from error


def certain_parts(values: Chat, form: MessageForm) -> Iterator[tuple[str, Grammar]]:
    """Of each tool that may be called its parameters by themselves, and the field that has them. Raises `ApiError`."""
    names = {tool.name for tool in form.tools}
    for place, tool in enumerate(values.tools):
        if (function := tool["function"])["name"] in names:
            param = f"tools[{place}].function.parameters"
            try:
                yield param, certain_arguments(function)
            except BadGrammar as error:
                raise refusal(param, error) from error
