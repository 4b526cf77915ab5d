"""Prompts are scored: `echo` with `logprobs`, `prompt_logprobs`, and `max_tokens` 0."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from elastic_ep.gateway.job import Part
from elastic_ep.gateway.prompt_scores import prompt_logprobs_json, spelled_prompt
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.gateway.turns import Turns
from elastic_ep.wire.messages import SamplingParams, Token, TopLogprob
from tests.gateway.conftest import Running, Start
from tests.gateway.fakes import END, FakeBackend, byte_tokens, sample_text, says

pytestmark = pytest.mark.anyio
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = "Anna has é12"
IDS = byte_tokens(TEXT)
SAID = "Yes."


@pytest.fixture
async def running(start: Start) -> Running:
    return await start(FakeBackend(says(SAID)))


async def first_choice(running: Running, path: str = COMPLETIONS, **body: Any) -> Any:
    status, answer = await running.post(path, body)
    assert status == 200, answer
    return answer["choices"][0]


@pytest.mark.parametrize("prompt", [TEXT, IDS, f"<|endoftext|>{TEXT}"])
async def test_an_echo_has_the_prompts_logprobs(running: Running, prompt: Any) -> None:
    choice = await first_choice(running, prompt=prompt, echo=True, logprobs=2)
    asked = running.backend.submitted[0]
    ids = [*asked.prompt, *asked.params.given]
    assert len(asked.prompt) == 1
    found = choice["logprobs"]
    drawn = len(found["tokens"]) - len(ids)
    assert found["token_logprobs"] == [None, *[-0.25] * (len(ids) - 1), *[-0.5] * drawn]
    assert found["top_logprobs"][0] is None
    pairs = zip(found["tokens"][1:], found["top_logprobs"][1:], strict=True)
    assert all(token in top and 1 <= len(top) <= 3 for token, top in pairs)
    assert choice["text"].endswith(TEXT + SAID)
    for at, token in zip(found["text_offset"], found["tokens"], strict=True):
        if "\ufffd" not in token and token != "<|im_end|>":
            assert choice["text"].startswith(token, at)


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("prompt", [TEXT, IDS, IDS[:1]])
async def test_nothing_is_generated(running: Running, prompt: Any, logprobs: int | None) -> None:
    for stream in (False, True):
        body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": logprobs}
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        async with running.http.post(running.url + COMPLETIONS, json=body | options) as response:
            assert response.status == 200
            raw = await response.text()
        events = [json.loads(line[6:]) for line in raw.split("\n\n") if line[:7] == "data: {"]
        answers = events if stream else [json.loads(raw)]
        choices = [one for answer in answers for one in answer["choices"]]
        whole = prompt if isinstance(prompt, str) else sample_text().decode(prompt)
        assert "".join(one["text"] for one in choices) == whole
        assert choices[-1]["finish_reason"] == "length"
        usage = answers[-1]["usage"]
        assert (usage["prompt_tokens"] > 0, usage["completion_tokens"]) == (True, 0)
        told = [value for one in choices if one["logprobs"] for value in one["logprobs"]["token_logprobs"]]
        assert told == ([] if logprobs is None else [None, *[-0.25] * (usage["prompt_tokens"] - 1)])
    assert running.backend.submitted[0].params.max_tokens == max(
        1, len(running.backend.submitted[0].params.given)
    )


async def test_a_stream_begins_with_the_prompt(running: Running) -> None:
    body = {"prompt": IDS, "echo": True, "logprobs": 1, "stream": True, "n": 2}
    async with running.http.post(running.url + COMPLETIONS, json=body) as response:
        raw = await response.text()
    events = [json.loads(line[6:]) for line in raw.split("\n\n") if line[:7] == "data: {"]
    for index in range(2):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert choices[0]["text"] == TEXT
        assert len(choices[0]["logprobs"]["tokens"]) == len(IDS)
        assert choices[0]["logprobs"]["text_offset"][0] == 0
        assert "".join(choice["text"] for choice in choices) == TEXT + SAID
        assert choices[1]["logprobs"]["text_offset"][0] == len(TEXT)


@pytest.mark.parametrize("wanted", [0, 1, 3])
async def test_a_list_of_their_own(running: Running, wanted: int) -> None:
    choice = await first_choice(running, prompt=IDS, prompt_logprobs=wanted, logprobs=1)
    told = choice["prompt_logprobs"]
    assert (len(told), told[0]) == (len(IDS), None)
    for token, entry in zip(IDS[1:], told[1:], strict=True):
        own = entry.pop(str(token))
        assert (own["logprob"], own["rank"]) == (-0.25, None)
        assert [one["rank"] for one in entry.values()] == list(range(1, wanted + 1))
        assert all(isinstance(one["decoded_token"], str) for one in entry.values())
    assert "".join(sample_text().decode([token]) for token in IDS[:4]) == TEXT[:4]
    assert [entry for entry in choice["logprobs"]["token_logprobs"] if entry != -0.5] == []
    asked = {"messages": [{"role": "user", "content": "x"}], "prompt_logprobs": wanted}
    status, answer = await running.post(CHAT, asked)
    assert status == 200
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["choices"][0]["message"]["content"] == SAID


async def test_what_is_given_counts_as_prompt_alone(running: Running) -> None:
    """For stops, `min_tokens`, usage and metrics."""
    body = {"prompt": IDS, "echo": True, "logprobs": 0, "stop": ["An"], "stop_token_ids": [IDS[3]]}
    status, answer = await running.post(COMPLETIONS, body)
    assert status == 200
    assert answer["choices"][0]["text"] == TEXT + SAID
    assert answer["usage"]["prompt_tokens"] == len(IDS)
    assert answer["usage"]["completion_tokens"] == len(sample_text().encode(SAID)) + 1
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert running.backend.submitted[0].beginnings == ()
    metrics = b"".join(running.metrics.parts()).decode()
    made = next(line for line in metrics.splitlines() if line.startswith("vllm:generation_tokens_total"))
    assert float(made.split()[-1]) == answer["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("path", "param", "body"),
    [
        (COMPLETIONS, "prompt_logprobs", {"prompt": "x", "prompt_logprobs": 1, "stream": True}),
        (COMPLETIONS, "prompt_logprobs", {"prompt": "x", "prompt_logprobs": 21}),
        (COMPLETIONS, "prompt_logprobs", {"prompt": "x", "prompt_logprobs": -1}),
        (COMPLETIONS, "max_tokens", {"prompt": "x", "max_tokens": -1}),
        (CHAT, "max_tokens", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}),
        (CHAT, "max_completion_tokens", {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 0}),
    ],
)  # fmt: skip
async def test_what_cannot_be(running: Running, path: str, param: str, body: Any) -> None:
    status, answer = await running.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param)


async def test_tokens_are_told_as_they_stand_and_special_ones_by_name() -> None:
    """Where a text begins, this tokenizer shows no blank; and a special token is none of the text."""
    tokenizer = Tokenizer(models.WordLevel({"\u2581Anna": 0, "\u2581has": 1, "<s>": 2}, unk_token="<s>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    text = ChatTokenizer(tokenizer)
    ids, score = (0, 1), Token(0, 0, 1, None, -0.5, (TopLogprob(2, -0.1), TopLogprob(1, -0.5)))
    told = json.loads(await prompt_logprobs_json(text, ids, [score], 2, Turns()))
    assert {one["decoded_token"] for one in told[1].values()} == {" has", "<s>"}
    part = Part(ids, SamplingParams(1), 0, 1, "Anna has")
    first, second = await spelled_prompt(text, part, [score], Turns())
    assert (first.raw, second.raw, second.top) == (b"Anna", b" has", (b"<s>", b" has"))
    assert (first.start, second.start) == (-8, -4)


def test_the_end_is_no_prompt() -> None:
    assert END not in IDS
