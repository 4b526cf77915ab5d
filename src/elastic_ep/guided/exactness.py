"""What a JSON schema may ask of numbers, and of how many members there are, so that every text that follows it fits it.

HAZARD: llguidance 1.9.1 counts with doubles and 64 bits, takes a range within one whole number to have its whole end, and
does not look whether two members of an object have one name. It says nothing of all that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

MOST = 2**53
"""Up to here every whole number is a double of its own."""
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_BOUNDS = (*_LOWER, *_UPPER, "multipleOf")
_VALUES = ("const", "enum")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Their members' names are the client's."""
_OTHERS = ("default", "examples")

Fault = tuple[str, str]
"""What is wrong, and where: as `BadGrammar` has them."""


def drawn_in(schema: Any) -> Any:
    """The same with bounds nearer: what is left of a range as wide as 64 bits, which programs write into their schemas,
    can be counted, and all in it fits."""
    if isinstance(schema, list):
        return [drawn_in(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: _drawn_in(name, value) for name, value in schema.items()}


def _drawn_in(name: str, value: Any) -> Any:
    if name in _LOWER and _is_number(value):
        return max(value, -MOST)
    if name in _UPPER and _is_number(value):
        return min(value, MOST)
    if name in _NAMED and isinstance(value, dict):
        return {inner: drawn_in(one) for inner, one in value.items()}
    return value if name in _VALUES or name in _OTHERS else drawn_in(value)


def faults(schema: Any, place: str = "") -> Iterator[Fault]:
    """Of the schema and all within it."""
    if isinstance(schema, list):
        for index, one in enumerate(schema):
            yield from faults(one, f"{place}[{index}]")
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        at = f"{place}.{name[:40]}"
        if name in _VALUES or name in _BOUNDS:
            if any(abs(number) > MOST for number in _numbers(value)):
                yield f"has a number beyond {MOST}, up to which whole numbers are exact: make it a string", at
        elif name in _NAMED and isinstance(value, dict):
            for inner, one in value.items():
                yield from faults(one, f"{at}.{inner[:40]}")
        elif name not in _OTHERS:
            yield from faults(value, at)
    yield from _members(schema, place)
    yield from _range(schema, place)


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _members(schema: dict[str, Any], place: str) -> Iterator[Fault]:
    """Members of any name may come twice, and count as one to who reads them."""
    least, required = schema.get("minProperties"), schema.get("required")
    sure = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(least, int) and least > sure + 1:
        what = f"can be no more than one beyond those that are required ({sure}): others may come twice"
        yield what, f"{place}.minProperties"


def _range(schema: dict[str, Any], place: str) -> Iterator[Fault]:
    """A whole number that is left out, where the other end is a fraction beside it."""
    for mine, other, sign in (("Minimum", "aximum", 1), ("Maximum", "inimum", -1)):
        end = schema.get(name := f"exclusive{mine}")
        if end is True:  # as in drafts before the sixth
            end = schema.get(mine.lower())
        if not _is_number(end) or end % 1 != 0 or schema.get("type") == "integer":
            continue
        for beyond in (schema.get(f"m{other}"), schema.get(f"exclusiveM{other}")):
            if _is_number(beyond) and sign * end >= 0 and 0 < sign * (beyond - end) < 1:
                what = "cannot be kept with another end so near: give the next number that is allowed, as"
                yield f"{what} '{mine.lower()}'", f"{place}.{name}"


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
