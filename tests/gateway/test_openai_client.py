"""The official client against the server, unchanged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import suppress
from typing import Any

import openai
import openai.resources  # which the client imports late, on the event loop
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionTokenLogprob
from openai.types.completion_choice import CompletionChoice

from elastic_ep.wire.messages import Token
from tests.gateway.conftest import Running, Start
from tests.gateway.fakes import MODEL, FakeBackend, Submitted, never_ends, sample_text, says, tokens_of

pytestmark = pytest.mark.anyio
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is 12 - 5?"}]


def connect(url: str, api_key: str = "none") -> openai.AsyncOpenAI:
    # Without it the client reads all certificates of this machine, on the event loop.
    plain = openai.DefaultAsyncHttpxClient(verify=False)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, http_client=plain)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """The client imports much at its first request: here on a loop that serves nobody."""

    async def ask() -> None:
        plain = openai.DefaultAsyncHttpxClient(verify=False)
        nobody = "http://127.0.0.1:1/v1"
        async with openai.AsyncOpenAI(
            base_url=nobody, api_key="none", max_retries=0, http_client=plain
        ) as client:
            with suppress(openai.APIConnectionError):
                await client.models.retrieve(MODEL)

    asyncio.run(ask())


@pytest.fixture
async def running(start: Start) -> Running:
    return await start()


@pytest.fixture
async def client(running: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connect(running.url) as client:
        yield client


async def test_models(client: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_completion(client: openai.AsyncOpenAI, running: Running) -> None:
    answer = await client.completions.create(model=MODEL, prompt="12 - 5 =", max_tokens=50)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "The answer is 7."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    words = len(sample_text().encode("The answer is 7."))
    assert answer.usage.completion_tokens == words + 1, "the end-of-sequence token counts"
    assert answer.usage.prompt_tokens == len(sample_text().encode("12 - 5 ="))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert running.backend.submitted[0].prompt == tuple(sample_text().encode("12 - 5 ="))


async def test_completion_stops_at_sixteen_tokens_unless_told(
    client: openai.AsyncOpenAI, running: Running
) -> None:
    running.backend.reply = says("one two three four five six seven eight nine ten")
    answer = await client.completions.create(model=MODEL, prompt="Count")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    ids = sample_text().encode("one two three four five six seven eight nine ten")
    assert answer.choices[0].text == sample_text().decode(ids[:16]), "the last token at the limit is shown"


async def test_streamed_completion(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt="12 - 5 =", max_tokens=50, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "The answer is 7."
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count("stop") == 1
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert len(chunks) > 4, "streamed, not sent at the end"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(sample_text().encode("The answer is 7.")) + 1
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_chat(client: openai.AsyncOpenAI, running: Running) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.choices[0].message.content == "The answer is 7."
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    prompt = "<|im_start|>user\nWhat is 12 - 5?<|im_end|>\n<|im_start|>assistant\n"
    request = running.backend.submitted[0]
    assert request.prompt == tuple(sample_text().encode(prompt, add_special_tokens=False))
    assert request.params.max_tokens == 256 - len(request.prompt), "the rest of the context"
    assert request.params.temperature == 1.0


async def test_streamed_chat(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "The answer is 7."
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1].usage is not None


@pytest.mark.parametrize("stream", [False, True])
async def test_usage_tells_the_prompts_tokens_that_were_not_computed(
    client: openai.AsyncOpenAI, running: Running, stream: bool
) -> None:
    """A prompt counts once: what its second choice finds may be of the first."""

    async def cached(create: Any, **asked: Any) -> Any:
        if stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
            usages = [chunk.usage async for chunk in await create(model=MODEL, **asked)]
            assert set(usages[:-1]) == {None}
        else:
            usages = [(await create(model=MODEL, **asked)).usage]
        return usages[-1].prompt_tokens_details.cached_tokens

    running.backend.cached = [3, 5, 40, 60]
    assert await cached(client.completions.create, prompt=["A", "B"], n=2) == 43
    assert await cached(client.completions.create, prompt="A") == 0
    running.backend.cached = [16]
    assert await cached(client.chat.completions.create, messages=MESSAGES) == 16


@pytest.mark.parametrize("stream", [False, True])
async def test_many_choices(client: openai.AsyncOpenAI, running: Running, stream: bool) -> None:
    running.backend.reply = lambda request: says(f"{request.prompt[0]} {request.choice}")(request)
    prompts = ["A", "B"]
    texts = dict.fromkeys(range(4), "")
    if stream:
        async for chunk in await client.completions.create(
            model=MODEL, prompt=prompts, n=2, seed=9, max_tokens=40, stream=True
        ):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        answer = await client.completions.create(model=MODEL, prompt=prompts, n=2, seed=9, max_tokens=40)
        texts = {choice.index: choice.text for choice in answer.choices}
    first, second = (sample_text().encode(prompt)[0] for prompt in prompts)
    assert texts == {0: f"{first} 0", 1: f"{first} 1", 2: f"{second} 0", 3: f"{second} 1"}
    assert [request.seed for request in running.backend.submitted] == [9] * 4
    assert [request.choice for request in running.backend.submitted] == [0, 1, 0, 1]


async def test_sampling_parameters_arrive(client: openai.AsyncOpenAI, running: Running) -> None:
    await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        max_completion_tokens=11,
        seed=-1,
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "stop_token_ids": [7, 8],
            "no_such_field": {"ignored": True},
        },
    )
    request = running.backend.submitted[0]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.7, 0.9, 5, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.1)
    assert (params.max_tokens, params.ignore_eos, params.stop_token_ids) == (11, True, (7, 8))
    assert request.seed == 2**63 - 1
    assert params.logprobs is None


async def test_seeds_are_drawn_when_none_is_given(client: openai.AsyncOpenAI, running: Running) -> None:
    await client.completions.create(model=MODEL, prompt=["A", "A"])
    await client.completions.create(model=MODEL, prompt="A")
    assert len({request.seed for request in running.backend.submitted}) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string(client: openai.AsyncOpenAI, running: Running, stream: bool) -> None:
    running.backend.reply = says("It is 7. #### 7 and more")
    if stream:
        chunks = [
            chunk
            async for chunk in await client.completions.create(
                model=MODEL, prompt="A", stop=["####", "zzz"], max_tokens=60, stream=True
            )
        ]
        text, finish = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        answer = await client.completions.create(model=MODEL, prompt="A", stop="####", max_tokens=60)
        text, finish = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, finish) == ("It is 7. ", "stop")
    taken = running.backend.streams[0]
    assert taken.cancelled.is_set()
    assert taken.taken < len(sample_text().encode("It is 7. #### 7 and more")), (
        "nothing is read after the match"
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_its_choice_and_no_other(
    client: openai.AsyncOpenAI, running: Running, stream: bool
) -> None:
    def reply(request: Submitted) -> Iterable[tuple[Token, ...]]:
        return never_ends("7 #### 7" if request.choice == 0 else "7")(request)

    running.backend.reply = reply
    asked = client.completions.create(model=MODEL, prompt="A", stop="####", n=2, stream=stream)
    answer = asyncio.create_task(_read_all(asked))
    async with asyncio.timeout(5):
        first, second = [await running.backend.arrived.get() for _ in range(2)]
        await first.cancelled.wait()
        await second.idle.wait()
    assert not second.cancelled.is_set()
    answer.cancel()
    async with asyncio.timeout(1):
        await second.cancelled.wait()


async def _read_all(asked: Coroutine[Any, Any, Any]) -> None:
    answer = await asked
    if isinstance(answer, openai.AsyncStream):
        async for _ in answer:
            pass


@pytest.mark.parametrize("stream", [False, True])
async def test_a_token_that_ends_the_text_is_not_part_of_it(
    client: openai.AsyncOpenAI, running: Running, stream: bool
) -> None:
    running.backend.reply = says("The answer is 7", end=".")
    asked = {"prompt": "A", "max_tokens": 50, "stream": stream}
    async with running.http.post(f"{running.url}/v1/completions", json=asked) as response:
        lines = (await response.text()).replace("data: [DONE]", "").splitlines()
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines if line]
    assert "".join(texts) == "The answer is 7"


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(client: openai.AsyncOpenAI, stream: bool) -> None:
    tokens: list[str] = []
    offsets: list[int] = []
    text = ""
    parts: list[CompletionChoice] = []
    if stream:
        chunks = await client.completions.create(
            model=MODEL, prompt="A", logprobs=2, max_tokens=50, stream=True
        )
        parts = [chunk.choices[0] async for chunk in chunks]
    else:
        parts = (await client.completions.create(model=MODEL, prompt="A", logprobs=2, max_tokens=50)).choices
    for part in parts:
        assert part.logprobs is not None
        assert part.logprobs.tokens is not None
        assert part.logprobs.text_offset is not None
        assert part.logprobs.top_logprobs is not None
        assert all(len(top) >= 2 for top in part.logprobs.top_logprobs)
        text += part.text
        tokens += part.logprobs.tokens
        offsets += part.logprobs.text_offset
    assert text == "The answer is 7."
    assert "".join(tokens) == text + "<|im_end|>"
    assert offsets == [len("".join(tokens[:place])) for place in range(len(tokens))]


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(client: openai.AsyncOpenAI, running: Running, stream: bool) -> None:
    running.backend.reply = says("Zoë 🙂")
    entries: list[ChatCompletionTokenLogprob] = []
    if stream:
        async for chunk in await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            logprobs=True,
            top_logprobs=3,
            stream=True,
        ):
            logprobs = chunk.choices[0].logprobs
            entries += (logprobs.content or []) if logprobs else []
    else:
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            logprobs=True,
            top_logprobs=3,
        )
        assert answer.choices[0].logprobs is not None
        entries = answer.choices[0].logprobs.content or []
    raw = b"".join(bytes(entry.bytes or []) for entry in entries)
    assert raw.decode() == "Zoë 🙂<|im_end|>"
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 3 for entry in entries)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(client: openai.AsyncOpenAI, stream: bool) -> None:
    prompt = sample_text().encode("12 - 5 = ")
    if stream:
        chunks = await client.completions.create(
            model=MODEL, prompt=prompt, echo=True, max_tokens=50, stream=True
        )
        text = "".join([chunk.choices[0].text async for chunk in chunks])
    else:
        answer = await client.completions.create(model=MODEL, prompt=prompt, echo=True, max_tokens=50)
        text = answer.choices[0].text
    assert text == "12 - 5 = The answer is 7."


async def test_api_key(start: Start) -> None:
    running = await start(FakeBackend(), api_keys=("secret", "other"))
    for key in ("secret", "other"):
        async with connect(running.url, key) as client:
            assert (await client.completions.create(model=MODEL, prompt="A")).choices
    async with connect(running.url, "wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.completions.create(model=MODEL, prompt="A")
    for path in ("/health", "/live", "/metrics"):
        async with running.http.get(running.url + path) as response:
            assert response.status == 200
    for path in ("/v1/models", "/v1/fault_tolerance/status", "/nowhere"):
        async with running.http.get(running.url + path) as response:
            assert response.status == 401


async def test_errors_have_the_clients_classes(client: openai.AsyncOpenAI, running: Running) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.completions.create(model="gpt-9", prompt="A")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        await client.completions.create(model=MODEL, prompt="A", max_tokens=10_000)
    assert too_long.value.code == "context_length_exceeded"
    assert "256" in too_long.value.message
    running.backend.capacity = 0
    with pytest.raises(openai.RateLimitError) as busy:
        await client.completions.create(model=MODEL, prompt="A")
    assert busy.value.response.headers["Retry-After"] == "3"


async def test_an_abort_in_mid_stream_is_an_error_for_the_client(
    client: openai.AsyncOpenAI, running: Running
) -> None:
    def reply(request: Submitted) -> list[tuple[Token, ...]]:
        return [tuple(tokens_of([70, 71], finish=None)), tuple(tokens_of([72], finish="abort"))]

    running.backend.reply = reply
    with pytest.raises(openai.APIError, match="before it was complete"):
        async for _ in await client.completions.create(model=MODEL, prompt="A", stream=True):
            pass
    with pytest.raises(openai.InternalServerError, match="before it was complete"):
        await client.completions.create(model=MODEL, prompt="A")
