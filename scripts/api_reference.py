"""`python scripts/api_reference.py`: writes docs/api.md, every request field and what is done with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from elastic_ep.gateway.bodies import chat_body, completion_body, detokenize_body, tokenize_body
from elastic_ep.gateway.fields import Body, Schema, Schemas
from elastic_ep.gateway.messages.body import messages_body
from elastic_ep.gateway.responses.body import responses_body
from elastic_ep.gateway.settings import ApiSettings

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
_HEAD = """# Request fields

Written by `python scripts/api_reference.py` from the models that requests are read by. `GET /openapi.json` has the
same.

A field that is honoured does what it does in OpenAI's API, vLLM and SGLang. One that is not is refused with status 400,
code `unsupported_parameter` and its name in `param`, unless its value asks for nothing: null, the default, or what
happens anyway. A field that nobody knows is ignored, and the log says so once. Bounds that depend on the model are shown
for one with 4096 positions and a vocabulary of 32000.
"""


def page() -> str:
    settings = ApiSettings(model_name="model", max_model_len=4096, vocab_size=32000, version="")
    bodies: dict[str, type[Body]] = {
        "/v1/completions": completion_body(settings),
        "/v1/chat/completions": chat_body(settings),
        "/v1/responses": responses_body(settings),
        "/v1/messages": messages_body(settings),
        "/tokenize": tokenize_body(settings),
        "/detokenize": detokenize_body(settings),
    }
    return "\n".join([_HEAD, *(_section(path, body) for path, body in bodies.items())])


def _section(path: str, body: type[Body]) -> str:
    properties = body.model_json_schema(schema_generator=Schemas)["properties"]
    lines = [f"## POST {path}\n", "| field | value | |", "|---|---|---|"]
    for name, field in sorted(body.model_fields.items(), key=lambda item: not item[1].is_required()):
        one = properties[name]
        given = "" if one.get("default") in (None, []) else f"Default {json.dumps(one['default'])}."
        about = " ".join(filter(None, ["Required." if field.is_required() else given, field.description]))
        if name not in body.refused:
            lines.append(f"| `{name}` | {_shown(one)} | {about} |")
    if body.refused:
        lines += ["\n| not honoured | accepted nevertheless | why |", "|---|---|---|"]
    for name, refused in body.refused.items():
        allowed = ", ".join(f"`{json.dumps(value)}`" for value in (None, *refused.allowed))
        lines.append(f"| `{name}` | {allowed} | {refused.why} |")
    return "\n".join(lines) + "\n"


def _shown(schema: Schema) -> str:
    """A JSON Schema in words, without null."""
    if kinds := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_shown(one) for one in kinds if one.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"] if value is not None)
    kind = schema.get("type", "object" if "$ref" in schema else "anything")
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
