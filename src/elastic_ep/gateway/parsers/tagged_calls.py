"""Formats in which each argument has tags of its own, and its value is text as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from elastic_ep.gateway.parsers.base import Reading, Tell, TextReader, Tool, quoted


class TaggedCalls(TextReader):
    """What they share: arguments become the members of a JSON object, typed by the tool's schema."""

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        super().__init__()
        self._tools = {tool.name: tool for tool in tools}

    def _value(self, tool: str, key: str, tell: Tell, *ends: str) -> Reading[bool]:
        """Tell the text before the first of `ends` as a JSON value. False: the text ends first.

        A string is told as it comes, for anything else its end is waited for.
        """
        known = self._tools.get(tool)
        types = known.types.get(key, frozenset()) if known else frozenset()
        if types - {"string"}:
            text, mark = yield from self._collect(*ends)
            tell(typed(text, types))
            return bool(mark)
        tell('"')
        mark = yield from self._upto(lambda text: tell(quoted(text)), *ends)
        tell('"')
        return bool(mark)


_OF: dict[type, set[str]] = {
    bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, list: {"array"}, dict: {"object"},
    type(None): {"null"},
}  # fmt: skip
_WORDS = {"true": "true", "false": "false", "none": "null", "null": "null"}


def typed(text: str, types: frozenset[str]) -> str:
    """`text` as JSON of one of `types`; a string if it is none."""
    written = _WORDS.get(text.strip().lower(), text.strip())
    try:
        found: Any = json.loads(written, parse_constant=_refuse)
    except (ValueError, RecursionError):
        found = ""
    if type(found) is float and found.is_integer() and "number" not in types:
        written, found = str(int(found)), int(found)
    fits = _OF.get(type(found), set()) & types
    return written if fits else f'"{quoted(text)}"'


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


class Qwen3Coder(TaggedCalls):
    """`<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`."""

    shows_special = False

    def _read(self) -> Reading[None]:
        while mark := (yield from self._upto(self._content, "<tool_call>", "<function=")):
            self._keep(mark)
            yield from self._blanks()
            if mark == "<tool_call>" and not (yield from self._goes_on("<function=")):
                self._give_back()
                continue
            name, closed = yield from self._name(">")
            if not name or not closed:
                self._give_back()
                continue
            yield from self._parameters(name, self._arguments(self._begin(name)))
            yield from self._blanks()
            yield from self._goes_on("</tool_call>")

    def _parameters(self, name: str, tell: Tell) -> Reading[None]:
        tell("{")
        first = True
        while True:
            yield from self._blanks()
            if (yield from self._goes_on("<parameter=", "</function>")) != "<parameter=":
                break
            key, closed = yield from self._name(">")
            if not closed:
                break
            tell(f'{"" if first else ", "}"{quoted(key)}": ')
            first = False
            yield from self._goes_on("\n")
            yield from self._value(name, key, tell, "\n</parameter>", "</parameter>")
        tell("}")


class Glm45(TaggedCalls):
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>value</arg_value></tool_call>`."""

    shows_special = True

    def _read(self) -> Reading[None]:
        while mark := (yield from self._upto(self._content, "<tool_call>")):
            self._keep(mark)
            yield from self._blanks()
            name, end = yield from self._name("\n", "<arg_key>", "</tool_call>")
            if not name or not end:
                self._give_back()
                continue
            yield from self._pairs(name, self._arguments(self._begin(name)), end)

    def _pairs(self, name: str, tell: Tell, mark: str) -> Reading[None]:
        tell("{")
        first = True
        while mark != "</tool_call>":
            yield from self._blanks()
            if mark != "<arg_key>":
                mark = yield from self._goes_on("<arg_key>", "</tool_call>")
                if mark != "<arg_key>":
                    break
            key, closed = yield from self._name("</arg_key>")
            if not closed:
                break
            yield from self._blanks()
            if not (yield from self._goes_on("<arg_value>")):
                break
            tell(f'{"" if first else ", "}"{quoted(key)}": ')
            first = False
            yield from self._value(name, key, tell, "</arg_value>")
            mark = ""
        tell("}")


class MiniMaxM2(TaggedCalls):
    """`<minimax:tool_call><invoke name="NAME"><parameter name="KEY">value</parameter></invoke></minimax:tool_call>`."""

    def _read(self) -> Reading[None]:
        while mark := (yield from self._upto(self._content, "<minimax:tool_call>")):
            self._keep(mark)
            yield from self._blanks()
            while (yield from self._goes_on("<invoke name=")):
                name, closed = yield from self._name(">")
                if not (name := name.strip("\"' ")) or not closed:
                    break
                yield from self._parameters(name, self._arguments(self._begin(name)))
                yield from self._blanks()
            if self._raw is not None:
                self._give_back()
            yield from self._goes_on("</minimax:tool_call>")

    def _parameters(self, name: str, tell: Tell) -> Reading[None]:
        tell("{")
        first = True
        while True:
            yield from self._blanks()
            if (yield from self._goes_on("<parameter name=", "</invoke>")) != "<parameter name=":
                break
            key, closed = yield from self._name(">")
            if not closed:
                break
            key = key.strip("\"' ")
            tell(f'{"" if first else ", "}"{quoted(key)}": ')
            first = False
            yield from self._goes_on("\n")
            yield from self._value(name, key, tell, "\n</parameter>", "</parameter>")
        tell("}")
