"""`python -m elastic_ep.gateway.reference`: writes docs/api.md, every request field and what is done with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from elastic_ep.gateway.bodies import chat_fields, completion_fields, detokenize_fields, tokenize_fields
from elastic_ep.gateway.fields import Field, Label, OneOf, Schema
from elastic_ep.gateway.settings import ApiSettings

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
_HEAD = """# Request fields

Written by `python -m elastic_ep.gateway.reference` from the tables that requests are read by. `GET /openapi.json` has the
same.

A field that is honoured does what it does in OpenAI's API, vLLM and SGLang. One that is not is refused with status 400,
code `unsupported_parameter` and its name in `param`, unless its value asks for nothing: null, the default, or what
happens anyway. A field that nobody knows is ignored, and the log says so once. Bounds that depend on the model are shown
for one with 4096 positions and a vocabulary of 32000.
"""


def page() -> str:
    settings = ApiSettings(model_name="model", max_model_len=4096, vocab_size=32000, version="")
    tables: dict[str, Sequence[Field]] = {
        "/v1/completions": completion_fields(settings),
        "/v1/chat/completions": chat_fields(settings),
        "/tokenize": tokenize_fields(),
        "/detokenize": detokenize_fields(settings),
    }
    return "\n".join([_HEAD, *(_section(path, table) for path, table in tables.items())])


def _section(path: str, table: Sequence[Field]) -> str:
    refused = [
        field for field in table if isinstance(field.kind, OneOf) and field.about.startswith("Refused")
    ]
    honoured = [field for field in table if field not in refused]
    parts = [f"## POST {path}\n", "| field | value | |", "|---|---|---|"]
    parts += [f"| `{field.name}` | {_kind(field)} | {_about(field)} |" for field in honoured]
    if refused:
        parts += ["\n| not honoured | accepted nevertheless | why |", "|---|---|---|"]
        parts += [f"| `{field.name}` | {_allowed(field)} | {_why(field)} |" for field in refused]
    return "\n".join(parts) + "\n"


def _kind(field: Field) -> str:
    return "anything" if isinstance(field.kind, Label) else _shown(field.kind.schema())


def _about(field: Field) -> str:
    default = "" if field.default in (None, (), "") else f"Default {json.dumps(field.default)}."
    return " ".join(part for part in ("Required." if field.required else default, field.about) if part)


def _allowed(field: Field) -> str:
    assert isinstance(field.kind, OneOf)
    return ", ".join(f"`{json.dumps(value)}`" for value in ("null", *field.kind.allowed)).replace(
        '"null"', "null"
    )


def _why(field: Field) -> str:
    assert isinstance(field.kind, OneOf)
    return field.kind.why


def _shown(schema: Schema) -> str:
    """A JSON Schema in words."""
    if "anyOf" in schema:
        return " or ".join(_shown(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"array of {_shown(schema['items'])}"
    if "maximum" not in schema:
        return str(kind)
    if schema["maximum"] > 1e9:
        return f"{kind}, from {schema['minimum']}"
    above = "above " if "exclusiveMinimum" in schema else ""
    return f"{kind}, {above}{schema['exclusiveMinimum' if above else 'minimum']:g} to {schema['maximum']:g}"


if __name__ == "__main__":
    sys.exit(PAGE.write_text(page()) and 0)
