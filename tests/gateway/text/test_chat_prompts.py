"""Over HTTP: which prompt a conversation becomes, and what is refused instead of being shown wrongly."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from tests.gateway.conftest import Running, Start
from tests.gateway.fakes import TEMPLATE, FakeBackend, byte_level_tokenizer, sample_text, tokens_of

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
ASKED = [{"role": "user", "content": "Anna?"}, {"role": "assistant", "content": "She has "}]


def prompts(running: Running) -> list[str]:
    decode = byte_level_tokenizer().decode
    return [decode(one.prompt, skip_special_tokens=False) for one in running.backend.submitted]


@pytest.fixture
async def running(start: Start) -> Running:
    return await start()


async def test_a_final_message_is_gone_on_with(running: Running) -> None:
    for told in ({"add_generation_prompt": False}, {}):
        status, _ = await running.post(CHAT, {"messages": ASKED, "continue_final_message": True, **told})
        assert status == 200
    begun = "<|im_start|>user\nAnna?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts(running) == [begun + "She has "] * 2
    await running.post(CHAT, {"messages": ASKED[:1]})
    assert prompts(running)[-1] == begun


@pytest.mark.parametrize(
    "body",
    [
        {"messages": ASKED, "add_generation_prompt": True},
        {"messages": [{"role": "assistant"}]},
    ],
    ids=["both", "no content"],
)
async def test_what_cannot_be_gone_on_with_is_refused(running: Running, body: dict[str, Any]) -> None:
    status, answer = await running.post(CHAT, body | {"continue_final_message": True})
    assert status == 400
    assert answer["error"]["param"] == "continue_final_message"
    assert running.backend.submitted == []


async def test_a_template_gets_all_that_a_message_has(start: Start) -> None:
    running = await start(text=ChatTokenizer(byte_level_tokenizer(), "{{ messages | tojson }}"))
    message: dict[str, Any] = {
        "role": "user",
        "content": "Anna",
        "name": None,
        "prefix": True,
        "tool_calls": [],
        "x": {"y": [1, None]},
    }
    assert (await running.post(CHAT, {"messages": [message]}))[0] == 200
    del message["name"]
    assert json.loads(prompts(running)[0]) == [message]


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt", "chat_template"])
async def test_variables_do_not_stand_in_for_fields(running: Running, name: str) -> None:
    status, answer = await running.post(CHAT, {"messages": ASKED, "chat_template_kwargs": {name: []}})
    assert status == 400
    assert answer["error"]["param"] == f"chat_template_kwargs.{name}"


async def test_documents_need_a_template_that_shows_them(start: Start) -> None:
    running = await start()
    documents = [{"title": "One", "text": "Anna"}]
    status, answer = await running.post(CHAT, {"messages": ASKED, "documents": documents})
    assert status == 400
    assert answer["error"]["param"] == "documents"
    shows = ChatTokenizer(
        byte_level_tokenizer(), "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}{% endfor %}."
    )
    running = await start(text=shows)
    for given in (documents, [], None):
        assert (await running.post(CHAT, {"messages": ASKED, "documents": given}))[0] == 200
    assert prompts(running) == ["One: Anna.", ".", "."]


async def test_a_template_of_the_client_s_own_only_where_the_operator_says_so(start: Start) -> None:
    body = {"messages": ASKED, "chat_template": "{{ messages[0].content }}!"}
    refusing = await start()
    status, answer = await refusing.post(CHAT, body)
    assert status == 400
    assert answer["error"]["param"] == "chat_template"
    assert "--trust-request-chat-template" in answer["error"]["message"]
    trusting = await start(trust_request_chat_template=True)
    assert (await trusting.post(CHAT, body))[0] == 200
    assert prompts(trusting) == ["Anna?!"]
    status, answer = await trusting.post(CHAT, body | {"chat_template": "{% if %}"})
    assert status == 400
    assert answer["error"]["param"] == "chat_template"
    assert "does not parse" in answer["error"]["message"]


async def test_a_template_that_raises_costs_its_request_alone(start: Start) -> None:
    picky = "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no bad roles') }}{% endif %}{% endfor %}A"
    running = await start(text=ChatTokenizer(byte_level_tokenizer(), picky))
    status, answer = await running.post(CHAT, {"messages": [{"role": "bad", "content": ""}]})
    assert status == 400
    assert "no bad roles" in answer["error"]["message"]
    assert (await running.post(CHAT, {"messages": ASKED}))[0] == 200


async def test_a_template_that_makes_much_of_little_is_stopped(start: Start) -> None:
    wordy = "{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}"
    running = await start(text=ChatTokenizer(byte_level_tokenizer(), wordy))
    status, answer = await running.post(CHAT, {"messages": ASKED})
    assert status == 400
    assert answer["error"]["code"] == "context_length_exceeded"
    wordy = "{% for i in range(900000) %}{% endfor %}"
    running = await start(text=ChatTokenizer(byte_level_tokenizer(), wordy))
    status, answer = await running.post(CHAT, {"messages": ASKED})
    assert status == 400
    assert "ange" in answer["error"]["message"]


# Tokens that the tokenizer has and the model has not


def longer_text() -> ChatTokenizer:
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    tokenizer.add_special_tokens([AddedToken("<|new|>", normalized=False)])
    return ChatTokenizer(tokenizer, TEMPLATE)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "Anna <|new|>"}, "prompt"),
        ("/v1/completions", {"prompt": ["Anna", "<|new|>"]}, "prompt"),
        ("/v1/completions", {"prompt": "<|new|>", "echo": True, "truncate_prompt_tokens": 1}, "prompt"),
        ("/v1/completions", {"prompt": [5, "last"]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [[5], [5, "last"]]}, "prompt[1][1]"),
        ("/v1/completions", {"prompt": "Anna", "stop_token_ids": ["last"]}, "stop_token_ids[0]"),
        ("/v1/completions", {"prompt": "Anna", "allowed_token_ids": ["last"]}, "allowed_token_ids[0]"),
        (CHAT, {"messages": [{"role": "user", "content": "<|new|>"}]}, "messages"),
        (CHAT, {"messages": [{"role": "<|new|>", "content": ""}]}, "messages"),
        (CHAT, {"messages": [{"role": "a", "content": [{"type": "text", "text": "<|new|>"}]}]}, "messages"),
    ],
)
async def test_no_token_that_the_model_has_not_reaches_a_rank(
    start: Start, path: str, body: dict[str, Any], param: str
) -> None:
    text = longer_text()
    last = text.token_id("<|new|>")
    assert last is not None
    body = json.loads(json.dumps(body).replace('"last"', str(last)))
    running = await start(text=text, vocab_size=last)
    status, answer = await running.post(path, body)
    tokens = (await running.post("/tokenize", {"prompt": "<|new|>"}))[1]["tokens"]
    assert status == 400
    assert answer["error"]["param"] == param
    assert str(last) in answer["error"]["message"] or str(last - 1) in answer["error"]["message"]
    assert running.backend.submitted == []
    assert last in tokens, "what the tokenizer has may be asked of it"


async def test_the_tokenizer_s_end_of_turn_ends_a_sequence_unless_told_otherwise(start: Start) -> None:
    running = await start(eos_token_ids=(9,))
    for path, body in ((CHAT, {"messages": ASKED}), ("/v1/completions", {"prompt": "A"})):
        await running.post(path, body | {"stop_token_ids": [7]})
        await running.post(path, body | {"ignore_eos": True})
    ends = [one.params.stop_token_ids for one in running.backend.submitted]
    assert ends == [(7, 9), (), (7, 9), ()]


# Bytes of tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_offsets_and_bytes_are_those_of_the_text(start: Start, path: str, stream: bool) -> None:
    said = "Zoë 🙂 has 7"
    ids = sample_text().encode(said)
    running = await start(
        FakeBackend(lambda request: [(one,) for one in tokens_of(ids, finish="length", logprobs=0)])
    )
    body: dict[str, Any] = {"stream": stream, "max_tokens": 50, "prompt": "A", "logprobs": 0}
    if path == CHAT:
        body = {"stream": stream, "messages": ASKED, "logprobs": True}
    async with running.http.post(running.url + path, json=body) as response:
        raw = await response.text()
    events = (
        [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: {")]
        if stream
        else [raw]
    )
    logprobs = [one for event in events if (one := json.loads(event)["choices"][0]["logprobs"])]
    if path == CHAT:
        assert (
            b"".join(bytes(entry["bytes"]) for one in logprobs for entry in one["content"]).decode() == said
        )
    else:
        offsets = [offset for one in logprobs for offset in one["text_offset"]]
        whole = [text for one in logprobs for text in one["tokens"]]
        assert len(offsets) == len(ids)
        assert offsets == sorted(offsets)
        for offset, text in zip(offsets, whole, strict=True):
            assert "\ufffd" in text or said[offset:].startswith(text)
