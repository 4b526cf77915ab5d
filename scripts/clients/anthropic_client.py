"""Anthropic's SDK: /v1/messages."""

from __future__ import annotations

from typing import Any

import anthropic
from tried import (
    ANSWER,
    KEY,
    MODEL,
    PARAMETERS,
    QUESTION,
    SCRIPTED_URL,
    URL,
    is_call,
    raises,
    tell,
    tried,
)  # fmt: skip

client: Any = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=60)
scripted: Any = anthropic.Anthropic(base_url=SCRIPTED_URL, api_key=KEY, max_retries=0, timeout=60)
ASK: Any = {"model": MODEL, "max_tokens": 300, "messages": [{"role": "user", "content": QUESTION}]}
TOOLS: Any = [
    {"name": name, "description": "Told.", "input_schema": PARAMETERS} for name in ("weather", "clock")
]


@tried("message")
def message() -> None:
    answer = client.messages.create(**ASK, system="Answer.", extra_body={"temperature": 0})
    assert ANSWER in answer.content[0].text
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 0


@tried("message, streamed")
def stream() -> None:
    with client.messages.stream(**ASK, extra_body={"temperature": 0}) as events:
        assert ANSWER in events.get_final_text()


@tried("count_tokens")
def count() -> None:
    assert client.messages.count_tokens(model=MODEL, messages=ASK["messages"]).input_tokens > 10


@tried("tools, auto, two calls at once")
def tools_auto() -> None:
    answer = scripted.messages.create(**ASK, tools=TOOLS)
    calls = [block for block in answer.content if block.type == "tool_use"]
    assert [call.name for call in calls] == ["weather", "clock"]
    assert answer.stop_reason == "tool_use"


@tried("tools, auto, two calls at once, streamed")
def tools_auto_stream() -> None:
    with scripted.messages.stream(**ASK, tools=TOOLS) as events:
        answer = events.get_final_message()
    calls = [block for block in answer.content if block.type == "tool_use"]
    assert [call.name for call in calls] == ["weather", "clock"]
    for call in calls:
        is_call(call.input)


@tried("tools, any and named, and the result")
def tools_certain() -> None:
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "clock"}):
        answer = client.messages.create(**ASK, tools=TOOLS, tool_choice=choice)
        calls = [block for block in answer.content if block.type == "tool_use"]
        is_call(calls[0].input)
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": "fine"} for call in calls]
        again = [*ASK["messages"], {"role": "assistant", "content": answer.content}]
        again.append({"role": "user", "content": [*results, {"type": "text", "text": QUESTION}]})
        assert client.messages.create(**{**ASK, "messages": again, "max_tokens": 20}, tools=TOOLS).content


@tried("JSON schema")
def schema() -> None:
    form = {"format": {"type": "json_schema", "schema": PARAMETERS}}
    is_call(client.messages.create(**ASK, output_config=form).content[0].text)


@tried("errors: bad key, too long, unknown model")
def errors() -> None:
    other: Any = anthropic.Anthropic(base_url=URL, api_key="wrong", max_retries=0)
    raises(anthropic.AuthenticationError, lambda: other.messages.create(**ASK))
    long = {**ASK, "messages": [{"role": "user", "content": QUESTION * 200}]}
    raises(anthropic.BadRequestError, lambda: client.messages.create(**long))
    raises(anthropic.NotFoundError, lambda: client.messages.create(**{**ASK, "model": "nobody"}))


@tried("abort in mid-stream")
def abort() -> None:
    with client.messages.stream(**ASK) as events:
        next(iter(events))
    message()


tell("anthropic")
