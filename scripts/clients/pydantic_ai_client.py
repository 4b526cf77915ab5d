"""pydantic-ai: agents over chat, over responses, and over Anthropic's API."""

from __future__ import annotations

from typing import Any, Literal

from anthropic import AsyncAnthropic
from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from tried import ANSWER, KEY, MODEL, QUESTION, URL, tell, tried


class Fruit(BaseModel):
    """Fruit of somebody."""

    model_config = ConfigDict(extra="forbid")

    owner: Literal["Tom", "Anna"]
    apples: Literal[12, 30, 42]


def provider(key: str = KEY) -> Any:
    return OpenAIProvider(base_url=f"{URL}/v1", api_key=key)


def agent(kind: Any = OpenAIChatModel, key: str = KEY, **more: Any) -> Any:
    return Agent(
        kind(MODEL, provider=provider(key)), model_settings={"temperature": 0.0, "max_tokens": 300}, **more
    )


@tried("agent")
async def plain() -> None:
    assert ANSWER in (await agent().run(QUESTION)).output


@tried("agent, streamed")
async def streamed() -> None:
    async with agent().run_stream(QUESTION) as run:
        assert ANSWER in await run.get_output()


@tried("output of a type, by a call")
async def by_call() -> None:
    assert isinstance((await agent(output_type=ToolOutput(Fruit)).run(QUESTION)).output, Fruit)


@tried("output of a type, by JSON schema")
async def by_schema() -> None:
    assert isinstance((await agent(output_type=NativeOutput(Fruit)).run(QUESTION)).output, Fruit)


@tried("output of a type, by JSON mode")
async def by_mode() -> None:
    made = agent(output_type=PromptedOutput(dict[str, Any]), retries=5)
    try:
        await made.run(QUESTION)
    except Exception as error:  # a model of 3 M parameters may write JSON without an end
        if "max_tokens" not in str(error) and "retries" not in str(error):
            raise


@tried("agent with a tool, a call and its result")
async def tool() -> None:
    called = []
    made = agent(output_type=ToolOutput(Fruit))

    @made.tool_plain
    def weather(city: Literal["Rome", "Oslo"], days: Literal[1, 2, 3]) -> str:
        """The weather of some days."""
        called.append((city, days))
        return "fine"

    try:
        await made.run(QUESTION)
    except Exception:  # the model knows no tools: it may call this one until the limit
        if not called:
            raise


@tried("responses")
async def responses() -> None:
    assert ANSWER in (await agent(OpenAIResponsesModel).run(QUESTION)).output


@tried("responses, output of a type")
async def responses_type() -> None:
    made = agent(OpenAIResponsesModel, output_type=NativeOutput(Fruit))
    assert isinstance((await made.run(QUESTION)).output, Fruit)


@tried("messages")
async def messages() -> None:
    there = AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=URL, api_key=KEY, max_retries=0))
    made: Any = Agent(
        AnthropicModel(MODEL, provider=there), model_settings={"temperature": 0.0, "max_tokens": 100}
    )
    assert ANSWER in (await made.run(QUESTION)).output


@tried("error: bad key")
async def bad_key() -> None:
    seen = 0
    try:
        await agent(key="wrong").run(QUESTION)
    except ModelHTTPError as error:
        seen = error.status_code
    assert seen == 401


tell("pydantic-ai")
