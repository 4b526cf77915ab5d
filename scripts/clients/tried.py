"""What the scripts of all clients share: things to try, each told as a line of JSON. The standard library alone.

A script decorates functions with `tried("what")` and ends with `tell()`. What raises has failed, and the others
go on; what the client itself does not have raises `Unavailable`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

URL = os.environ.get("SERVER_URL", "http://127.0.0.1:8000")
"""Of a server of this repository, with the bundled model and `--api-key` `KEY`."""
SCRIPTED_URL = os.environ.get("SCRIPTED_URL", "")
"""Of one whose model always writes two calls of tools, in `hermes`' format."""
KEY = "secret"
MODEL = "default"
QUESTION = "Tom has 12 apples. Tom buys 30 more apples. How many apples does Tom have now?"
ANSWER = "42"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "owner": {"enum": ["Tom", "Anna"]},
        "apples": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["owner", "apples"],
    "additionalProperties": False,
}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
DEADLINE_S = 90.0

Tried = TypeVar("Tried", bound=Callable[[], Any])
_ALL: list[tuple[str, Callable[[], Any]]] = []


class Unavailable(Exception):
    """The client has no such thing."""


def tried(what: str) -> Callable[[Tried], Tried]:
    def remember(function: Tried) -> Tried:
        _ALL.append((what, function))
        return function

    return remember


def functions() -> list[dict[str, Any]]:
    """Two tools as in a conversation: one to be called, one beside it."""
    return [
        {"type": "function", "function": {"name": name, "description": about, "parameters": PARAMETERS}}
        for name, about in (("weather", "The weather of some days."), ("clock", "The time there."))
    ]


def is_call(arguments: str | dict[str, Any]) -> None:
    """They are of `PARAMETERS`."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert set(given) == {"city", "days"}, given
    assert given["city"] in PARAMETERS["properties"]["city"]["enum"], given
    assert 1 <= given["days"] <= 9, given


def is_fruit(text: str | dict[str, Any]) -> None:
    """It is of `SCHEMA`."""
    given = json.loads(text) if isinstance(text, str) else text
    assert set(given) == {"owner", "apples"}, given
    assert given["owner"] in ("Tom", "Anna"), given
    assert 0 <= given["apples"] <= 99, given


def raises(kind: type[BaseException], function: Callable[[], Any], *words: str) -> None:
    """`function` raises this, and it tells of `words`."""
    try:
        function()
    except kind as error:
        told = f"{error} {getattr(error, 'body', '')}"
        assert all(word in told for word in words), told
        return
    raise AssertionError(f"no {kind.__name__}")


def tell(client: str) -> None:
    """Try all of them."""
    failed = False
    for what, function in _ALL:
        result, detail = "passed", ""
        try:
            _run(function)
        except Unavailable as why:
            result, detail = "not in the client", str(why)
        except BaseException as error:  # some clients raise what is no Exception
            result, detail = "failed", "".join(traceback.format_exception(error))[-1500:]
            failed = True
        print(json.dumps({"client": client, "tried": what, "result": result, "detail": detail}), flush=True)
    sys.exit(failed)


def _run(function: Callable[[], Any]) -> None:
    if inspect.iscoroutinefunction(function):

        async def bounded() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await function()

        asyncio.run(bounded())
    else:
        function()
