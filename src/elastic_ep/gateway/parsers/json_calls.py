"""Formats in which a call is a JSON object with the tool's name and its arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from elastic_ep.gateway.parsers.base import Reading, Tell, TextReader, Tool

_ARGUMENTS = ("arguments", "parameters")


class JsonCalls(TextReader):
    """What they share."""

    def _call(self) -> Reading[bool]:
        """The object that begins here, told as a call. False: it is none, and nothing was told.

        Its arguments are told as they come if the name comes first, as everywhere; else when the name has come.
        """
        name, index, early = "", -1, ""
        if (yield from self._goes_on("{")) == "":
            return False
        while True:
            yield from self._blanks()
            if (char := (yield from self._goes_on("}", ",", '"'))) == ",":
                continue
            if char != '"' or not (key := (yield from self._key())):
                break
            if key in _ARGUMENTS and name and index < 0:
                index = self._begin(name)
                yield from self._argument_value(self._arguments(index))
                continue
            pieces: list[str] = []
            if not (yield from self._json(pieces.append)):
                break
            if key == "name" and not name:
                name = _text(pieces)
            elif key in _ARGUMENTS and not early:
                early = "".join(pieces)
        if index >= 0:
            return True
        if char != "}" or not name:
            return False
        self._arguments(self._begin(name))(as_arguments(early))
        return True

    def _key(self) -> Reading[str]:
        """The rest of a member's name and the colon; empty if there is none."""
        pieces = ['"']
        if not (yield from self._string(pieces.append)):
            return ""
        yield from self._blanks()
        if (yield from self._goes_on(":")) == "":
            return ""
        yield from self._blanks()
        return _text(pieces)

    def _argument_value(self, tell: Tell) -> Reading[None]:
        if (yield from self._peek()) == "{":
            yield from self._json(tell)
            return
        pieces: list[str] = []
        yield from self._json(pieces.append)
        tell(as_arguments("".join(pieces)))

    def _list(self) -> Reading[bool]:
        """The rest of an array of calls. False: it holds something else, or does not end."""
        while True:
            yield from self._blanks()
            if (yield from self._goes_on(",")):
                continue
            if (yield from self._goes_on("]")):
                return True
            before = self._calls
            if not (yield from self._call()):
                return self._calls > before


def _text(pieces: Sequence[str]) -> str:
    """The string that a JSON string is; empty if it is none."""
    try:
        found: Any = json.loads("".join(pieces), strict=False)
    except (ValueError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


def as_arguments(raw: str) -> str:
    """Of a value that is no object: some models write the object as a string, or null where there are none."""
    if raw in ("", "null"):
        return "{}"
    return _text([raw]) or "{}" if raw.startswith('"') else raw


class Hermes(JsonCalls):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Qwen2.5, Qwen3 and Hermes write it."""

    shows_special = False

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        super().__init__()

    def _read(self) -> Reading[None]:
        while mark := (yield from self._upto(self._content, "<tool_call>")):
            self._keep(mark)
            yield from self._blanks()
            if not (yield from self._call()):
                self._give_back()
                continue
            yield from self._blanks()
            yield from self._goes_on("</tool_call>")


class Mistral(JsonCalls):
    """`[TOOL_CALLS]` before an array of calls, or before each name and its arguments."""

    shows_special = True

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        super().__init__()

    def _read(self) -> Reading[None]:
        while mark := (yield from self._upto(self._content, "[TOOL_CALLS]")):
            self._keep(mark)
            yield from self._blanks()
            found = self._list() if (yield from self._goes_on("[")) else self._named()
            if not (yield from found):
                self._give_back()
            self._raw = None

    def _named(self) -> Reading[bool]:
        name, mark = yield from self._name("[ARGS]", "[CALL_ID]", "{")
        if mark == "[CALL_ID]":
            _, mark = yield from self._name("[ARGS]", "{")
        if not name or not mark:
            return False
        if mark == "{":
            self._at -= 1  # nothing was waited for since it was taken
        tell = self._arguments(self._begin(name))
        yield from self._blanks()
        yield from self._json(tell)
        return True


class RequiredCalls(JsonCalls):
    """The whole text is an array of calls: what a grammar makes of any model when a call is required."""

    def _read(self) -> Reading[None]:
        self._keep("")
        yield from self._blanks()
        if (yield from self._goes_on("[")) == "" or not (yield from self._list()):
            self._give_back()
        self._raw = None
        yield from self._blanks()


class NamedCall(TextReader):
    """The whole text is the arguments of one tool's call."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._tool = name

    def _read(self) -> Reading[None]:
        yield from self._blanks()
        if (yield from self._more()):
            yield from self._json(self._arguments(self._begin(self._tool)))
        yield from self._blanks()
