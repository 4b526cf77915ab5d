"""Parts of conversations at /v1/responses and /v1/messages: objects with a type. Every function raises `ApiError`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.fields import bad_value, unsupported


def string(block: Mapping[str, Any], name: str, where: str) -> str:
    found = block.get(name)
    if not isinstance(found, str):
        raise bad_value(f"{where}.{name}", "must be a string.")
    return found


def text(content: Any, where: str, kinds: Collection[str]) -> str:
    """Of a string, or of an array of parts, each of one of `kinds`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_value(where, "must be a string or an array of parts.")
    pieces = []
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds:
            raise text_alone(f"{where}[{place}].type")
        pieces.append(string(part, "text", f"{where}[{place}]"))
    return "\n".join(pieces)


def text_alone(where: str) -> ApiError:
    return unsupported(where, "cannot be honoured here: it takes and gives text alone.")
