"""JSON schemas of a subset whose meaning `fits` says in a few lines, and grammars for small alphabets."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

_NAMES = st.text('abé"\\ ', min_size=1, max_size=3)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def schema(fields: dict[str, Any], required: int) -> dict[str, Any]:
        names = list(fields)[:required]
        return {"type": "object", "properties": fields, "required": names, "additionalProperties": False}

    return st.builds(schema, st.dictionaries(_NAMES, inner, max_size=3), st.integers(0, 3))


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda item, least, more: {
            "type": "array", "items": item, "minItems": least, "maxItems": least + more
        },
        inner, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip


schemas = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -3, "maximum": 120},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "maxLength": 3},
            {"type": "string", "pattern": "^[ab]{1,3}$"},
        ]
    )
    | st.lists(st.none() | st.booleans() | st.integers(-9, 9) | _NAMES, min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    lambda inner: (
        _objects(inner)
        | _arrays(inner)
        | st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
    ),
    max_leaves=5,
)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    match schema["type"]:
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "string":
            if not isinstance(value, str):
                return False
            if "pattern" in schema:
                return 1 <= len(value) <= 3 and set(value) <= {"a", "b"}
            return len(value) <= int(schema["maxLength"])
        case "array":
            return (
                isinstance(value, list)
                and schema["minItems"] <= len(value) <= schema["maxItems"]
                and all(fits(one, schema["items"]) for one in value)
            )
    fields = schema["properties"]
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= value.keys() <= fields.keys()
        and all(fits(one, fields[name]) for name, one in value.items())
    )


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        return fits(json.loads(text), schema)
    except ValueError:
        return False
