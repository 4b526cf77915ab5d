"""Whatever a client sends, it gets OpenAI's error object and the right 4xx, never a 5xx."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from tests.gateway.conftest import Running, Start
from tests.gateway.fakes import MODEL, FakeBackend, sample_text, says, tokens_of

pytestmark = pytest.mark.anyio
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]
ASKS: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "A"}, CHAT: {"messages": USER}}


@pytest.fixture
async def running(start: Start) -> Running:
    return await start()


def check_error(body: Any) -> dict[str, Any]:
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    return dict(error)


RAW_BODIES = {
    "empty": b"",
    "not JSON": b"{prompt: 1}",
    "cut off": b'{"prompt": "A", "max_to',
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "NaN": b'{"prompt": "A", "temperature": NaN}',
    "Infinity": b'{"prompt": "A", "temperature": Infinity}',
    "minus Infinity": b'{"prompt": "A", "temperature": -Infinity}',
    "absurd integer": b'{"prompt": "A", "seed": 1' + b"0" * 6000 + b"}",
    "deep lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"prompt": "A", "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "a number beyond all doubles": b'{"x": [{"y": -1e999}]}',
}


@pytest.mark.parametrize("raw", RAW_BODIES.values(), ids=RAW_BODIES.keys())
async def test_raw_body(running: Running, raw: bytes) -> None:
    for path in (COMPLETIONS, CHAT, "/v1/responses", "/tokenize", "/detokenize"):
        async with running.http.post(running.url + path, data=raw) as response:
            assert response.status == 400
            check_error(await response.json())
    assert running.backend.submitted == []


RAW_VALUES = {
    "huge integer": b'{"prompt": "A", "max_tokens": 1' + b"0" * 400 + b"}",
    "lone surrogate in model": b'{"model": "\\udfff", "prompt": "A"}',
    "lone surrogate in stop": b'{"prompt": "A", "stop": ["\\ud83d"]}',
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", '"input": "A", "tools": [{"type": "function", "name": "f", "parameters": {"maximum": 1e999}}]'),
        ("/v1/responses", '"input": [{"role": "user", "content": "A", "x": 1e999}]'),
        (CHAT, '"messages": [{"role": "user", "content": "A"}], "x": 1e999'),
    ],
)  # fmt: skip
async def test_what_is_told_again_is_json(running: Running, path: str, body: str) -> None:
    """An infinity would be told as no JSON value."""
    async with running.http.post(running.url + path, data=f"{{{body}}}".encode()) as response:
        assert response.status == 400
        assert "beyond every double" in check_error(await response.json())["message"]


@pytest.mark.parametrize("raw", RAW_VALUES.values(), ids=RAW_VALUES.keys())
async def test_raw_value(running: Running, raw: bytes) -> None:
    async with running.http.post(running.url + COMPLETIONS, data=raw) as response:
        assert response.status == 400
        check_error(await response.json())
    assert running.backend.submitted == []


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b'{"prompt": "A", "\\ud800": 1}', "body"),
        (b'{"prompt": "A", "stream": true, "stream_options": {"\\ud800": 1}}', "stream_options"),
    ],
)
async def test_a_name_that_is_no_text(running: Running, raw: bytes, param: str) -> None:
    async with running.http.post(running.url + COMPLETIONS, data=raw) as response:
        assert response.status == 400
        error = check_error(await response.json())
    assert error["param"] == param
    assert "lone surrogate" in error["message"]


BAD_FIELDS: list[tuple[str, Any]] = [
    ("prompt", None),
    ("prompt", 7),
    ("prompt", {}),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", ["A", 7]),
    ("prompt", [1, "A"]),
    ("prompt", [True]),
    ("prompt", [1.5]),
    ("prompt", [-1]),
    ("prompt", [512]),
    ("prompt", [2**70]),
    ("prompt", [[1], 2]),
    ("prompt", [[1], ["A"]]),
    ("prompt", ["A"] * 257),
    ("model", 7),
    ("n", 0),
    ("n", -1),
    ("n", 1_000_000_000),
    ("n", "2"),
    ("n", True),
    ("n", 1.5),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("stop", 7),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["a"] * 1000),
    ("stop", "a" * 10_000),
    ("stop", [["a"]]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [512]),
    ("stop_token_ids", 7),
    ("seed", 2**63),
    ("seed", "1"),
    ("seed", 1.5),
    ("max_tokens", -5),
    ("max_tokens", "many"),
    ("max_tokens", 2**40),
    ("temperature", -0.1),
    ("temperature", 99),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -1),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e-300),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("logprobs", -1),
    ("logprobs", 1_000_000),
    ("logprobs", True),
    ("echo", "no"),
    ("ignore_eos", 0),
    ("suffix", "tail"),
    ("best_of", 3),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"512": 1}),
    ("logit_bias", {"five": 1}),
    ("logit_bias", [5]),
    ("allowed_token_ids", [512]),
    ("min_tokens", -1),
    ("truncate_prompt_tokens", 0),
    ("request_id", "a b"),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=[f"{n}={str(v)[:20]}" for n, v in BAD_FIELDS])
async def test_completion_field(running: Running, name: str, value: Any) -> None:
    status, body = await running.post(COMPLETIONS, {"model": MODEL, "prompt": "A", name: value})
    assert status == 400
    error = check_error(body)
    assert error["type"] == "invalid_request_error"
    assert re.split(r"[\[.]", error["param"])[0] == name
    assert running.backend.submitted == []


BAD_CHATS: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "Hello"}),
    ("messages[0]", {"messages": ["Hello"]}),
    ("messages[0].role", {"messages": [{"content": "A"}]}),
    ("messages[0].role", {"messages": [{"role": "", "content": "A"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 7}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": "\ud800"}]}),
    ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("messages[0].content[0].text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    (
        "messages[0].tool_calls[0].function",
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
    ),
    ("top_logprobs", {"top_logprobs": 2}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("logprobs", {"logprobs": 2}),
    ("max_completion_tokens", {"max_completion_tokens": 0}),
    ("max_tokens", {"max_tokens": 257}),
    ("tools[0].function", {"tools": [{"type": "function"}]}),
    ("response_format.type", {"response_format": {"type": "xml"}}),
    ("chat_template_kwargs", {"chat_template_kwargs": [1]}),
    ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
]


@pytest.mark.parametrize(("param", "change"), BAD_CHATS)
async def test_chat_field(running: Running, param: str, change: dict[str, Any]) -> None:
    status, body = await running.post(CHAT, {"messages": USER} | change)
    assert status == 400
    assert check_error(body)["param"] == param
    assert running.backend.submitted == []


@pytest.mark.parametrize("prompt", ["word " * 300, "x" * 900_000, [5] * 256, ["A", "word " * 300]])
async def test_a_prompt_that_is_too_long_says_by_how_much(running: Running, prompt: Any) -> None:
    status, body = await running.post(COMPLETIONS, {"prompt": prompt})
    assert status == 400
    error = check_error(body)
    assert error["code"] == "context_length_exceeded"
    assert "256 tokens" in error["message"]
    # Beyond a bound the text is not tokenised, which would take seconds for megabytes.
    assert ("at least" in error["message"]) == (len(prompt) > 100_000)


async def test_the_longest_prompt_fits(running: Running) -> None:
    status, body = await running.post(COMPLETIONS, {"prompt": [5] * 255})
    assert status == 200
    assert body["usage"]["completion_tokens"] == 1, "the default is cut to the context"
    status, body = await running.post(COMPLETIONS, {"prompt": [5] * 255, "max_tokens": 2})
    assert status == 400
    assert check_error(body)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_unknown_model(running: Running, path: str) -> None:
    status, body = await running.post(path, {"model": "gpt-9"} | ASKS[path])
    assert status == 404
    assert check_error(body)["code"] == "model_not_found"
    async with running.http.get(f"{running.url}/v1/models/gpt-9") as response:
        assert response.status == 404
        assert check_error(await response.json())["code"] == "model_not_found"


async def test_chat_without_a_template(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_text(), "_template", None)
    running = await start()
    status, body = await running.post(CHAT, {"messages": USER})
    assert status == 400
    assert "no chat template" in check_error(body)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", CHAT, 405),
        ("POST", "/metrics", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/", 405),
        ("POST", "/v1/completions/", 404),
    ],
)
async def test_wrong_method_or_path(running: Running, method: str, path: str, status: int) -> None:
    async with running.http.request(method, running.url + path) as response:
        assert response.status == status
        check_error(await response.json())
        assert ("Allow" in response.headers) == (status == 405)


async def test_body_over_the_limit(start: Start) -> None:
    running = await start(max_body_bytes=1000)
    status, body = await running.post(COMPLETIONS, {"prompt": "A" * 2000})
    assert status == 413
    assert check_error(body)["code"] == "request_too_large"


async def test_too_many_requests(start: Start) -> None:
    backend = FakeBackend(capacity=2)
    running = await start(backend)
    async with running.http.post(running.url + COMPLETIONS, json={"prompt": "A", "n": 3}) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "3"
        check_error(await response.json())
    assert all(stream.cancelled.is_set() for stream in backend.streams), "all or none"


async def test_stopping(start: Start) -> None:
    running = await start(FakeBackend(stopping=True))
    status, body = await running.post(COMPLETIONS, {"prompt": "A", "stream": True})
    assert status == 503
    check_error(body)


async def test_a_wrong_key_is_refused_whatever_it_holds(start: Start) -> None:
    running = await start(api_keys=("secret",))
    for given in ("", "secret", "Bearer", "Bearer  secret", "Bearer \xff", "Basic secret"):
        headers = {"Authorization": given}
        async with running.http.post(running.url + COMPLETIONS, headers=headers) as response:
            assert response.status == 401
            assert check_error(await response.json())["code"] == "invalid_api_key"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_scheme_of_a_key_is_case_insensitive(start: Start, scheme: str) -> None:
    running = await start(api_keys=("other", "secret"))
    headers = {"Authorization": f"{scheme} secret"}
    async with running.http.get(f"{running.url}/v1/models", headers=headers) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"BREW /pot HTCPCP/1.0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
    ids=["protocol", "length", "chunk", "header"],
)
async def test_broken_http_is_refused(running: Running, raw: bytes) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    assert b" 400 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    await writer.wait_closed()


async def test_values_at_the_edges_are_accepted(running: Running) -> None:
    running.backend.reply = says("A")
    edges: dict[str, Any] = {
        "n": 1.0,
        "max_tokens": 1,
        "temperature": 0,
        "top_p": 1,
        "top_k": -1,
        "min_p": 0,
        "seed": -(2**63),
        "stop": None,
        "stream_options": None,
        "logit_bias": {},
        "user": {"any": "thing"},
    }
    status, _ = await running.post(COMPLETIONS, {"prompt": [0, 511]} | edges)
    assert status == 200
    params = running.backend.submitted[0].params
    assert (params.temperature, params.top_k) == (0.0, 0)


async def test_a_tiny_temperature_is_greedy(running: Running) -> None:
    await running.post(COMPLETIONS, {"prompt": "A", "temperature": 1e-300})
    assert running.backend.submitted[0].params.temperature == 0.0


async def test_a_defect_of_ours_is_an_error_object_too(start: Start) -> None:
    class Broken(FakeBackend):
        def status(self) -> Any:
            raise RuntimeError("defect")

    running = await start(Broken())
    async with running.http.get(f"{running.url}/v1/fault_tolerance/status") as response:
        assert response.status == 500
        assert "defect" not in check_error(await response.json())["message"]


async def test_a_defect_in_mid_stream_is_an_error_event(start: Start) -> None:
    running = await start(FakeBackend(reply=lambda request: [tuple(tokens_of([10**9], finish=None)), ()]))
    async with running.http.post(running.url + COMPLETIONS, json={"prompt": "A", "stream": True}) as response:
        assert response.status == 200
        events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    check_error(json.loads(events[-3].removeprefix("data: ")))
