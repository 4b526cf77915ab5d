"""Requests for guided text and for calls of tools, and whether an answer does: for tests and benches with kills.

The answer to one for calls is told as JSON: a list of [name, arguments as they came].
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.kit.schemas import is_valid

_TAGS = ["red", "green", "blue", "none"]


@dataclass(frozen=True, slots=True)
class GuidedAsk:
    """`fields` of a request, all but its messages; `valid` looks at the whole answer."""

    fields: dict[str, Any]
    valid: Callable[[str], bool]


def guided_asks(count: int) -> list[GuidedAsk]:
    """All different: JSON, patterns, JSON behind free text, choices, in turn; one in three greedy, the others sampled."""
    kinds = (_json, _pattern, _tagged, _choice)
    return [_sampled(kinds[index % 4](index), index) for index in range(count)]


def guided_and_calls(count: int) -> list[GuidedAsk]:
    """All different: a third JSON, a third patterns and choices, a third calls of tools, in turn."""
    kinds = (_json, _pattern, _call, _json, _choice, _call)
    asks = [_sampled(kinds[index % 6](index), index) for index in range(count)]
    # A text is valid when it is complete, and an answer that is cut off is not. Strings of escapes, and blanks within
    # a call, can take one beyond 400 tokens.
    return [GuidedAsk({**ask.fields, "max_tokens": 700}, ask.valid) for ask in asks]


def person(index: int) -> dict[str, Any]:
    """A schema with a list of one object or two; a text takes the bundled model 150 tokens or more."""
    return {
        "type": "object",
        "properties": {
            f"title_{index}": {"type": "string", "maxLength": 20},
            "people": {
                "type": "array",
                "minItems": 1,
                "maxItems": 2,
                "items": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "maxLength": 12},
                        "age": {"type": "integer", "minimum": 0, "maximum": 120 + index},
                        "tags": {"type": "array", "items": {"enum": _TAGS}, "minItems": 1, "maxItems": 4},
                        "member": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                    },
                    "required": ["name", "age", "tags", "member"],
                    "additionalProperties": False,
                },
            },
        },
        "required": [f"title_{index}", "people"],
        "additionalProperties": False,
    }


def _trip(index: int) -> dict[str, Any]:
    """What a tool is given: nothing that a model without any idea of it can write on and on."""
    return {
        "type": "object",
        "properties": {
            "days": {"type": "integer", "minimum": 1, "maximum": 9 + index},
            "tags": {"type": "array", "items": {"enum": _TAGS}, "minItems": 4, "maxItems": 8},
            "member": {"type": "boolean"},
        },
        "required": ["days", "tags", "member"],
        "additionalProperties": False,
    }


def _json(index: int) -> GuidedAsk:
    schema = person(index)
    form = {"name": "people", "strict": True, "schema": schema}
    fields = {"response_format": {"type": "json_schema", "json_schema": form}}
    # Blanks are likely to a model that knows no JSON, and take their time.
    return GuidedAsk({**fields, "guided_whitespace_pattern": " ?"}, partial(is_valid, schema=schema))


def _pattern(index: int) -> GuidedAsk:
    pattern = rf"({index}: [A-Z][a-z]{{2,9}} [0-9]{{2}}-[0-9]{{4}}(, [a-z]{{3,12}}){{2,6}}\.\n){{2}}"
    return GuidedAsk({"regex": pattern}, lambda text: re.fullmatch(pattern, text) is not None)


def _tagged(index: int) -> GuidedAsk:
    """Free text up to the first "a", and a list behind that."""
    schema = {"type": "array", "items": {"enum": [*_TAGS, index]}, "minItems": 6, "maxItems": 8}
    content = {"type": "json_schema", "json_schema": schema}
    form = {
        "type": "triggered_tags",
        "triggers": ["a"],
        "tags": [{"type": "tag", "begin": "a: ", "content": content, "end": "."}],
        "stop_after_first": True,
    }
    fields = {"response_format": {"type": "structural_tag", "format": form}}

    def valid(text: str) -> bool:
        _, met, rest = text.partition("a")
        return not met or (
            rest.startswith(": ") and rest.endswith(".") and is_valid(rest[2:-1], schema=schema)
        )

    return GuidedAsk(fields, valid)


def _call(index: int) -> GuidedAsk:
    """A call of one tool that is named, or of any of two."""
    tools = {f"tool_{index}": _trip(index), "other": _trip(0)}
    told = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in tools.items()
    ]
    named = {"type": "function", "function": {"name": f"tool_{index}"}}
    fields = {
        "tools": told,
        "tool_choice": named if index % 4 < 2 else "required",
        "parallel_tool_calls": False,
    }

    def valid(text: str) -> bool:
        calls = json.loads(text)
        return len(calls) == 1 and all(
            name in tools and is_valid(given, schema=tools[name]) for name, given in calls
        )

    return GuidedAsk(fields, valid)


def _choice(index: int) -> GuidedAsk:
    choices = [f"{index}. {word} " * 6 for word in ("perhaps", "certainly", "by no means")]
    return GuidedAsk({"structured_outputs": {"choice": choices}}, lambda text: text in choices)


def _sampled(ask: GuidedAsk, index: int) -> GuidedAsk:
    how = {"temperature": 1.0, "seed": index} if index % 3 else {"temperature": 0.0}
    return GuidedAsk({"max_tokens": 400, **ask.fields, **how}, ask.valid)
