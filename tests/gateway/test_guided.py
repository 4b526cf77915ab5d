"""The fields that ask for a grammar: what they become, what is refused and in which words."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.guided import GrammarReader, KnownGrammars, Unchecked
from elastic_ep.gateway.jobs import JobReader
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.guided import grammars
from elastic_ep.guided.structural_tags import structural_tag
from elastic_ep.wire.messages import Grammar
from tests.gateway.conftest import Running, Start, settings
from tests.gateway.fakes import MODEL, sample_text

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
EBNF = 'root ::= "yes" | "no"'
STRUCTURES = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f>"]}
FORMAT = {"format": {"type": "tag", "begin": "<f>", "content": {"type": "any_text"}, "end": "</f>"}}
TAG = {"type": "structural_tag"}


def grammar_of(
    text: ChatTokenizer | None = None, changes: dict[str, Any] | None = None, **fields: Any
) -> Any:
    reader = JobReader(settings(**(changes or {})), text or sample_text())
    return reader.completion({"prompt": "x", **fields}).parts[0].params.grammar


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, grammars.json_object()),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
            grammars.json_schema(SCHEMA),
        ),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": {"json": SCHEMA}}, grammars.json_schema(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, grammars.json_object()),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            grammars.json_schema(SCHEMA, compact=True),
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}},
            grammars.json_schema(SCHEMA, whitespace=" ?"),
        ),
        ({"structured_outputs": {"regex": "a+"}}, grammars.regex("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, grammars.choice(["a", "b"])),
        ({"structured_outputs": {"grammar": EBNF}}, grammars.ebnf(EBNF)),
        ({"guided_json": json.dumps(SCHEMA)}, grammars.json_schema(SCHEMA)),
        ({"guided_json": True}, grammars.json_schema(True)),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": ""}, grammars.json_schema(SCHEMA, whitespace="")),
        ({"guided_regex": "a+", "guided_decoding_backend": "auto"}, grammars.regex("a+")),
        ({"guided_choice": ["a"]}, grammars.choice(["a"])),
        ({"guided_grammar": 'start: "a"'}, grammars.lark('start: "a"')),
        ({"json_schema": SCHEMA}, grammars.json_schema(SCHEMA)),
        ({"json_schema": "", "regex": "", "guided_choice": []}, None),
        ({"regex": "a+"}, grammars.regex("a+")),
        ({"ebnf": EBNF}, grammars.ebnf(EBNF)),
        ({"response_format": TAG | STRUCTURES}, structural_tag(STRUCTURES).grammar),
        ({"response_format": TAG | FORMAT}, structural_tag(FORMAT).grammar),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG | FORMAT)}}, structural_tag(FORMAT).grammar),
        ({"structural_tag": STRUCTURES}, structural_tag(STRUCTURES).grammar),
        ({"structural_tag": ""}, None),
    ],
)  # fmt: skip
def test_every_name_for_a_grammar(fields: dict[str, Any], grammar: Grammar | None) -> None:
    assert grammar_of(**fields) == grammar


GRAMMARS: dict[str, Any] = {
    "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    "guided_json": SCHEMA, "json_schema": SCHEMA, "guided_regex": "a+", "regex": "a+", "guided_choice": ["a"],
    "guided_grammar": EBNF, "ebnf": EBNF, "json": SCHEMA, "json_object": True, "structured regex": "a+",
    "choice": ["a"], "grammar": EBNF, "no grammar": None, "JSON": {"type": "json_object"}, "text": {"type": "text"},
    "structural_tag": STRUCTURES, "new tag": FORMAT, "tags": TAG | STRUCTURES, "tag format": TAG | FORMAT,
}  # fmt: skip
"""By the field, or the field of `structured_outputs`, that asks for it."""
FIELDS = {
    "JSON": "response_format", "text": "response_format", "structured regex": "regex", "new tag": "structural_tag",
    "tags": "response_format", "tag format": "response_format",
}  # fmt: skip
DETAILS: dict[str, tuple[str | None, Any]] = {
    "guided_whitespace_pattern": (None, " ?"), "whitespace_pattern": ("structured_outputs", " ?"),
    "disable_any_whitespace": ("structured_outputs", True), "json_schema": ("response_format", {"schema": {}}),
    "format": ("response_format", {"type": "any_text"}), "triggers": ("response_format", ["<f"]),
    "structures": ("response_format", [{"begin": "<f>", "schema": {}, "end": ""}]),
}  # fmt: skip


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize("name", GRAMMARS)
def test_what_is_said_of_a_grammar_beside_it_changes_it_or_is_refused(name: str, detail: str) -> None:
    given = GRAMMARS[name]
    field = FIELDS.get(name, name)
    of_new = name in ("json", "json_object", "structured regex", "choice", "grammar", "new tag")
    body = {"structured_outputs": {field: given}} if of_new else {field: given} if given is not None else {}
    inside, value = DETAILS[detail]
    if inside == "response_format" and field != "response_format":
        return
    more = {inside: {**body.get(inside, {}), detail: value}} if inside else {detail: value}
    plain, fault = grammar_of(**body), None
    try:
        changed = grammar_of(**{**body, **more})
    except ApiError as error:
        changed, fault = None, error
    if fault is None:
        assert changed != plain
    else:
        forms = {"response_format.format", "response_format.structures", "response_format.triggers"}
        named = f"{inside}.{detail}" if inside else detail
        assert fault.param == named or {fault.param, named} <= forms, "one form of a tag's or the other's"
        assert fault.code in ("invalid_value", "invalid_grammar")


def test_grammars_that_are_asked_for_stay_known() -> None:
    known, some = KnownGrammars(), [grammars.regex(f"a{number}") for number in range(257)]
    for grammar in some[:256]:
        known.add(grammar)
    known.check(some[0])
    known.add(some[256])
    known.check(some[0])
    with pytest.raises(Unchecked):
        known.check(some[1])


async def refused(running: Running, path: str = "/v1/completions", **fields: Any) -> tuple[str, str, str]:
    asked = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    async with running.http.post(running.url + path, json=asked | fields) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert not running.backend.submitted
    return error["param"], error["code"], error["message"]


async def test_what_is_refused_names_the_field_and_the_place(start: Start) -> None:
    running = await start()
    wrong = {"type": "object", "properties": {"a": {"type": "number", "oneOff": 1}, "b": {"type": "str"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": wrong}}
    param, code, message = await refused(running, "/v1/chat/completions", response_format=form)
    assert (param, code) == ("response_format.json_schema.schema.properties.b", "invalid_grammar")
    assert "str" in message
    assert running.worker.pid, "a process of its own has compiled it"

    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"regex": "a("}, "regex", "character 2"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"ebnf": "root = x"}, "ebnf", "line 1"),
        (
            {"structured_outputs": {"grammar": 'start: "a" b'}},
            "structured_outputs.grammar",
            "line 1, column 8",
        ),
        ({"structured_outputs": {"json": {"uniqueItems": True}}}, "structured_outputs.json", "uniqueItems"),
        ({"regex": "a" * 70_000}, "regex", "65536"),
        ({"guided_json": 7}, "guided_json", "must be an object"),
        ({"guided_json": {"x-guidance": {}}}, "guided_json.x-guidance", "not taken"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "must be"),
        ({"response_format": {"type": "json_object", "of": 1}}, "response_format.of", "not known"),
        ({"regex": "a", "guided_choice": ["a"]}, "regex", "together with 'guided_choice'"),
        (
            {"regex": "a", "response_format": TAG | FORMAT},
            "response_format",
            "together with 'regex'",
        ),
        ({"response_format": TAG}, "response_format.structures", "required"),
        (
            {"response_format": TAG | STRUCTURES | {"triggers": ["<g>"]}},
            "response_format.structures[0].begin",
            "none of the triggers",
        ),
        (
            {"structural_tag": {"format": {"type": "regex", "pattern": "a("}}},
            "structural_tag.format.pattern",
            "character 2",
        ),
        (
            {
                "structured_outputs": {
                    "structural_tag": {"format": {"type": "json_schema", "json_schema": wrong}}
                }
            },
            "structured_outputs.structural_tag.format.json_schema.properties.b",
            "str",
        ),
        ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag", "not JSON"),
        ({"structural_tag": 7}, "structural_tag", "must be an object"),
        (
            {"regex": "a", "guided_whitespace_pattern": " "},
            "guided_whitespace_pattern",
            "needs 'guided_json'",
        ),
        ({"guided_json": {}, "guided_whitespace_pattern": "("}, "guided_json", "unclosed"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1 item,"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "at least 1 character,"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar", "at least 1"),
        ({"structured_outputs": {"json": ""}}, "structured_outputs.json", "not JSON"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": "", "disable_any_whitespace": True}},
            "structured_outputs.whitespace_pattern",
            "with 'disable_any_whitespace'",
        ),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "with a grammar"),
        ({"regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids", "with a grammar"),
    ]
    for fields, field, said in cases:
        param, _, message = await refused(running, **fields)
        assert (param, said in message) == (field, True), (fields, param, message)


async def test_many_small_bodies_with_grammars_wait_for_their_turn(start: Start) -> None:
    """More than may of large ones."""
    running = await start()

    async def one(number: int) -> int:
        body = {"prompt": "x", "regex": f"a{{{number + 1}}}"}
        async with running.http.post(f"{running.url}/v1/completions", json=body) as response:
            return response.status

    assert set(await asyncio.gather(*map(one, range(70)))) == {200}


@pytest.mark.holds_the_loop("the official client makes a type for what it is to parse")
async def test_the_official_client_parses_into_a_model(start: Start) -> None:
    running = await start()

    class Answer(BaseModel):
        a: int

    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x") as client:
        with pytest.raises(ValueError, match="JSON"):  # what the fake engine says is none
            await client.chat.completions.parse(
                model=MODEL, messages=[{"role": "user", "content": "x"}], response_format=Answer
            )
    (submitted,) = running.backend.submitted
    grammar = submitted.params.grammar
    assert grammar is not None
    assert json.loads(grammar.text)["required"] == ["a"]


@pytest.mark.parametrize("changes", [{"model_eos_token_ids": ()}, {"model_eos_token_ids": (700,)}])
def test_a_model_without_an_end_cannot_be_guided(changes: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="no token is known to end"):
        grammar_of(changes=changes, regex="a")


def test_nothing_is_compiled_before_a_grammar_comes() -> None:
    reader = GrammarReader(ApiSettings("x", 64, 512, "0"), sample_text())
    assert "_checker" not in vars(reader)
