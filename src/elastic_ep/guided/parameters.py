"""Arguments of a call that are written in tags, not as JSON: which tags each style has, and what may stand in them.

In a tag a string stands as it is, without quotes, and everything else as JSON. What a schema says of strings that a text
without quotes cannot be held to is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from elastic_ep.guided.grammars import BadGrammar

MOST_RESOLVED = 32
NAME = "[a-zA-Z_][a-zA-Z0-9_.-]*"
"""Of a parameter that the schema allows and does not name: a regular expression."""
_NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
_OF_TEXT = {"pattern", "minLength", "maxLength"}
_DEFINITIONS = ("$defs", "definitions")
_NO_TEXT = ["object", "array", "number", "boolean", "null"]


class Style(NamedTuple):
    """`begin` is before a name, `named` behind it, if what follows is a string and if not; `end` behind the value.

    Where `named` has a part more, blanks may come before that.
    """

    begin: str
    named: Callable[[bool], tuple[str, ...]]
    end: str


STYLES = {
    "qwen_xml": Style("<parameter=", lambda text: (">",), "</parameter>"),
    "minimax_xml": Style('<parameter name="', lambda text: ('">',), "</parameter>"),
    "deepseek_xml": Style(
        '<｜DSML｜parameter name="',
        lambda text: (f'" string="{"true" if text else "false"}">',),
        "</｜DSML｜parameter>",
    ),
    "glm_xml": Style("<arg_key>", lambda text: ("</arg_key>", "<arg_value>"), "</arg_value>"),
}


class Text(NamedTuple):
    """A string as it is: one of `choices`, if there are any; else one that matches all of `patterns`."""

    choices: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()


class Json(NamedTuple):
    schema: dict[str, Any]


Value = Text | Json


class Parameter(NamedTuple):
    name: str
    required: bool
    values: tuple[Value, ...]
    """One of these."""
    place: str
    """In the schema."""


class Parameters(NamedTuple):
    """`others`: what one that is not named may be; None: there is no such."""

    named: tuple[Parameter, ...]
    others: tuple[Value, ...] | None


def parameters(schema: Any) -> Parameters:
    """Of the schema of an object, in its order. Raises `BadGrammar`."""
    if schema is True or schema == {}:
        schema = {"type": "object"}
    if not isinstance(schema, dict):
        raise BadGrammar("must be an object")
    known = {
        "type",
        "properties",
        "required",
        "additionalProperties",
        "$schema",
        "strict",
        *_DEFINITIONS,
        *_NOTES,
    }
    for name in schema.keys() - known:
        raise BadGrammar("is not followed in this style, only in JSON", f".{name[:40]}")
    if schema.get("type", "object") != "object":
        raise BadGrammar('must be "object": these are arguments by name', ".type")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
        raise BadGrammar("must be an object", ".properties")
    if not isinstance(required, list):
        raise BadGrammar("must be an array", ".required")
    for index, name in enumerate(required):
        if name not in properties:
            raise BadGrammar("is none of the properties", f".required[{index}]")
    reader = _Reader({name: schema[name] for name in _DEFINITIONS if name in schema})
    named = tuple(
        Parameter(name, name in required, reader.values(one, f".properties.{name}"), f".properties.{name}")
        for name, one in properties.items()
    )
    # As xgrammar has it: others come only if they are asked for, or if none is named.
    others = schema.get("additionalProperties", not properties)
    if others is False:
        return Parameters(named, None)
    return Parameters(named, reader.values(others, ".additionalProperties"))


class _Reader:
    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions

    def values(self, schema: Any, place: str, depth: int = 0) -> tuple[Value, ...]:
        """What a value may be. Raises `BadGrammar`."""
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise BadGrammar("must be an object", place)
        if depth > MOST_RESOLVED:
            raise BadGrammar("refers to itself", place)
        told = {name: value for name, value in schema.items() if name not in _NOTES}
        if not told:
            return Text(), self._json({"type": _NO_TEXT})
        if "$ref" in told:
            return self._referred(told, place, depth)
        if "const" in told:
            return self._chosen([told["const"]])
        if "enum" in told:
            if not isinstance(told["enum"], list) or not told["enum"]:
                raise BadGrammar("must be an array that is not empty", f"{place}.enum")
            return self._chosen(told["enum"])
        for word in ("anyOf", "oneOf"):
            if word in told:
                return self._one_of(word, told, place, depth)
        return self._typed(told, place)

    def _referred(self, told: dict[str, Any], place: str, depth: int) -> tuple[Value, ...]:
        parts = str(told["$ref"]).split("/")
        table = self._definitions.get(parts[1]) if len(parts) == 3 and parts[0] == "#" else None
        if not isinstance(table, dict) or parts[2] not in table or len(told) > 1:
            raise BadGrammar("is followed in this style alone, and to #/$defs/NAME", f"{place}.$ref")
        return self.values(table[parts[2]], place, depth + 1)

    def _chosen(self, given: list[Any]) -> tuple[Value, ...]:
        texts = tuple(one for one in given if isinstance(one, str))
        rest = [one for one in given if not isinstance(one, str)]
        return (*((Text(choices=texts),) if texts else ()), *((self._json({"enum": rest}),) if rest else ()))

    def _one_of(self, word: str, told: dict[str, Any], place: str, depth: int) -> tuple[Value, ...]:
        if len(told) > 1 or not isinstance(told[word], list) or not told[word]:
            raise BadGrammar(
                "must be an array that is not empty, and stand alone in this style", f"{place}.{word}"
            )
        found = [
            value
            for index, one in enumerate(told[word])
            for value in self.values(one, f"{place}.{word}[{index}]", depth + 1)
        ]
        if word == "oneOf" and len(found) > 1 and len([one for one in found if isinstance(one, Text)]) != 1:
            raise BadGrammar(
                "is followed in this style if one of it is a string; write anyOf", f"{place}.{word}"
            )
        return tuple(found)

    def _typed(self, told: dict[str, Any], place: str) -> tuple[Value, ...]:
        types = told.get("type", ["string", *_NO_TEXT] if told.keys() <= _OF_TEXT else _NO_TEXT)
        if isinstance(types, str):
            types = [types]
        if not isinstance(types, list) or not types:
            raise BadGrammar("must be a string or an array of such", f"{place}.type")
        found: list[Value] = []
        if "string" in types:
            found.append(_text(told, place, alone=len(types) == 1))
        if rest := [one for one in types if one != "string"]:
            others = {name: value for name, value in told.items() if name not in _OF_TEXT}
            found.append(self._json({**others, "type": rest if len(rest) > 1 else rest[0]}))
        return tuple(found)

    def _json(self, schema: dict[str, Any]) -> Json:
        return Json({**schema, **self._definitions})


def _text(told: dict[str, Any], place: str, *, alone: bool) -> Text:
    for name in told.keys() - {"type", *_OF_TEXT} if alone else ():
        raise BadGrammar("of a string is not followed in this style, only in JSON", f"{place}.{name[:40]}")
    patterns = []
    if "pattern" in told:
        if not isinstance(told["pattern"], str):
            raise BadGrammar("must be a string", f"{place}.pattern")
        patterns.append(_whole(told["pattern"]))
    least, most = told.get("minLength", 0), told.get("maxLength", "")
    if any(type(one) is not int or one < 0 for one in (least, most) if one != ""):
        raise BadGrammar("must be a number that is not negative", f"{place}.maxLength")
    if least or most != "":
        patterns.append(f"(?s:.{{{least},{most}}})")
    return Text(patterns=tuple(patterns))


def _whole(pattern: str) -> str:
    """Of whole texts, as `pattern` finds a place in one."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[1 if begins else 0 : -1 if ends else None]
    return f"{'' if begins else '(?s:.*)'}(?:{inner}){'' if ends else '(?s:.*)'}"
