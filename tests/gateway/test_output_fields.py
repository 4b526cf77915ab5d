"""What is shown of the generated tokens: by stream and at once the same, and as `Text.decode` has it."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_ep.gateway.generate import ChoiceReader
from elastic_ep.gateway.job import Output
from tests.gateway.conftest import Running, Start
from tests.gateway.fakes import FakeBackend, Submitted, byte_tokens, sample_text, says, tokens_of

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
END = sample_text().encode("<|im_end|>")[0]


def reply(request: Submitted) -> Any:
    """By choice another text, of special tokens and characters of several tokens too; some end at the limit."""
    ids = sample_text().encode(f"{request.choice}: Anna <|im_start|>has 12 é apples") + byte_tokens("✓ é.")
    ids = ids if request.choice % 2 else [*ids, END]
    made = tokens_of(ids, finish="length" if request.choice % 2 else "stop", logprobs=request.params.logprobs)
    return [tuple(made[place : place + 3]) for place in range(0, len(made), 3)]


@pytest.fixture
async def running(start: Start) -> Running:
    return await start(FakeBackend(reply))


async def streamed(running: Running, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The events of a stream put together as the answer that is not streamed."""
    choices: dict[int, dict[str, Any]] = defaultdict(dict)
    whole: dict[str, Any] = {}
    async with running.http.post(running.url + path, json=body | {"stream": True}) as response:
        assert response.status == 200
        events = (await response.text()).strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        chunk = json.loads(event.removeprefix("data: "))
        if "prompt_token_ids" in chunk:
            assert whole.get("prompt_token_ids", chunk["prompt_token_ids"]) == chunk["prompt_token_ids"]
        whole |= {name: chunk[name] for name in ("id", "model", "prompt_token_ids") if name in chunk}
        for choice in chunk["choices"]:
            _join(choices[choice["index"]], choice)
        whole["usage"] = chunk.get("usage")
    return whole | {"choices": [choices[index] for index in sorted(choices)]}


def _join(into: dict[str, Any], choice: dict[str, Any]) -> None:
    text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
    into["text"] = into.get("text", "") + text
    if choice["finish_reason"]:
        assert "finish_reason" not in into, "nothing comes after the end"
        into["finish_reason"] = choice["finish_reason"]
    for name in ("token_ids", "prompt_token_ids"):
        if name in choice:
            into[name] = into.get(name, []) + choice[name]
    for name, values in (choice["logprobs"] or {}).items():
        if values is not None:
            into.setdefault("logprobs", {}).setdefault(name, []).extend(values)


def plain(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer that is not streamed, in the same form."""
    choices = []
    for choice in answer["choices"]:
        made = {
            name: choice[name]
            for name in ("finish_reason", "token_ids", "prompt_token_ids")
            if name in choice
        }
        made["text"] = choice["text"] if "text" in choice else choice["message"]["content"]
        logprobs = {name: values for name, values in (choice["logprobs"] or {}).items() if values is not None}
        choices.append(made | ({"logprobs": logprobs} if logprobs else {}))
    kept = {name: answer[name] for name in ("id", "model", "prompt_token_ids", "usage") if name in answer}
    return kept | {"choices": choices}


OPTIONS: dict[str, list[Any]] = {
    "n": [1, 3],
    "stop": [[], ["12"], ["é a"], ["<|im_start|>has"]],
    "include_stop_str_in_output": [False, True],
    "skip_special_tokens": [False, True],
    "return_token_ids": [False, True],
    "min_tokens": [0, 7],
    "logprobs": [None, 2],
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("seed", range(12))
async def test_a_stream_comes_to_what_is_answered_at_once(running: Running, path: str, seed: int) -> None:
    body: dict[str, Any] = {"request_id": "x", "max_tokens": 60}
    for place, (name, values) in enumerate(OPTIONS.items()):
        body[name] = (
            values[(seed >> place) % len(values)] if place % 2 else values[(seed + place) % len(values)]
        )
    if path == CHAT:
        body |= {"messages": [{"role": "user", "content": "A"}], "logprobs": body["logprobs"] is not None}
    else:
        body |= {"prompt": ["Anna", "Bob"], "echo": seed % 2 == 0 and body["logprobs"] is None}
    usage = {"stream_options": {"include_usage": True, "continuous_usage_stats": bool(seed % 3)}}
    status, answer = await running.post(path, body)
    assert status == 200
    assert await streamed(running, path, body | usage) == plain(answer)
    told = [choice.get("token_ids") for choice in answer["choices"]]
    if not body["return_token_ids"]:
        assert set(map(str, told)) == {"None"}
        return
    for request, choice, ids in zip(running.backend.submitted, answer["choices"], told, strict=False):
        made = [token.token for batch in reply(request) for token in batch]
        assert ids == made[: len(ids)] != []
        assert len(ids) == len(made) or body["stop"]
        assert path == CHAT or tuple(choice["prompt_token_ids"]) == request.prompt


async def test_every_chunk_tells_the_usage_so_far(running: Running) -> None:
    body = {
        "prompt": "Anna",
        "max_tokens": 60,
        "stream": True,
        "stream_options": {"continuous_usage_stats": True},
    }
    async with running.http.post(running.url + COMPLETIONS, json=body) as response:
        events = (await response.text()).strip().split("\n\n")[:-1]
    usages = [json.loads(event.removeprefix("data: "))["usage"] for event in events]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert counts[-1] == sum(map(len, reply(running.backend.submitted[0])))
    prompt = len(sample_text().encode("Anna"))
    assert all(usage["prompt_tokens"] == prompt for usage in usages)
    assert all(
        usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages
    )


def shown(ids: list[int], finish: str, **options: Any) -> tuple[str, str | None]:
    reader = ChoiceReader(sample_text(), Output(**options))
    text = "".join(reader.feed((token,)) for token in tokens_of(ids, finish=finish) if reader.finish is None)
    return text, reader.finish


TOKENS = st.lists(
    st.sampled_from([*range(3, 60), *sample_text().encode("<|im_start|><|endoftext|>")]),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(TOKENS, st.booleans(), st.booleans(), st.sampled_from(["stop", "length"]))
def test_special_tokens_and_the_last_one_are_shown_if_asked(
    ids: list[int], skip: bool, include: bool, finish: str
) -> None:
    kept = ids if include or finish == "length" else ids[:-1]
    text, _ = shown(ids, finish, skip_special_tokens=skip, include_stop=include)
    assert text == sample_text().decode(kept, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.text("ab", min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(0, 14),
)
def test_a_stop_string_counts_behind_min_tokens_and_is_shown_if_asked(
    text: str, stops: list[str], least: int
) -> None:
    ids = byte_tokens(text)
    cut, finish = shown(ids, "length", stop=tuple(stops), min_tokens=least)
    whole, same = shown(ids, "length", stop=tuple(stops), min_tokens=least, include_stop=True)
    assert finish == same
    assert cut[:least] == text[: min(least, len(cut))]
    ends = [
        end for stop in stops for end in range(least + len(stop), len(text) + 1) if text[:end].endswith(stop)
    ]
    assert whole == text[: min(ends, default=len(text))]
    if ends:
        assert finish == "stop"
        assert whole.startswith(cut)
        assert whole[len(cut) :] in stops
    else:
        assert (cut, finish) == (text, "length")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_many_choices_have_to_show_is_made_some_a_turn(
    start: Start, path: str, stream: bool
) -> None:
    """All end at once; the loop's watch (`tests/loop_plugin.py`) fails this if it is made in one turn."""
    choices, length = 64, 100

    def many(request: Submitted) -> Any:
        made = tokens_of(byte_tokens("a" * length), finish="length", logprobs=request.params.logprobs)
        return [tuple(made[place : place + 4]) for place in range(0, length, 4)]

    running = await start(FakeBackend(many), max_model_len=60_000)
    body: dict[str, Any] = {"n": choices, "max_tokens": length, "temperature": 1, "stream": stream}
    prompt = [17] * 50_000
    if path == CHAT:
        text = "a " * 25_000
        body |= {"messages": [{"role": "user", "content": text}], "return_token_ids": True}
        body |= {} if stream else {"logprobs": True, "top_logprobs": 20}
    else:
        body |= {"prompt": prompt, "return_token_ids": True} | ({} if stream else {"logprobs": 20})
    ended = 0
    async with running.http.post(running.url + path, json=body) as response:
        assert response.status == 200
        async for (
            piece
        ) in response.content.iter_any():  # to parse it all would hold up the loop, which is the test's too
            ended += piece.count(b'"finish_reason":"len')
    assert ended > choices / 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_ended_it(start: Start, path: str, stream: bool) -> None:
    """In vLLM's words and in SGLang's."""
    running = await start(FakeBackend(says("one two three")))
    end, last = (sample_text().encode(text)[-1] for text in ("<|im_end|>", "one two three"))
    asked: dict[str, Any] = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 50}
    del asked["messages" if path == "/v1/completions" else "prompt"]
    for more, reason, matched in (
        ({"stop": ["w", "tw"]}, "tw", "tw"),
        ({}, None, end),
        ({"stop_token_ids": [end]}, end, end),
        ({"max_tokens": 1}, None, None),
        ({"stop_token_ids": [last], "max_tokens": 1}, None, None),
    ):
        body = asked | more | {"stream": stream}
        async with running.http.post(running.url + path, json=body) as response:
            said = await response.text()
        if stream:
            chunks = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
            choice = chunks[-1]["choices"][0]
            assert all("stop_reason" not in chunk["choices"][0] for chunk in chunks[:-1])
        else:
            choice = json.loads(said)["choices"][0]
        assert (choice["stop_reason"], choice["matched_stop"]) == (reason, matched)


async def test_words_that_may_not_come_are_told_in_tokens(start: Start) -> None:
    """As vLLM has them: at a text's beginning, and behind a blank if that is as many tokens."""
    running = await start()
    status, _ = await running.post(COMPLETIONS, {"prompt": "x", "bad_words": ["apples", "é", "apples"]})
    assert status == 200
    text = sample_text()
    plain, behind, accent = (tuple(text.encode(word)) for word in ("apples", " apples", "é"))
    expected = [plain, *([behind] if len(behind) == len(plain) else []), accent]
    assert [*running.backend.submitted[0].params.bad_words] == expected
    for wrong in ([""], "apples", [" " * 300], [5]):
        status, body = await running.post(COMPLETIONS, {"prompt": "x", "bad_words": wrong})
        assert (status, body["error"]["param"].split("[")[0]) == (400, "bad_words")
    asked = {"prompt": "x", "bad_words": ["a"], "regex": "a+"}
    status, body = await running.post(COMPLETIONS, asked)
    assert (status, body["error"]["param"]) == (400, "bad_words")
