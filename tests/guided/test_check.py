"""What is refused, and where in it the fault is said to be."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from typing import Any

import pytest

from elastic_ep.guided import check, grammars
from elastic_ep.guided.check import GrammarChecker
from elastic_ep.guided.grammars import BadGrammar
from elastic_ep.wire.messages import Grammar, GrammarKind
from tests.guided.test_text import TAG, VOCABULARY, begun, by_trying


@cache
def checker() -> GrammarChecker:
    return GrammarChecker(VOCABULARY)


def fault(grammar: Grammar) -> BadGrammar:
    with pytest.raises(BadGrammar) as raised:
        checker().check(grammar)
    return raised.value


@pytest.mark.parametrize(
    ("schema", "place", "said"),
    [
        ({"properties": {"a": {"type": "text"}}}, ".properties.a", "type: text"),
        ({"items": {"anyOf": [{}, {"not": {}}]}}, ".items.anyOf[1]", '["not"]'),
        ({"properties": {"a": {"pattern": "x(", "type": "string"}}}, ".properties.a", "character 2 of the pattern"),
        ({"$ref": "#/$defs/b"}, "", "/$defs/b"),
        ({"$defs": {"b": {"type": 7}}, "properties": {"c": {"$ref": "#/$defs/b"}}}, ".properties.c", "type"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "", "'a' is unsatisfiable"),
        (False, "", "Unsatisfiable"),
    ],
)  # fmt: skip
def test_the_part_of_a_schema_that_is_wrong(schema: Any, place: str, said: str) -> None:
    error = fault(grammars.json_schema(schema))
    assert (error.place, said in str(error)) == (place, True), (error.place, str(error))
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"items": {"type": "integer", "minimum": 2**53 + 1}}, ".items.minimum"),
        ({"minimum": -1e30, "maximum": -1e29}, ".maximum"),
        ({"type": "number", "multipleOf": 2**60}, ".multipleOf"),
        ({"properties": {"const": {"const": {"a": [-(2**63)]}}}}, ".properties.const.const"),
        ({"anyOf": [{"enum": ["x", 2**64]}]}, ".anyOf[0].enum"),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, ".exclusiveMinimum"),
        ({"exclusiveMaximum": -1, "exclusiveMinimum": -1.5}, ".exclusiveMaximum"),
        ({"minimum": 1, "exclusiveMinimum": True, "maximum": 1.5}, ".exclusiveMinimum"),
        ({"required": ["a"], "minProperties": 3}, ".minProperties"),
    ],
)  # fmt: skip
def test_what_would_not_be_kept_is_refused(schema: Any, place: str) -> None:
    with pytest.raises(BadGrammar) as raised:
        grammars.json_schema(schema)
    assert raised.value.place == place


def test_a_range_of_64_bits_is_as_wide_as_whole_numbers_are_exact() -> None:
    given = {
        "type": "object",
        "properties": {
            "maximum": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
            "list": {"items": {"anyOf": [{"type": "number", "exclusiveMaximum": 1.7e308, "minimum": 0}]}},
        },
        "default": {"maximum": 1e300},
    }
    grammar = grammars.json_schema(given)
    checker().check(grammar)
    found = json.loads(grammar.text)
    assert found["properties"]["maximum"] == {"type": "integer", "minimum": -(2**53), "maximum": 2**53}
    assert found["properties"]["list"]["items"]["anyOf"][0]["exclusiveMaximum"] == 2**53
    assert found["default"] == given["default"]


_ENDS = (-1, -0.5, -0.001, 0, 0.001, 0.5, 1, 1.5, 2)


@pytest.mark.parametrize("least", ["minimum", "exclusiveMinimum"])
@pytest.mark.parametrize("most", ["maximum", "exclusiveMaximum"])
def test_no_number_that_is_left_out_follows(least: str, most: str) -> None:
    taken = 0
    for low, high in itertools.combinations(_ENDS, 2):
        try:
            grammar = grammars.json_schema({"type": "number", least: low, most: high}, compact=True)
        except BadGrammar:
            continue
        taken += 1
        for end, name in ((low, least), (high, most)):
            if name.startswith("exclusive"):
                text, matcher = f"{end}".encode(), begun(grammar).matcher
                begins = matcher.try_consume_tokens([3 + byte for byte in text]) == len(text)
                assert not (begins and matcher.is_accepting()), (low, high, text)
    assert taken > 25


def test_numbers_that_are_exact_and_names_that_are_no_bounds_are_taken() -> None:
    for schema in (
        {"enum": [2**53, -(2**53), 0.1]},
        {"properties": {"minimum": {"const": 1}, "enum": {"type": "null"}}, "default": 1e300},
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 0.5 + 3},
        {"required": ["a", "b"], "minProperties": 3},
        {"type": "object", "minProperties": 1},
    ):
        checker().check(grammars.json_schema(schema))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("ab(c", "unclosed group, at character 3"), ("a(?=b)", "look-around.*character 2"), ("(a)\\1", "character 4")],
)  # fmt: skip
def test_the_character_of_a_pattern_that_is_wrong(pattern: str, said: str) -> None:
    assert re.search(said, str(fault(grammars.regex(pattern))))


def test_any_character_may_be_of_a_choice() -> None:
    texts = [f"a{chr(code)}b" for code in (*range(1, 256), 0x2028, 0x1F642)]
    checker().check(grammars.choice(texts))


def test_the_line_of_a_grammar_that_is_wrong() -> None:
    assert re.search(
        "unknown name.*at line 2, column 4", str(fault(grammars.lark('start: a\na: "x" nobody')))
    )
    with pytest.raises(BadGrammar, match="Rule 'b' not found"):
        grammars.ebnf('root ::= "a" b')
    with pytest.raises(BadGrammar, match="line 1"):
        grammars.ebnf("root = x")


@pytest.mark.parametrize("text", ['start: start "a"', "start: X\nX: /x/ & /y/"])
def test_what_no_text_follows_is_refused(text: str) -> None:
    assert "leaves no text" in str(fault(grammars.lark(text)))


@pytest.mark.parametrize("before", ["", "\n", "\n  ", " \t"])
@pytest.mark.parametrize("between", ["", " ", "\n", "\r\n\n ", " // {}\n"])
@pytest.mark.parametrize("options", ['{"no_forcing": false}', '{ "x": 1 }', '{\n"no_forcing": false}'])
@pytest.mark.parametrize("after", ["", "\n"])
def test_options_are_not_taken_from_clients(before: str, between: str, options: str, after: str) -> None:
    rules = 'start: "a"'
    for text in (
        f"{before}%llguidance{between}{options}\n{rules}",
        f"{rules}\n{before}%llguidance{between}{options}{after}",
    ):
        with pytest.raises(BadGrammar, match="options"):
            grammars.ebnf(text)


def test_no_options_are_none() -> None:
    for text in ('%llguidance {}\nstart: "a"', 'start: "a"\n%llguidance\n{ }'):
        checker().check(grammars.ebnf(text))


def test_options_of_a_schema_are_not_taken_from_clients() -> None:
    with pytest.raises(BadGrammar) as raised:
        grammars.json_schema({"x-guidance": {"lenient": True}})
    assert raised.value.place == ".x-guidance"


def test_a_grammar_has_a_size_and_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadGrammar, match="70000 characters"):
        grammars.regex("a" * 70_000)
    with pytest.raises(BadGrammar, match="rules"):
        grammars.ebnf("".join(f'r{index} ::= "a"\n' for index in range(501)))
    monkeypatch.setattr(check, "MAX_CPU_S", 0.0)
    with pytest.raises(BadGrammar, match="too long"):
        GrammarChecker(VOCABULARY).check(grammars.regex("abc"))


def test_the_place_of_a_fault_is_looked_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"properties": {f"p{index}": {"type": "text"} for index in range(50)}}
    assert fault(grammars.json_schema(schema)).place.startswith(".properties.p")
    monkeypatch.setattr(check, "_SEARCH_CPU_S", 0.0)
    with pytest.raises(BadGrammar, match="type: text") as raised:
        GrammarChecker(VOCABULARY).check(grammars.json_schema(schema))
    assert raised.value.place == ""


def test_what_was_checked_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = grammars.regex("remembered"), grammars.regex("(")
    checker().check(good)
    first = fault(bad)
    monkeypatch.setattr(checker(), "_fault", lambda grammar: pytest.fail("compiled again"))
    checker().check(good)
    assert str(fault(bad)) == str(first)


def test_fixed_and_free_parts_make_a_rule() -> None:
    special = {"<tag>": TAG}
    call = (
        f"{grammars.literal('<tag>{', special)} {grammars.json_rule({'enum': [12]})} {grammars.literal('}')}"
    )
    grammar = Grammar(GrammarKind.LARK, f"start: ({call})+")
    checker().check(grammar)
    at = {byte: 3 + byte for byte in range(256)}
    tokens = [TAG, at[ord("{")], at[ord("1")], at[ord("2")], at[ord("}")]]
    for end, token in enumerate(tokens):
        assert token in by_trying(grammar, tokens[:end])
    assert by_trying(grammar, tokens) == [0, TAG], "it may end, or another call begins"
    assert json.loads(grammars.choice(["é"]).text) == ["é"]
