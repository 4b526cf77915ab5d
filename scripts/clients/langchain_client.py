"""langchain-openai: ChatOpenAI, by chat and by responses."""

from __future__ import annotations

from typing import Any, Literal

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict
from tried import ANSWER, KEY, MODEL, QUESTION, SCRIPTED_URL, URL, raises, tell, tried


class Fruit(BaseModel):
    """Fruit of somebody."""

    model_config = ConfigDict(extra="forbid")

    owner: Literal["Tom", "Anna"]
    apples: Literal[12, 30, 42]


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


@tool(args_schema=Asked)
def weather(city: str, days: int) -> str:
    """The weather of some days."""
    return f"{city} {days}: fine"


@tool(args_schema=Asked)
def clock(city: str, days: int) -> str:
    """The time there."""
    return f"{city} {days}: noon"


def model(url: str = URL, **more: Any) -> Any:
    given: dict[str, Any] = {
        "model": MODEL,
        "api_key": KEY,
        "temperature": 0,
        "max_retries": 0,
        "timeout": 60,
    }
    return ChatOpenAI(base_url=f"{url}/v1", **(given | more))


@tried("chat")
def chat() -> None:
    assert ANSWER in model().invoke(QUESTION).content


@tried("chat, streamed")
def streamed() -> None:
    assert ANSWER in "".join(chunk.content for chunk in model().stream(QUESTION))


@tried("chat, batch, asynchronous")
async def batch() -> None:
    answers = await model().abatch([QUESTION] * 4)
    assert all(ANSWER in answer.content for answer in answers)


@tried("completion")
def completion() -> None:
    given: Any = {"model": MODEL, "api_key": KEY, "base_url": f"{URL}/v1", "max_tokens": 5}
    assert OpenAI(**given).invoke("Tom has")


@tried("with_structured_output, JSON schema")
def structured() -> None:
    assert isinstance(model(max_tokens=300).with_structured_output(Fruit).invoke(QUESTION), Fruit)


@tried("with_structured_output, by a call")
def structured_call() -> None:
    shaped = model(max_tokens=300).with_structured_output(Fruit, method="function_calling")
    assert isinstance(shaped.invoke(QUESTION), Fruit)


@tried("with_structured_output, JSON mode")
def structured_mode() -> None:
    shaped = model(max_tokens=300, seed=1).with_structured_output(Fruit, method="json_mode", include_raw=True)
    assert shaped.invoke(QUESTION)["raw"].content.lstrip().startswith("{")


@tried("bind_tools, auto, two calls at once, streamed")
def tools_auto() -> None:
    whole: Any = None
    for chunk in model(SCRIPTED_URL).bind_tools([weather, clock]).stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert [call["name"] for call in whole.tool_calls] == ["weather", "clock"]


@tried("bind_tools, required, and the result")
def tools_required() -> None:
    asked = (
        model(max_tokens=400)
        .bind_tools([weather, clock], tool_choice="required", strict=True)
        .invoke(QUESTION)
    )
    results = [ToolMessage("fine", tool_call_id=call["id"]) for call in asked.tool_calls]
    assert results
    again = [HumanMessage(QUESTION), asked, *results, HumanMessage(QUESTION)]
    assert model(max_tokens=20).bind_tools([weather, clock]).invoke(again).content


@tried("responses")
def responses() -> None:
    answer = model(use_responses_api=True).invoke(QUESTION)
    assert ANSWER in answer.text


@tried("responses, streamed")
def responses_stream() -> None:
    chunks = model(use_responses_api=True).stream(QUESTION)
    assert ANSWER in "".join(str(chunk.text) for chunk in chunks)


@tried("errors: bad key, too long")
def errors() -> None:
    raises(openai.AuthenticationError, lambda: model(api_key="wrong").invoke(QUESTION))
    raises(openai.BadRequestError, lambda: model().invoke(QUESTION * 200), "context_length_exceeded")


tell("langchain-openai")
