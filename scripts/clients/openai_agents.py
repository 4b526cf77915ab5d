"""openai-agents: over responses, as by default, and over chat."""

from __future__ import annotations

from typing import Any, Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)  # fmt: skip
from agents.agent import StopAtTools
from pydantic import BaseModel
from tried import ANSWER, KEY, MODEL, QUESTION, URL, tell, tried

set_tracing_disabled(True)


class Fruit(BaseModel):
    owner: Literal["Tom", "Anna"]
    apples: Literal[12, 30, 42]


@function_tool
def weather(city: Literal["Rome", "Oslo"], days: Literal[1, 2, 3]) -> str:
    """The weather of some days."""
    return f"{city} {days}: fine"


def agent(kind: Any = OpenAIResponsesModel, settings: Any = None, **more: Any) -> Any:
    client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=60)
    how = ModelSettings(
        temperature=0, max_tokens=300, parallel_tool_calls=False if settings else None, **(settings or {})
    )
    return Agent(name="counter", model=kind(MODEL, client), model_settings=how, **more)


@tried("responses")
async def responses() -> None:
    assert ANSWER in (await Runner.run(agent(), QUESTION)).final_output


@tried("responses, streamed")
async def streamed() -> None:
    run = Runner.run_streamed(agent(), QUESTION)
    kinds = [event.type async for event in run.stream_events()]
    assert "raw_response_event" in kinds
    assert ANSWER in run.final_output


@tried("responses, output of a type")
async def typed() -> None:
    assert isinstance((await Runner.run(agent(output_type=Fruit), QUESTION)).final_output, Fruit)


@tried("responses, a tool that must be called, its result, the answer")
async def tools() -> None:
    run = await Runner.run(agent(settings={"tool_choice": "required"}, tools=[weather]), QUESTION)
    assert any(type(item).__name__ == "ToolCallOutputItem" for item in run.new_items)
    assert run.final_output


@tried("responses, a tool that ends the run, streamed")
async def stops() -> None:
    ends = StopAtTools(stop_at_tool_names=["weather"])
    made = agent(settings={"tool_choice": "weather"}, tools=[weather], tool_use_behavior=ends)
    run = Runner.run_streamed(made, QUESTION)
    async for _ in run.stream_events():
        pass
    assert "fine" in run.final_output


@tried("chat")
async def chat() -> None:
    assert ANSWER in (await Runner.run(agent(OpenAIChatCompletionsModel), QUESTION)).final_output


@tried("chat, a tool that must be called, its result, the answer")
async def chat_tools() -> None:
    made = agent(OpenAIChatCompletionsModel, settings={"tool_choice": "required"}, tools=[weather])
    run = await Runner.run(made, QUESTION)
    assert any(type(item).__name__ == "ToolCallOutputItem" for item in run.new_items)


tell("openai-agents")
