"""litellm: as an OpenAI-compatible provider, as its `hosted_vllm`, and as Anthropic's."""

from __future__ import annotations

from typing import Any

import litellm
from tried import (
    ANSWER,
    KEY,
    MODEL,
    QUESTION,
    SCHEMA,
    SCRIPTED_URL,
    URL,
    functions,
    is_call,
    is_fruit,
    raises,
    tell,
    tried,
)  # fmt: skip

MESSAGES = [{"role": "user", "content": QUESTION}]
COMMON: dict[str, Any] = {
    "api_key": KEY,
    "temperature": 0,
    "messages": MESSAGES,
    "num_retries": 0,
    "timeout": 60,
}
ASK: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", **COMMON}
FORMAT = {"type": "json_schema", "json_schema": {"name": "fruit", "strict": True, "schema": SCHEMA}}


@tried("chat, as openai/")
def chat() -> None:
    assert ANSWER in litellm.completion(**ASK).choices[0].message.content


@tried("chat, as hosted_vllm/")
def as_vllm() -> None:
    answer = litellm.completion(**{**ASK, "model": f"hosted_vllm/{MODEL}"})
    assert ANSWER in answer.choices[0].message.content


@tried("chat, streamed")
def stream() -> None:
    chunks = list(litellm.completion(**ASK, stream=True))
    assert ANSWER in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@tried("chat, asynchronous, streamed")
async def asynchronous() -> None:
    chunks = [chunk async for chunk in await litellm.acompletion(**ASK, stream=True)]
    assert ANSWER in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@tried("text completion")
def text() -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=f"{URL}/v1",
        api_key=KEY,
        prompt="Tom has",
        max_tokens=5,
    )
    assert answer.choices[0].text


@tried("JSON schema")
def schema() -> None:
    is_fruit(litellm.completion(**ASK, response_format=FORMAT).choices[0].message.content)


@tried("tools, auto, two calls at once")
def tools_auto() -> None:
    answer = litellm.completion(**{**ASK, "api_base": f"{SCRIPTED_URL}/v1"}, tools=functions())
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["weather", "clock"]


@tried("tools, auto, two calls at once, streamed")
def tools_auto_stream() -> None:
    chunks = list(
        litellm.completion(**{**ASK, "api_base": f"{SCRIPTED_URL}/v1"}, tools=functions(), stream=True)
    )
    answer: Any = litellm.stream_chunk_builder(chunks)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["weather", "clock"]


@tried("tools, named and required")
def tools_certain() -> None:
    for choice in ({"type": "function", "function": {"name": "clock"}}, "required"):
        answer = litellm.completion(**ASK, tools=functions(), tool_choice=choice, parallel_tool_calls=False)
        is_call(answer.choices[0].message.tool_calls[0].function.arguments)


@tried("responses")
def responses() -> None:
    answer = litellm.responses(
        model=f"openai/{MODEL}", api_base=f"{URL}/v1", api_key=KEY, input=QUESTION, temperature=0
    )
    assert ANSWER in answer.output[0].content[0].text


@tried("messages, as anthropic/")
def messages() -> None:
    answer = litellm.completion(**{**ASK, "model": f"anthropic/{MODEL}", "api_base": URL}, max_tokens=100)
    assert ANSWER in answer.choices[0].message.content


@tried("errors: bad key, too long")
def errors() -> None:
    raises(litellm.AuthenticationError, lambda: litellm.completion(**{**ASK, "api_key": "wrong"}))
    long = [{"role": "user", "content": QUESTION * 200}]
    raises(litellm.ContextWindowExceededError, lambda: litellm.completion(**{**ASK, "messages": long}))


tell("litellm")
