"""`/v1/responses` by the official client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import openai.resources.responses
import pytest

from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.responses.body import conversation
from elastic_ep.gateway.responses.store import ResponseStore, Stored
from elastic_ep.gateway.serving import Run, Serving
from tests.gateway.conftest import Running, Start, served_once
from tests.gateway.fakes import MODEL, FakeBackend, aborts, never_ends, says
from tests.gateway.test_openai_client import connect
from tests.gateway.test_tools import ANSWER, ARGUMENTS, PARSING, TOOLS, begin, tool_text

pytestmark = pytest.mark.anyio
FLAT: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    async def ask(url: str) -> None:
        async with connect(url) as client:
            made = await client.responses.create(
                model=MODEL, instructions="x", input="x", tools=FLAT, metadata={"a": "b"}
            )
            await client.responses.input_items.list(made.id)
            two: Any = [{"role": "user", "content": "x"}] * 2
            made = await client.responses.create(model=MODEL, input=two)
            async for _ in await client.responses.input_items.list(made.id, limit=1):
                pass  # the first time that there is a next page
            await client.responses.retrieve(made.id)
            async with client.responses.stream(model=MODEL, input="x", tools=FLAT) as stream:
                await stream.get_final_response()

    asyncio.run(served_once(ask, FakeBackend(says(ANSWER)), tool_text(), **PARSING))


@pytest.fixture
async def running(start: Start) -> Running:
    return await begin(start)


@pytest.fixture
async def client(running: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connect(running.url) as client:
        yield client


def prompt_of(running: Running) -> str:
    return tool_text().decode(running.backend.submitted[-1].prompt, skip_special_tokens=False)


def plain(response: Any) -> list[Any]:
    shown = []
    for item in response.output:
        match item.type:
            case "reasoning":
                shown.append(("reasoning", item.content[0].text))
            case "message":
                shown.append(("message", item.content[0].text))
            case "function_call":
                shown.append((item.name, item.arguments))
    return shown


OUTPUT = [
    ("reasoning", "So: weather."),
    ("message", "I look."),
    ("weather", ARGUMENTS),
    ("clock", "{}"),
]


async def test_create(client: openai.AsyncOpenAI, running: Running) -> None:
    response = await client.responses.create(
        model=MODEL, instructions="Be brief.", input="Weather?", tools=FLAT, metadata={"a": "b"}
    )
    assert plain(response) == OUTPUT
    assert (response.status, response.object, response.output_text) == ("completed", "response", "I look.")
    assert response.instructions == "Be brief."
    assert (response.metadata, len(response.tools)) == ({"a": "b"}, 2)
    assert response.usage is not None
    assert response.usage.input_tokens == len(running.backend.submitted[0].prompt)
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    assert prompt_of(running).endswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_events_come_in_sequence(client: openai.AsyncOpenAI) -> None:
    events: list[Any] = [
        event
        async for event in await client.responses.create(
            model=MODEL, input="Weather?", tools=FLAT, stream=True
        )
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = ("output_text.delta", "reasoning_text.delta", "function_call_arguments.delta")
    once = [kind for place, kind in enumerate(kinds) if kind not in deltas or kinds[place - 1] != kind]
    item = ["output_item.added", "content_part.added"]
    done = ["content_part.done", "output_item.done"]
    call = ["output_item.added", deltas[2], "function_call_arguments.done", "output_item.done"]
    assert once == [
        "created", "in_progress",
        *item, deltas[1], "reasoning_text.done", *done,
        *item, deltas[0], "output_text.done", *done,
        *call, *call, "completed",
    ]  # fmt: skip
    assert kinds.count(deltas[2]) > 10, "as they come"
    last: Any = events[-1]
    assert plain(last.response) == OUTPUT
    # What was told on the way is what the response has at the end.
    for place, made in enumerate(last.response.output):
        mine = [event for event in events if getattr(event, "output_index", None) == place]
        told = "".join(event.delta for event in mine if event.type.endswith(".delta"))
        assert told == OUTPUT[place][1]
        assert mine[-1].item == made
        assert {getattr(event, "item_id", made.id) for event in mine} == {made.id}
    assert await client.responses.retrieve(last.response.id) == last.response


async def test_helpers_of_the_client_read_the_stream(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model=MODEL, input="Weather?", tools=FLAT) as stream:
        async for _ in stream:
            pass
        assert plain(await stream.get_final_response()) == OUTPUT


async def test_a_conversation_goes_on(client: openai.AsyncOpenAI, running: Running) -> None:
    first = await client.responses.create(model=MODEL, input="Weather?", tools=FLAT, stream=False)
    call = next(item for item in first.output if item.type == "function_call")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    running.backend.reply = says("It rains.")
    second = await client.responses.create(
        model=MODEL, input=[result], tools=FLAT, previous_response_id=first.id
    )
    assert second.output_text == "It rains."
    assert second.previous_response_id == first.id
    shown = prompt_of(running)
    assert (
        f"user\nWeather?<|im_end|>\n<|im_start|>assistant\nI look.<call {call.call_id} weather days=3"
        in shown
    )
    assert shown.endswith("<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n")
    third = await client.responses.create(model=MODEL, input="And?", previous_response_id=second.id)
    assert "rain<|im_end|>\n<|im_start|>assistant\nIt rains.<|im_end|>\n<|im_start|>user\nAnd?" in prompt_of(
        running
    )
    assert (await client.responses.retrieve(third.id)).output_text == "It rains."


async def test_a_long_conversation_is_read_in_the_other_process(start: Start) -> None:
    running = await begin(start, "Yes.", max_model_len=20_000)
    async with connect(running.url) as client:
        first = await client.responses.create(model=MODEL, input="x" * 7000)
        read_beside = [running.worker.pid is not None]
        second = await client.responses.create(model=MODEL, input="y" * 7000, previous_response_id=first.id)
        read_beside.append(running.worker.pid is not None)
        assert read_beside == [False, True]
        shown = prompt_of(running)
        assert "x" * 7000 in shown
        assert "assistant\nYes.<|im_end|>" in shown
        with pytest.raises(openai.BadRequestError, match="Your input came to"):
            await client.responses.create(model=MODEL, input="z" * 7000, previous_response_id=second.id)


async def test_items_as_clients_keep_them(client: openai.AsyncOpenAI, running: Running) -> None:
    """A client that keeps the conversation itself sends back what it got."""
    first = await client.responses.create(model=MODEL, input="Weather?", tools=FLAT, store=False)
    output: list[Any] = [*first.output]
    kept: Any = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Brief."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        *(item.model_dump(exclude_none=True) for item in output),
        *(
            {"type": "function_call_output", "call_id": item.call_id, "output": "rain"}
            for item in output
            if item.type == "function_call"
        ),
    ]
    await client.responses.create(model=MODEL, instructions="You.", input=kept, tools=FLAT)
    shown = prompt_of(running)
    assert "<|im_start|>system\nYou.\n\nBrief.<|im_end|>" in shown
    assert shown.count("<|im_start|>assistant\n") == 2, "one turn is one message"
    assert shown.count("<|im_start|>tool\nrain") == 2


async def test_what_is_kept(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model=MODEL, input="Weather?", tools=FLAT)
    assert await client.responses.retrieve(response.id) == response
    items = await client.responses.input_items.list(response.id)
    assert [item.type for item in items.data] == ["message"]
    await client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)
    other = await client.responses.create(model=MODEL, input="Weather?", store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(other.id)
    with pytest.raises(openai.NotFoundError) as refused:
        await client.responses.create(model=MODEL, input="And?", previous_response_id=other.id)
    assert refused.value.param == "previous_response_id"


async def test_a_bound_makes_it_incomplete(client: openai.AsyncOpenAI, running: Running) -> None:
    running.backend.reply = says("one two three four five")
    response = await client.responses.create(model=MODEL, input="Count.", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    made: Any = response.output[0]
    assert made.status == "incomplete"


async def test_in_the_background(client: openai.AsyncOpenAI, running: Running) -> None:
    queued = await client.responses.create(model=MODEL, input="Weather?", tools=FLAT, background=True)
    assert queued.status in ("queued", "in_progress")
    followed: list[Any] = [
        event async for event in await client.responses.retrieve(queued.id, stream=True, starting_after=0)
    ]
    assert [event.sequence_number for event in followed] == list(range(1, len(followed) + 1))
    assert followed[-1].type == "response.completed"
    assert plain(await client.responses.retrieve(queued.id)) == OUTPUT


async def test_cancelled_in_the_background(client: openai.AsyncOpenAI, running: Running) -> None:
    running.backend.reply = never_ends("one two")
    queued = await client.responses.create(model=MODEL, input="Count.", background=True)
    stream = await running.backend.arrived.get()
    async with asyncio.timeout(10):
        await stream.idle.wait()
    cancelled = await client.responses.cancel(queued.id)
    assert cancelled.status == "cancelled"
    assert cancelled.output_text == "one two"
    assert stream.cancelled.is_set()
    assert (await client.responses.retrieve(queued.id)).status == "cancelled"
    running.backend.reply = says("Yes.")
    finished = await client.responses.create(model=MODEL, input="x", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError):
        await client.responses.cancel(finished.id)


async def test_what_is_deleted_ends_and_does_not_come_back(
    client: openai.AsyncOpenAI, running: Running
) -> None:
    running.backend.reply = never_ends("one two")
    queued = await client.responses.create(model=MODEL, input="Count.", background=True)
    stream = await running.backend.arrived.get()
    async with asyncio.timeout(10):
        await stream.idle.wait()
    await client.responses.delete(queued.id)
    assert stream.cancelled.is_set()
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(queued.id)


async def test_a_failure_is_told_within_the_stream(client: openai.AsyncOpenAI, running: Running) -> None:
    running.backend.reply = aborts("one")
    events: list[Any] = [
        event async for event in await client.responses.create(model=MODEL, input="x", stream=True)
    ]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("input", {"input": None}),
    ("input", {"input": []}),
    ("input[0]", {"input": ["x"]}),
    ("input[0].role", {"input": [{"role": "tool", "content": "x"}]}),
    ("input[0].content", {"input": [{"role": "user", "content": 7}]}),
    ("input[0].content[0].type", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
    ("input[0].type", {"input": [{"type": "item_reference", "id": "x"}]}),
    ("input[0].call_id", {"input": [{"type": "function_call_output", "output": "x"}]}),
    ("tools[0].type", {"tools": [{"type": "web_search"}]}),
    ("tool_choice", {"tool_choice": "any"}),
    ("tool_choice", {"tools": FLAT, "tool_choice": {"type": "function", "name": "x"}}),
    ("truncation", {"truncation": "auto"}),
    ("include[0]", {"include": ["message.input_image.image_url"]}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("top_logprobs", {"top_logprobs": 21, "include": ["message.output_text.logprobs"]}),
    ("conversation", {"conversation": "x"}),
    ("reasoning.effort", {"reasoning": {"effort": "high"}}),
    ("text.verbosity", {"text": {"verbosity": "low"}}),
    ("text.format.schema", {"text": {"format": {"type": "json_object", "schema": {}}}}),
    ("text.format.grammar", {"text": {"format": {"type": "json_schema", "schema": {}, "grammar": "x"}}}),
    (
        "input[0].encrypted_content",
        {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
    ),
    ("previous_input_messages", {"previous_input_messages": [{}]}),
    ("max_output_tokens", {"max_output_tokens": 5000}),
    ("temperature", {"temperature": 3}),
    ("background", {"background": True, "store": False}),
    ("model", {"model": "another"}),
]


@pytest.mark.parametrize(("param", "change"), WRONG)
async def test_what_cannot_be_honoured(running: Running, param: str, change: dict[str, Any]) -> None:
    status, body = await running.post("/v1/responses", {"input": "Weather?"} | change)
    assert status in (400, 404)
    assert body["error"]["param"] == param, body
    assert param in body["error"]["message"] or status == 404 or "maximum context" in body["error"]["message"]


async def test_a_template_that_fails_is_about_the_input(running: Running) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "no object"}
    status, body = await running.post("/v1/responses", {"input": [call]})
    assert (status, body["error"]["param"]) == (400, "input")


def test_no_reasoning_is_dropped() -> None:
    def part(kind: str, said: str) -> Any:
        return {"type": kind, "role": "assistant", "content": [{"type": "text", "text": said}]}

    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    items = [part("reasoning", "One."), part("message", "Two."), part("reasoning", "Three."), call]
    (message,) = conversation(None, items)
    assert message["reasoning_content"] == "One.Three."
    assert (message["content"], len(message["tool_calls"])) == ("Two.", 1)


def test_the_oldest_are_given_up() -> None:
    store = ResponseStore(1000)
    for name in "abc":
        store.put(name, Stored((), "x" * 400, ""))
        if name == "b":
            store.get("a")
    with pytest.raises(ApiError):
        store.get("b")
    store.put("huge", Stored((), "x" * 1001, ""))
    store.get("c")
    store.get("a")
    with pytest.raises(ApiError):
        store.get("huge")
    store.put("d", Stored((), "x" * 400, "", over=False))
    store.put("e", Stored((), "x" * 1000, ""))
    store.get("d")
    assert store._bytes == 400, "what there is no room for is not kept, what is being made is"


async def test_items_are_listed_as_asked(client: openai.AsyncOpenAI) -> None:
    given: Any = [{"role": "user", "content": str(place), "id": f"mine{place}"} for place in range(30)]
    del given[7]["id"]
    made = await client.responses.create(model=MODEL, input=given)
    names = [item.get("id", "item_7") for item in given]
    for order, expected in (("asc", names), ("desc", names[::-1])):
        for limit in (1, 7, len(names), 100):
            page = await client.responses.input_items.list(made.id, order=order, limit=limit)  # type: ignore[arg-type]
            assert [item.id for item in page.data] == expected[:limit]
            assert page.has_more == (limit < len(names))
            assert [item.id async for item in page] == expected, "its client asks for the next ones"
    first = await client.responses.input_items.list(made.id)
    assert [item.id for item in first.data] == names[::-1][:20], "as OpenAI has it"


@pytest.mark.parametrize(
    ("param", "query"),
    [("limit", "limit=0"), ("limit", "limit=101"), ("limit", "limit=x"), ("order", "order=up"), ("after", "after=x")],
)  # fmt: skip
async def test_items_that_cannot_be_listed(running: Running, param: str, query: str) -> None:
    _, made = await running.post("/v1/responses", {"input": "x"})
    url = f"{running.url}/v1/responses/{made['id']}/input_items?{query}"
    async with running.http.get(url) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, param)


async def test_a_server_that_keeps_nothing_says_so(start: Start) -> None:
    running = await begin(start, "Yes.", responses_store_bytes=0)
    status, made = await running.post("/v1/responses", {"input": "x"})
    assert (status, made["store"]) == (200, False)
    for wish in ({"store": True}, {"background": True}):
        status, body = await running.post("/v1/responses", {"input": "x"} | wish)
        assert (status, body["error"]["param"]) == (400, next(iter(wish)))


async def test_a_client_that_leaves_before_it_has_an_id(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody could ask for what is made then: it ends."""
    waiting, given_up = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def runs(self: Serving, *args: Any, **more: Any) -> AsyncIterator[list[Run]]:
        try:
            waiting.set()
            await asyncio.Event().wait()
            yield []
        finally:
            given_up.set()

    monkeypatch.setattr(Serving, "runs", runs)
    asked = asyncio.create_task(running.post("/v1/responses", {"input": "x", "background": True}))
    async with asyncio.timeout(10):
        await waiting.wait()
        asked.cancel()
        await given_up.wait()


@pytest.mark.parametrize("top", [0, 2])
async def test_log_probabilities_of_the_text(client: openai.AsyncOpenAI, top: int) -> None:
    """Those of the text's tokens, and of no others: neither of reasoning before it nor of calls behind it."""
    asked: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": top}
    events: list[Any] = [
        event
        async for event in await client.responses.create(
            model=MODEL, input="Weather?", tools=FLAT, stream=True, **asked
        )
    ]
    whole = await client.responses.create(model=MODEL, input="Weather?", tools=FLAT, **asked)
    assert whole.top_logprobs == top
    for response in (whole, events[-1].response):
        (text,) = [item.content[0] for item in response.output if item.type == "message"]
        told = text.logprobs
        assert "".join(one.token for one in told) == text.text == "I look."
        assert [one.logprob for one in told] == [-0.5] * len(told)
        assert {len(one.top_logprobs) for one in told} == {top}
        assert b"".join(bytes(one.bytes) for one in told) == text.text.encode()
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [one.token for event in deltas for one in event.logprobs] == [one.token for one in told]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert len(done.logprobs) == len(told)
