"""openai-python: completions, chat, tools, responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
from pydantic import BaseModel
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

client: Any = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=60)
scripted: Any = openai.OpenAI(base_url=f"{SCRIPTED_URL}/v1", api_key=KEY, max_retries=0, timeout=60)
ASK: Any = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
TOOLS: Any = functions()
RESPONSE_TOOLS: Any = [{"type": "function", **tool["function"], "strict": True} for tool in TOOLS]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "fruit", "strict": True, "schema": SCHEMA}}


class Fruit(BaseModel):
    owner: Literal["Tom", "Anna"]
    apples: Literal[12, 30, 42]


@tried("models")
def models() -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


@tried("completion")
def completion() -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Tom has 12 apples.", max_tokens=8, logprobs=2, echo=False
    )
    assert answer.usage.completion_tokens <= 8
    assert answer.choices[0].logprobs.tokens


@tried("completion, streamed")
def completion_stream() -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="Tom has", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks)


@tried("chat")
def chat() -> None:
    answer = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3)
    assert ANSWER in answer.choices[0].message.content
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3


@tried("chat, streamed, with usage")
def chat_stream() -> None:
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert ANSWER in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens > 0


@tried("JSON mode")
def json_mode() -> None:
    answer = client.chat.completions.create(
        **ASK, response_format={"type": "json_object"}, max_tokens=200, seed=1
    )
    text = answer.choices[0].message.content
    assert text.lstrip().startswith("{"), text


@tried("JSON schema")
def json_schema() -> None:
    is_fruit(client.chat.completions.create(**ASK, response_format=FORMAT).choices[0].message.content)


@tried("JSON schema, streamed")
def json_schema_stream() -> None:
    chunks = client.chat.completions.create(**ASK, response_format=FORMAT, stream=True)
    is_fruit("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


@tried("parse() into a pydantic model")
def parsed() -> None:
    answer = client.chat.completions.parse(**ASK, response_format=Fruit, max_tokens=300)
    assert isinstance(answer.choices[0].message.parsed, Fruit)


@tried("stream() helper")
def helper() -> None:
    with client.chat.completions.stream(**ASK) as stream:
        assert ANSWER in stream.get_final_completion().choices[0].message.content


@tried("tools, auto, the model calls none")
def tools_auto() -> None:
    answer = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="auto")
    assert answer.choices[0].message.content


@tried("tools, auto, two calls at once")
def tools_parallel() -> None:
    answer = scripted.chat.completions.create(**ASK, tools=TOOLS)
    calls = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert [call.function.name for call in calls] == ["weather", "clock"]
    for call in calls:
        is_call(call.function.arguments)


@tried("tools, auto, two calls at once, streamed")
def tools_parallel_stream() -> None:
    with scripted.chat.completions.stream(**ASK, tools=TOOLS) as stream:
        final = stream.get_final_completion()
    assert [call.function.name for call in final.choices[0].message.tool_calls] == ["weather", "clock"]


@tried("tools, named")
def tools_named() -> None:
    choice = {"type": "function", "function": {"name": "clock"}}
    answer = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice=choice)
    assert answer.choices[0].message.tool_calls[0].function.name == "clock"
    is_call(answer.choices[0].message.tool_calls[0].function.arguments)


@tried("tools, required")
def tools_required() -> None:
    answer = client.chat.completions.create(
        **ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    is_call(call.function.arguments)


@tried("tools, required, streamed")
def tools_required_stream() -> None:
    with client.chat.completions.stream(
        **ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls
    is_call(final.choices[0].message.tool_calls[0].function.arguments)


@tried("tools, required, as many as it likes")
def tools_required_parallel() -> None:
    seen = []
    for seed in range(4):
        sampled = {**ASK, "temperature": 1, "seed": seed, "max_tokens": 600}
        answer = client.chat.completions.create(**sampled, tools=TOOLS, tool_choice="required")
        seen.append(answer.choices[0].message.tool_calls)
        if answer.choices[0].finish_reason == "length":
            continue
        for call in seen[-1]:
            is_call(call.function.arguments)
    assert max(map(len, seen)) > 1


@tried("tools, and the result of a call")
def tools_result() -> None:
    choice = {"type": "function", "function": {"name": "clock"}}
    asked = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice=choice).choices[0].message
    result = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "12:00"}
    again = [*ASK["messages"], asked, result, *ASK["messages"]]
    answer = client.chat.completions.create(model=MODEL, messages=again, tools=TOOLS, max_tokens=20)
    assert answer.choices[0].message.content


@tried("responses")
def responses() -> None:
    answer = client.responses.create(model=MODEL, input=QUESTION, temperature=0)
    assert ANSWER in answer.output_text
    again = client.responses.create(
        model=MODEL, input=QUESTION, temperature=0, previous_response_id=answer.id
    )
    assert client.responses.retrieve(again.id).output_text == again.output_text
    assert len(list(client.responses.input_items.list(again.id))) == 1
    client.responses.delete(again.id)


@tried("responses, streamed")
def responses_stream() -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as stream:
        events = [event.type for event in stream]
        assert ANSWER in stream.get_final_response().output_text
    assert events[0] == "response.created"
    assert events[-1] == "response.completed"


@tried("responses, JSON schema")
def responses_schema() -> None:
    answer = client.responses.parse(model=MODEL, input=QUESTION, text_format=Fruit, max_output_tokens=300)
    assert isinstance(answer.output_parsed, Fruit)


@tried("responses, tools, streamed")
def responses_tools() -> None:
    asked = {"model": MODEL, "input": QUESTION, "tools": RESPONSE_TOOLS, "tool_choice": "required"}
    with client.responses.stream(**asked, parallel_tool_calls=False) as stream:
        output = stream.get_final_response().output
    calls = [item for item in output if item.type == "function_call"]
    is_call(calls[0].arguments)
    told = [{"type": "function_call_output", "call_id": call.call_id, "output": "fine"} for call in calls]
    asked = [{"role": "user", "content": QUESTION}, *(call.to_dict() for call in calls), *told]
    client.responses.create(model=MODEL, input=asked, tools=RESPONSE_TOOLS, max_output_tokens=20)


@tried("responses, in the background, cancelled")
def responses_background() -> None:
    begun = client.responses.create(
        model=MODEL, input=QUESTION, background=True, max_output_tokens=900, extra_body={"ignore_eos": True}
    )
    assert client.responses.cancel(begun.id).status == "cancelled"


@tried("error: bad key")
def bad_key() -> None:
    other = openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong", max_retries=0)
    raises(openai.AuthenticationError, lambda: other.models.list())


@tried("error: unknown model")
def unknown_model() -> None:
    raises(openai.NotFoundError, lambda: client.chat.completions.create(**{**ASK, "model": "nobody"}))


@tried("error: field that is not honoured")
def refused_field() -> None:
    raises(openai.BadRequestError, lambda: client.chat.completions.create(**ASK, store=True), "store")


@tried("error: prompt too long")
def too_long() -> None:
    long = {**ASK, "messages": [{"role": "user", "content": QUESTION * 200}]}
    raises(openai.BadRequestError, lambda: client.chat.completions.create(**long), "context_length_exceeded")


@tried("error: bad schema")
def bad_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    raises(openai.BadRequestError, lambda: client.chat.completions.create(**ASK, response_format=form))


@tried("abort in mid-stream")
def abort() -> None:
    stream = client.chat.completions.create(
        **ASK, stream=True, max_tokens=900, extra_body={"ignore_eos": True}
    )
    pieces: Iterator[Any] = iter(stream)
    next(pieces)
    stream.close()
    chat()


tell("openai-python")
