"""Tools and reasoning in conversations, by the official client."""

from __future__ import annotations

import json
from asyncio import to_thread
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import openai
import pytest
from llguidance import LLMatcher, LLTokenizer

from elastic_ep.config import CALL_PARSERS, REASONING_PARSERS
from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.guided import certain_calls
from elastic_ep.gateway.jobs import JobReader
from elastic_ep.gateway.parsers.registry import CALL_FORMATS, REASONING_FORMATS
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.guided.grammars import to_lark
from elastic_ep.wire.messages import Grammar
from tests.gateway.conftest import Running, Start, settings
from tests.gateway.fakes import MODEL, FakeBackend, byte_level_tokenizer, says
from tests.gateway.test_openai_client import MESSAGES, connect, imported

pytestmark = pytest.mark.anyio
__all__ = ["imported"]  # a fixture

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}{% for call in message.tool_calls or [] %}<call {{ call.id }} {{ call.function.name }}"
    "{% for name, value in call.function.arguments.items() %} {{ name }}={{ value }}{% endfor %}>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "é",
            "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}},
        },
    }
    for name in ("weather", "clock")
]
ARGUMENTS = '{"days": 3, "city": "Köln \\"x\\""}'
ANSWER = (
    "<think>\nSo: weather.\n</think>\n\nI look.\n<tool_call>\n"
    f'{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n<tool_call>\n'
    '{"name": "clock", "arguments": {}}\n</tool_call>'
)


@cache
def tool_text() -> ChatTokenizer:
    return ChatTokenizer(byte_level_tokenizer(), TEMPLATE, {"eos_token": "<|im_end|>"})


PARSING: dict[str, Any] = {
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
    "max_model_len": 2048,
}


@pytest.fixture(scope="module", autouse=True)
def made() -> None:
    """Not first on a loop."""
    tool_text()


async def begin(start: Start, answer: str = ANSWER, **settings: Any) -> Running:
    chosen = PARSING | settings
    return await start(FakeBackend(says(answer)), tool_text(), **chosen)


@pytest.fixture
async def running(start: Start) -> Running:
    return await begin(start)


@pytest.fixture
async def client(running: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connect(running.url) as client:
        yield client


async def test_calls(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.model_extra is not None
    assert choice.message.model_extra["reasoning_content"] == choice.message.model_extra["reasoning"]
    assert choice.message.model_extra["reasoning"] == "So: weather."
    calls = choice.message.tool_calls or []
    assert [(call.type, call.function.name) for call in calls if call.type == "function"] == [
        ("function", "weather"),
        ("function", "clock"),
    ]
    assert [call.function.arguments for call in calls if call.type == "function"] == [ARGUMENTS, "{}"]
    assert len({call.id for call in calls}) == 2
    assert answer.usage is not None


async def test_calls_alone_have_no_content(start: Start) -> None:
    running = await begin(start, ANSWER[ANSWER.index("\n<tool_call>") :])
    _, body = await running.post("/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS})
    assert body["choices"][0]["message"]["content"] is None


async def test_streamed_calls(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        tools=TOOLS,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
    )
    calls: dict[int, dict[str, str]] = {}
    content, reasoning, finish, tokens, deltas = "", "", [], 0, 0
    async for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            tokens += len(choice.logprobs.content or []) if choice.logprobs else 0
            finish += [choice.finish_reason] if choice.finish_reason else []
            for call in choice.delta.tool_calls or []:
                assert call.function is not None
                if call.id is not None:
                    assert call.index == len(calls)
                    assert (call.type, call.function.arguments) == ("function", "")
                    calls[call.index] = {"name": call.function.name or "", "arguments": ""}
                else:
                    deltas += 1
                    assert call.function.name is None
                    calls[call.index]["arguments"] += call.function.arguments or ""
    assert calls == {
        0: {"name": "weather", "arguments": ARGUMENTS},
        1: {"name": "clock", "arguments": "{}"},
    }
    assert (content, reasoning, finish) == ("I look.", "So: weather.", ["tool_calls"])
    assert deltas > 10, "as they come, not at the end"
    assert chunk.usage is not None
    assert tokens == chunk.usage.completion_tokens, "each token's once"


async def test_helpers_of_the_client_read_the_stream(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=TOOLS) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    kinds = {event.type for event in events}
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    calls = final.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls] == ["weather", "clock"]


async def test_history_reaches_the_template(client: openai.AsyncOpenAI, running: Running) -> None:
    call: Any = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"days": 3}'},
    }
    await client.chat.completions.create(
        model=MODEL,
        messages=[
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ],
        tools=TOOLS,
    )
    prompt = tool_text().decode(running.backend.submitted[0].prompt, skip_special_tokens=False)
    assert prompt.startswith(json.dumps(TOOLS, ensure_ascii=False))
    assert "<call c1 weather days=3><|im_end|>\n<|im_start|>tool\nrain<|im_end|>" in prompt


async def test_one_call_if_they_may_not_be_several(running: Running) -> None:
    asked = {"messages": MESSAGES, "tools": TOOLS, "parallel_tool_calls": False}
    _, body = await running.post("/v1/chat/completions", asked)
    assert [call["function"]["name"] for call in body["choices"][0]["message"]["tool_calls"]] == ["weather"]


async def test_no_calls_if_none_are_wanted(running: Running) -> None:
    asked = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none"}
    _, body = await running.post("/v1/chat/completions", asked)
    choice = body["choices"][0]
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == ANSWER[ANSWER.index("I look") :]
    assert choice["finish_reason"] == "stop"


async def test_reasoning_as_asked_for(running: Running) -> None:
    _, body = await running.post("/v1/chat/completions", {"messages": MESSAGES, "include_reasoning": False})
    assert body["choices"][0]["message"]["content"].startswith("I look.")
    assert "reasoning" not in body["choices"][0]["message"]
    _, body = await running.post("/v1/chat/completions", {"messages": MESSAGES, "separate_reasoning": False})
    assert body["choices"][0]["message"]["content"] == ANSWER


async def test_a_call_that_is_cut_off_ends_by_its_length(running: Running) -> None:
    cut = len(tool_text().encode(ANSWER[: ANSWER.index(', "city"')]))
    asked = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": cut}
    _, body = await running.post("/v1/chat/completions", asked)
    choice = body["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"days": 3'


async def test_special_tokens_that_a_parser_needs(start: Start) -> None:
    running = await begin(start, "<|im_start|>hello", tool_call_parser="mistral", reasoning_parser=None)
    _, body = await running.post("/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS})
    assert body["choices"][0]["message"]["content"] == "<|im_start|>hello"
    _, body = await running.post("/v1/chat/completions", {"messages": MESSAGES})
    assert body["choices"][0]["message"]["content"] == "hello"


CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
NAMED = {"type": "function", "function": {"name": "no_such"}}
WRONG: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("tools", {"tools": TOOLS}, {"tool_call_parser": None}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": "auto"}, {"tool_call_parser": None}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": "any"}, {}),
    ("tool_choice", {"tool_choice": "required"}, {}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": NAMED}, {}),
    ("tools", {"tools": [*TOOLS, TOOLS[0]]}, {}),
    ("tools", {"tools": [*TOOLS, TOOLS[0]], "tool_choice": "required"}, {}),
    ("tools[0].type", {"tools": [{"type": "web_search"}]}, {}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": ""}}]}, {}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f", "x": "\ud800"}}]}, {}),
    ("messages[0].tool_calls[0].function.name", {"messages": [{"role": "a", "tool_calls": [{"function": {}}]}]}, {}),
    ("include_reasoning", {"include_reasoning": False}, {"reasoning_parser": None}),
    ("reasoning_effort", {"reasoning_effort": "high"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("param", "change", "settings"), WRONG)
async def test_what_cannot_be_honoured(
    start: Start, param: str, change: dict[str, Any], settings: dict[str, Any]
) -> None:
    running = await begin(start, **settings)
    status, body = await running.post("/v1/chat/completions", {"messages": MESSAGES} | change)
    assert status == 400
    assert body["error"]["param"] == param


@pytest.mark.parametrize(
    ("param", "change"), [("tools", {"tools": TOOLS}), ("messages[0].tool_calls", {"messages": [CALLED]})]
)
async def test_a_template_that_does_not_show_them(start: Start, param: str, change: dict[str, Any]) -> None:
    running = await start(tool_call_parser="hermes")
    status, body = await running.post("/v1/chat/completions", {"messages": MESSAGES} | change)
    assert status == 400
    assert body["error"]["param"] == param
    assert "template" in body["error"]["message"]


def test_each_name_of_a_parser_is_a_choice_on_the_command_line() -> None:
    assert tuple(CALL_FORMATS) == CALL_PARSERS
    assert tuple(REASONING_FORMATS) == REASONING_PARSERS


CERTAIN: list[tuple[dict[str, Any], str, list[str]]] = [
    (
        {"tool_choice": "required"},
        '[{"name": "weather", "arguments": {"days": 3}}, {"name": "clock", "arguments": {}}]',
        ["weather", "clock"],
    ),
    ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, '{"days": 3}', ["clock"]),
]


@pytest.mark.parametrize(("choice", "text", "names"), CERTAIN)
async def test_a_call_that_is_certain(
    start: Start, choice: dict[str, Any], text: str, names: list[str]
) -> None:
    """Without a parser, too: a grammar has the text be what is read as calls."""
    running = await begin(start, text, tool_call_parser=None)
    asked = {"messages": MESSAGES, "tools": TOOLS} | choice
    status, body = await running.post("/v1/chat/completions", asked)
    assert status == 200
    message = body["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == names
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"days": 3}
    assert message["content"] is None
    assert body["choices"][0]["finish_reason"] == ("tool_calls" if len(names) > 1 else "stop")
    assert running.worker.pid is not None, "a grammar is not compiled on the event loop"
    grammar = running.backend.submitted[0].params.grammar
    assert grammar is not None
    assert await to_thread(follows, grammar, text)
    assert not await to_thread(follows, grammar, text.replace("3", '"x"'))
    assert not await to_thread(follows, grammar, text.replace("clock", "no_such")) or len(names) == 1


def follows(grammar: Grammar, text: str) -> bool:
    """Whether the whole text is one of the grammar's."""
    characters = LLTokenizer("byte")
    matcher = LLMatcher(characters, to_lark(grammar))
    taken = [*characters.tokenize_str(text)]
    return matcher.try_consume_tokens(taken) == len(taken) and matcher.is_accepting()


async def test_one_certain_call(start: Start) -> None:
    running = await begin(start, "[]")
    asked = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    await running.post("/v1/chat/completions", asked)
    grammar = running.backend.submitted[0].params.grammar
    assert grammar is not None
    one = '{"name": "clock", "arguments": {}}'
    assert await to_thread(follows, grammar, f"[{one}]")
    assert not await to_thread(follows, grammar, f"[{one}, {one}]")
    assert not await to_thread(follows, grammar, "[]")


def test_each_tools_schema_is_a_document_of_its_own() -> None:
    schema = {"properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"], "$defs": {"a": {"enum": [7]}}}
    grammar = certain_calls([{"name": "f", "parameters": schema}, {"name": 'g"'}], several=True)
    assert follows(grammar, '[{"name": "f", "arguments": {"a": 7}}, {"name": "g\\"", "arguments": {}}]')
    assert not follows(grammar, '[{"name": "f", "arguments": {"a": 8}}]')
    assert not follows(grammar, '[{"name": "g\\"", "arguments": {"a": 7}}]')


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({"properties": {"a": {"type": "str"}}}, ".properties.a"),
        ({"properties": {"a": {"minimum": 1e30}}}, ".properties.a.minimum"),
        ({"type": "array"}, ".type"),
    ],
)  # fmt: skip
def test_a_call_that_cannot_be_certain_names_the_tool_and_the_place(
    wrong: Any, place: str, several: bool
) -> None:
    tools = [*TOOLS, {"type": "function", "function": {"name": "f", "parameters": wrong}}]
    named = {"type": "function", "function": {"name": "f"}}
    reader = JobReader(settings(**PARSING), tool_text())
    asked = {"messages": MESSAGES, "tools": tools, "tool_choice": "required" if several else named}
    with pytest.raises(ApiError) as raised:
        reader.chat(asked)
    assert (raised.value.param, raised.value.code) == (
        f"tools[2].function.parameters{place}",
        "invalid_grammar",
    )


def test_a_fault_within_a_schema_is_told_by_the_place_where_the_client_gave_it() -> None:
    reader = JobReader(settings(**PARSING), tool_text())
    wrong = {"type": "object", "properties": {"a": {"type": "str"}}}
    form = {"type": "json_schema", "name": "x", "schema": wrong}
    tool = {"type": "function", "name": "f", "parameters": wrong}
    message = {"max_tokens": 5, "messages": MESSAGES, "model": MODEL}
    used = {"tools": [{"name": "f", "input_schema": wrong}], "tool_choice": {"type": "any"}}
    for read, asked, place in (
        (lambda body: reader.responses(body, None), {"text": {"format": form}}, "text.format.schema"),
        (
            lambda body: reader.responses(body, None),
            {"tools": [tool], "tool_choice": "required"},
            "tools[0].parameters",
        ),
        (
            reader.messages,
            message | {"output_config": {"format": {"type": "json_schema", "schema": wrong}}},
            "output_config.format.schema",
        ),
        (reader.messages, message | used, "tools[0].input_schema"),
    ):
        with pytest.raises(ApiError) as raised:
            read(asked if "messages" in asked else {"input": "x", **asked})
        assert raised.value.param == f"{place}.properties.a"
        assert raised.value.message.startswith(f"'{place}.properties.a' ")


async def test_a_grammar_is_of_content(start: Start) -> None:
    """What was asked for as JSON is not taken for reasoning, which the prompt has begun."""
    running = await begin(start, '{"a": 1}', reasoning_parser="deepseek_r1")
    asked = {"messages": MESSAGES, "response_format": {"type": "json_object"}}
    _, body = await running.post("/v1/chat/completions", asked)
    assert body["choices"][0]["message"]["content"] == '{"a": 1}'


def test_calls_are_read_from_a_text_of_structural_tags() -> None:
    reader = JobReader(settings(**PARSING), tool_text())
    asked = {"messages": MESSAGES, "tools": TOOLS}
    tag = {"type": "structural_tag", "format": {"type": "any_text"}}
    job = reader.chat(asked | {"response_format": tag})
    assert job.parts[0].params.grammar is not None
    assert job.output.form == reader.chat(asked).output.form


async def test_only_one_thing_says_what_comes(start: Start) -> None:
    running = await begin(start)
    for other in ({"response_format": {"type": "json_object"}}, {"allowed_token_ids": [5]}):
        asked = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"} | other
        status, body = await running.post("/v1/chat/completions", asked)
        assert (status, body["error"]["code"]) == (400, "unsupported_parameter")
