"""Calls of tools go on across the death of their rank: valid, and the same, by each API."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import aiohttp
import pytest

from tests.kit.served import Server, http, status, until_full

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "note": {"type": "string", "pattern": "^[a-z ]{80,120}$"},
        "many": {"type": "array", "items": {"type": "integer"}, "minItems": 5, "maxItems": 9},
    },
    "required": ["note", "many"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {"name": "keep", "parameters": PARAMETERS}
QUESTION = [{"role": "user", "content": "Tom has 12 apples."}]
TOOLS = [{"type": "function", "function": FUNCTION}]
NAMED = {"type": "function", "function": {"name": "keep"}}
STREAMS = 12
Call = tuple[str, str]


def asked(index: int) -> tuple[str, dict[str, Any]]:
    """Path and body."""
    match index % 4:
        case 0:
            chosen: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
            how = {"messages": QUESTION, "tools": TOOLS, "max_tokens": 400, **chosen}
            return "/v1/chat/completions", how
        case 1:
            how = {"messages": QUESTION, "tools": TOOLS, "max_tokens": 400, "tool_choice": NAMED}
            return "/v1/chat/completions", how
        case 2:
            flat = [{"type": "function", **FUNCTION}]
            choice = {"type": "function", "name": "keep"}
            how = {"input": QUESTION, "tools": flat, "tool_choice": choice, "max_output_tokens": 400}
            return "/v1/responses", how
        case _:
            tool = {"name": "keep", "input_schema": PARAMETERS}
            any_one: dict[str, Any] = {"type": "any", "disable_parallel_tool_use": True}
            how = {"messages": QUESTION, "tools": [tool], "tool_choice": any_one, "max_tokens": 400}
            return "/v1/messages", {"model": "default", **how}


async def call(session: aiohttp.ClientSession, url: str, index: int, begun: asyncio.Event) -> Call:
    """The one call that a client puts together from the stream."""
    path, body = asked(index)
    sampling = {"temperature": 0.9, "seed": index} if path != "/v1/messages" else {"temperature": 0}
    name, arguments, deltas = "", "", 0
    async with session.post(url + path, json={**body, **sampling, "stream": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            for more_name, more in told(event):
                name += more_name
                arguments += more
                deltas += 1
            if deltas > 3:
                begun.set()
    return name, arguments


def told(event: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and arguments that an event of any of the APIs adds."""
    if "choices" in event:
        calls = [call for choice in event["choices"] for call in choice["delta"].get("tool_calls", ())]
        return [(call["function"].get("name", ""), call["function"]["arguments"]) for call in calls]
    match event["type"]:
        case "response.output_item.added":
            return [(event["item"]["name"], "")]
        case "response.function_call_arguments.delta":
            return [("", event["delta"])]
        case "content_block_start":
            return [(event["content_block"]["name"], "")]
        case "content_block_delta":
            return [("", event["delta"]["partial_json"])]
    return []


async def all_calls(url: str, kill: list[int]) -> list[Call]:
    async with http() as session:
        engines = (await until_full(session, url))["engines"]
        begun = [asyncio.Event() for _ in range(STREAMS)]
        tasks = [asyncio.create_task(call(session, url, index, begun[index])) for index in range(STREAMS)]
        async with asyncio.timeout(60):
            await asyncio.gather(*(event.wait() for event in begun[:4]))
        assert not all(task.done() for task in tasks)
        for rank in kill:
            os.kill(engines[rank]["pid"], signal.SIGKILL)
        async with asyncio.timeout(100):
            calls = await asyncio.gather(*tasks)
        lost = [rank for rank in kill if (await status(session, url))["engines"][rank]["last_loss"]]
        assert lost == kill
        return calls


def test_calls_go_on_across_the_death_of_their_rank(serving: Server) -> None:
    expected = asyncio.run(all_calls(serving.url, []))
    for name, arguments in expected:
        assert name == "keep"
        found = json.loads(arguments)
        assert set(found) == {"note", "many"}
        assert 80 <= len(found["note"]) <= 120
        assert 5 <= len(found["many"]) <= 9
    assert len(set(expected)) > 4, "they are not all one"
    assert asyncio.run(all_calls(serving.url, [0, 3, 6])) == expected
