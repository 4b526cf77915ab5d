"""`/v1/messages` by Anthropic's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import cache
from typing import Any

import anthropic
import anthropic.resources
import pytest

from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from tests.gateway.conftest import Running, Start, served_once
from tests.gateway.fakes import MODEL, TEMPLATE, FakeBackend, aborts, byte_level_tokenizer, says
from tests.gateway.test_responses import prompt_of
from tests.gateway.test_tools import ANSWER, ARGUMENTS, PARSING, TOOLS, begin, tool_text

pytestmark = pytest.mark.anyio
FLAT: Any = [
    {"name": tool["function"]["name"], "description": "é", "input_schema": tool["function"]["parameters"]}
    for tool in TOOLS
]
ASKED: Any = [{"role": "user", "content": "Weather?"}]


def connect(url: str, key: str = "none") -> anthropic.AsyncAnthropic:
    # Without it the client reads all certificates of this machine, on the event loop.
    plain = anthropic.DefaultAsyncHttpxClient(verify=False)
    return anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0, http_client=plain)


@cache
def thinking_text() -> ChatTokenizer:
    told = "{{ enable_thinking }}{{ thinking_budget }}{{ messages[-1].is_error }}{# tool_calls #}"
    return ChatTokenizer(byte_level_tokenizer(), TEMPLATE + told, {})


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    thinking_text()

    async def ask(url: str) -> None:
        async with connect(url) as client:
            await client.messages.create(model=MODEL, max_tokens=900, messages=ASKED, tools=FLAT)
            async with client.messages.stream(
                model=MODEL, max_tokens=900, messages=ASKED, tools=FLAT
            ) as stream:
                await stream.get_final_message()

            with suppress(anthropic.NotFoundError):
                await client.messages.create(model="another", max_tokens=9, messages=ASKED)

    asyncio.run(served_once(ask, FakeBackend(says(ANSWER)), tool_text(), **PARSING))


@pytest.fixture
async def running(start: Start) -> Running:
    return await begin(start)


@pytest.fixture
async def client(running: Running) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with connect(running.url) as client:
        yield client


def plain(message: anthropic.types.Message) -> list[Any]:
    shown: list[Any] = []
    for block in message.content:
        match block.type:
            case "thinking":
                shown.append(("thinking", block.thinking))
            case "text":
                shown.append(("text", block.text))
            case "tool_use":
                shown.append((block.name, block.input))
    return shown


OUTPUT = [
    ("thinking", "So: weather."),
    ("text", "I look."),
    ("weather", json.loads(ARGUMENTS)),
    ("clock", {}),
]


async def test_create(client: anthropic.AsyncAnthropic, running: Running) -> None:
    message = await client.messages.create(
        model=MODEL, max_tokens=900, system="Be brief.", messages=ASKED, tools=FLAT
    )
    assert plain(message) == OUTPUT
    assert (message.stop_reason, message.role, message.type) == ("tool_use", "assistant", "message")
    assert message.usage.input_tokens == len(running.backend.submitted[0].prompt)
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?" in prompt_of(running)
    assert running.backend.submitted[0].params.max_tokens == 900


async def test_streamed(client: anthropic.AsyncAnthropic) -> None:
    stream = await client.messages.create(
        model=MODEL, max_tokens=900, messages=ASKED, tools=FLAT, stream=True
    )
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    once = [
        kind for place, kind in enumerate(kinds) if kind != "content_block_delta" or kinds[place - 1] != kind
    ]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert [kind for kind in once if str(kind) != "ping"] == [
        "message_start", *block * 4, "message_delta", "message_stop",
    ]  # fmt: skip
    partial = [
        event.delta.partial_json
        for event in events
        if event.type == "content_block_delta" and event.delta.type == "input_json_delta" and event.index == 2
    ]
    assert "".join(partial) == ARGUMENTS
    assert len(partial) > 10, "as they come"


async def test_helpers_of_the_client_read_the_stream(client: anthropic.AsyncAnthropic) -> None:
    async with client.messages.stream(model=MODEL, max_tokens=900, messages=ASKED, tools=FLAT) as stream:
        final = await stream.get_final_message()
    assert plain(final) == OUTPUT
    assert final.stop_reason == "tool_use"
    assert final.usage.output_tokens > 10


async def test_results_of_tools(client: anthropic.AsyncAnthropic, running: Running) -> None:
    first = await client.messages.create(model=MODEL, max_tokens=900, messages=ASKED, tools=FLAT)
    results: Any = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "rain"}]}
        for block in first.content
        if block.type == "tool_use"
    ]
    made: Any = [block.model_dump(exclude_none=True) for block in first.content]
    running.backend.reply = says("It rains.")
    second = await client.messages.create(
        model=MODEL,
        max_tokens=900,
        messages=[
            *ASKED,
            {"role": "assistant", "content": made},
            {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]},
        ],
        tools=FLAT,
    )
    assert (plain(second), second.stop_reason) == ([("text", "It rains.")], "end_turn")
    shown = prompt_of(running)
    assert "assistant\nI look.<call toolu_" in shown
    assert shown.count("<|im_start|>tool\nrain<|im_end|>") == 2
    assert shown.endswith("<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n")


async def test_the_beginning_of_the_answer_may_be_given(
    client: anthropic.AsyncAnthropic, running: Running
) -> None:
    running.backend.reply = says(" rains.")
    message = await client.messages.create(
        model=MODEL, max_tokens=9, messages=[*ASKED, {"role": "assistant", "content": "It"}]
    )
    assert plain(message) == [("text", " rains.")]
    assert prompt_of(running).endswith("<|im_start|>assistant\nIt")


async def test_why_it_stopped(client: anthropic.AsyncAnthropic, running: Running) -> None:
    running.backend.reply = says("one two three four five six")
    stopped = await client.messages.create(
        model=MODEL, max_tokens=50, messages=ASKED, stop_sequences=["no", "three"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "three")
    cut = await client.messages.create(model=MODEL, max_tokens=2, messages=ASKED)
    assert cut.stop_reason == "max_tokens"


async def test_tokens_are_counted(client: anthropic.AsyncAnthropic, running: Running) -> None:
    counted = await client.messages.count_tokens(model=MODEL, messages=ASKED, tools=FLAT, system="Brief.")
    await client.messages.create(model=MODEL, max_tokens=9, messages=ASKED, tools=FLAT, system="Brief.")
    assert counted.input_tokens == len(running.backend.submitted[0].prompt)


async def test_what_others_computed_is_told(client: anthropic.AsyncAnthropic, running: Running) -> None:
    running.backend.cached = [7]
    message = await client.messages.create(model=MODEL, max_tokens=9, messages=ASKED)
    assert message.usage.cache_read_input_tokens == 7
    assert message.usage.input_tokens == len(running.backend.submitted[0].prompt) - 7


async def test_keys(start: Start) -> None:
    running = await begin(start, api_keys=("right",))
    async with connect(running.url, "right") as client:
        await client.messages.create(model=MODEL, max_tokens=9, messages=ASKED)
    async with connect(running.url, "wrong") as client:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            await client.messages.create(model=MODEL, max_tokens=9, messages=ASKED)
    body: Any = refused.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")


async def test_a_failure_is_told_within_the_stream(
    client: anthropic.AsyncAnthropic, running: Running
) -> None:
    running.backend.reply = aborts("one")
    with pytest.raises(anthropic.APIStatusError, match="ended this request"):
        async for _ in await client.messages.create(model=MODEL, max_tokens=9, messages=ASKED, stream=True):
            pass


CALLED = {"type": "tool_use", "id": "1", "name": "weather", "input": {}}
IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("max_tokens", {"max_tokens": None}),
    ("max_tokens", {"max_tokens": 5000}),
    ("messages", {"messages": []}),
    ("messages[0].role", {"messages": [{"role": "tool", "content": "x"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [IMAGE]}]}),
    ("messages[0].content[0].text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("tools[0].type", {"tools": [{"type": "web_search_20250305", "name": "x"}]}),
    ("tools[0].input_schema", {"tools": [{"name": "x"}]}),
    ("tool_choice.name", {"tools": FLAT, "tool_choice": {"type": "tool"}}),
    ("tool_choice.name", {"tools": FLAT, "tool_choice": {"type": "any", "name": "weather"}}),
    ("tool_choice", {"tools": FLAT, "tool_choice": {"type": "tool", "name": "no_such"}}),
    ("thinking.type", {"thinking": {"type": "enabled", "budget_tokens": 8}}),
    ("thinking.type", {"thinking": {"type": "disabled"}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 9}}),
    ("thinking.budget_tokens", {"thinking": {"type": "adaptive", "budget_tokens": 8}}),
    ("tools[0].defer_loading", {"tools": [FLAT[0] | {"defer_loading": True}]}),
    ("tools[0].allowed_callers", {"tools": [FLAT[0] | {"allowed_callers": ["code_execution"]}]}),
    ("tools[0].input_examples", {"tools": [FLAT[0] | {"input_examples": [{"days": 3}]}]}),
    ("output_config.task_budget", {"output_config": {"task_budget": {"total": 9}}}),
    ("output_format", {"output_format": {"type": "json_schema", "schema": {}}}),
    ("temperature", {"temperature": 1.5}),
    ("container", {"container": "x"}),
    ("messages", {"messages": [*ASKED, {"role": "assistant", "content": [CALLED]}]}),
    ("output_config.effort", {"output_config": {"effort": "high"}}),
    ("model", {"model": "another"}),
]


@pytest.mark.parametrize(("param", "change"), WRONG)
async def test_what_cannot_be_honoured(running: Running, param: str, change: dict[str, Any]) -> None:
    asked = {"model": MODEL, "max_tokens": 9, "messages": ASKED} | change
    status, body = await running.post("/v1/messages", asked)
    assert status in (400, 404)
    assert body["type"] == "error"
    assert body["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert (
        f"'{param}'" in body["error"]["message"]
        or status == 404
        or "maximum context" in body["error"]["message"]
    )


async def test_thinking_is_turned_off_where_the_template_can(start: Start) -> None:
    running = await start(FakeBackend(says("Yes.")), thinking_text())
    for kind, shown in (("disabled", "False"), ("enabled", "True"), ("adaptive", "")):
        asked = {"model": MODEL, "max_tokens": 9, "messages": ASKED, "thinking": {"type": kind}}
        status, _ = await running.post("/v1/messages", asked)
        assert status == 200
        assert prompt_of(running).endswith(f"assistant\n{shown}")


async def test_what_a_template_knows_is_told(start: Start) -> None:
    running = await start(FakeBackend(says("Yes.")), thinking_text())
    result = {"type": "tool_result", "tool_use_id": "1", "content": "none", "is_error": True}
    messages = [
        *ASKED,
        {"role": "assistant", "content": [CALLED]},
        {"role": "user", "content": [result]},
    ]
    asked = {"model": MODEL, "max_tokens": 9, "messages": ASKED}
    await running.post("/v1/messages", asked | {"thinking": {"type": "enabled", "budget_tokens": 8}})
    assert prompt_of(running).endswith("assistant\nTrue8")
    status, body = await running.post("/v1/messages", asked | {"messages": messages})
    assert status == 200, body
    assert prompt_of(running).endswith("assistant\nTrue")


async def test_reasoning_may_be_omitted(client: anthropic.AsyncAnthropic, start: Start) -> None:
    omitted: Any = {"type": "adaptive", "display": "omitted"}
    message = await client.messages.create(
        model=MODEL, max_tokens=900, messages=ASKED, tools=FLAT, thinking=omitted
    )
    assert plain(message) == OUTPUT[1:]
    unread = await start(FakeBackend(says("Yes.")), tool_text())
    status, body = await unread.post(
        "/v1/messages", {"model": MODEL, "max_tokens": 9, "messages": ASKED, "thinking": omitted}
    )
    assert (status, "'thinking.display'" in body["error"]["message"]) == (400, True), body


async def test_a_model_that_does_not_reason_need_not_be_told(start: Start) -> None:
    running = await start(FakeBackend(says("Yes.")), tool_text())
    asked = {"model": MODEL, "max_tokens": 9, "messages": ASKED, "thinking": {"type": "disabled"}}
    status, _ = await running.post("/v1/messages", asked)
    assert status == 200
