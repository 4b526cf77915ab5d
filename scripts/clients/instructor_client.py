"""instructor: models of pydantic by calls, by JSON schema, and over Anthropic's API."""

from __future__ import annotations

from typing import Any, Literal

import anthropic
import instructor
import openai
from pydantic import BaseModel, ConfigDict
from tried import KEY, MODEL, QUESTION, URL, tell, tried


class Fruit(BaseModel):
    """Fruit of somebody."""

    model_config = ConfigDict(extra="forbid")

    owner: Literal["Tom", "Anna"]
    apples: Literal[12, 30, 42]


MESSAGES: Any = [{"role": "user", "content": QUESTION}]


def client(mode: instructor.Mode) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0), mode=mode)


def made(mode: instructor.Mode) -> Any:
    given: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 300,
        "max_retries": 1,
    }
    return client(mode).create(response_model=Fruit, **given)


@tried("by a call")
def tools() -> None:
    assert isinstance(made(instructor.Mode.TOOLS), Fruit)


@tried("by JSON schema")
def schema() -> None:
    assert isinstance(made(instructor.Mode.JSON_SCHEMA), Fruit)


@tried("partial objects, streamed")
def partial() -> None:
    parts = client(instructor.Mode.TOOLS).create_partial(
        model=MODEL, messages=MESSAGES, response_model=Fruit, temperature=0, max_tokens=300
    )
    assert isinstance(list(parts)[-1], BaseModel)


@tried("over Anthropic's API, by a call")
def messages() -> None:
    there = instructor.from_anthropic(anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0))
    found: Any = there.create(
        model=MODEL, messages=MESSAGES, response_model=Fruit, max_tokens=300, max_retries=1
    )
    assert isinstance(found, Fruit)


tell("instructor")
