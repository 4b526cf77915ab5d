"""Which texts follow a structural tag, by trying all short ones and by examples; and what is refused, with its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llguidance import LLMatcher

from elastic_ep.guided import grammars
from elastic_ep.guided.grammars import LIMITS, BadGrammar, to_lark
from elastic_ep.guided.structural_tags import structural_tag
from tests.guided.test_text import TAG, tokenizer

INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}
ANY = {"type": "any_text"}
SPECIAL = {"<tag>": TAG}


def tag(begin: str, content: dict[str, Any], end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def triggered(*triggers: str, tags: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"type": "triggered_tags", "triggers": list(triggers), "tags": tags, **more}


def sequence(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def fixed(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}


def begun(given: dict[str, Any]) -> LLMatcher:
    matcher = LLMatcher(
        tokenizer(), to_lark(structural_tag(given, SPECIAL).grammar), log_level=0, limits=LIMITS
    )
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def ids(text: str) -> list[int]:
    """One for a byte, and the special token."""
    parts = [[3 + byte for byte in part.encode()] for part in text.split("<tag>")]
    return parts[0] + [token for part in parts[1:] for token in (TAG, *part)]


def follows(given: dict[str, Any], text: str) -> bool | None:
    """Whether it may end here; None: it cannot come to this."""
    matcher, tokens = begun(given), ids(text)
    return matcher.is_accepting() if matcher.try_consume_tokens(tokens) == len(tokens) else None


def expected(text: str) -> bool | None:
    """Of free text with the triggers "<a", behind which comes "bc", and "ab", behind which comes "x"."""
    while met := [
        (text.index(one) + len(one), then) for one, then in (("<a", "bc"), ("ab", "x")) if one in text
    ]:
        end, then = min(met)
        text = text[end:]
        if not text.startswith(then):
            return False if then.startswith(text) else None
        text = text.removeprefix(then)
    return True


def all_texts(matcher: LLMatcher, text: str, longest: int) -> Iterator[tuple[str, bool | None]]:
    """Whatever can come and the first that cannot."""
    yield text, matcher.is_accepting()
    for letter in "<abcx" if len(text) < longest else "":
        further = matcher.deep_copy()
        if further.try_consume_tokens(ids(letter)):
            yield from all_texts(further, text + letter, longest)
        else:
            yield text + letter, None


def test_free_text_goes_on_up_to_the_first_trigger() -> None:
    tags = [tag("<ab", fixed("c"), ""), tag("ab", fixed(""), "x")]
    matcher = begun({"type": "structural_tag", "format": triggered("<a", "ab", tags=tags)})
    found = dict(all_texts(matcher, "", 6))
    assert found == {text: expected(text) for text in found}
    assert len(found) > 5000


OLDER = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": '{"enum": ["x"]}', "end": "</f>"},
    ],
    "triggers": ["<f="],
}
BRACES = triggered("{", tags=[tag("{", INTEGER, "}")])
PLACE: dict[str, Any] = {
    "city": {"type": "string"},
    "n": {"type": "integer"},
    "unit": {"enum": ["C", "F", 0]},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "code": {"type": "string", "pattern": "^a+$", "maxLength": 3},
    "long": {"type": "string", "minLength": 13},
    "any": {},
    "of": {"$ref": "#/$defs/of"},
}
OF_A = ".content.json_schema.properties.a"
XML = "<f><parameter=city>x</parameter>"


def in_tags(style: str, more: dict[str, Any] | None = None, **properties: Any) -> dict[str, Any]:
    of = {"$defs": {"of": {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}}}
    schema = {"type": "object", "properties": properties} | (of if "of" in properties else {}) | (more or {})
    return tag("<f>", {"type": "json_schema", "json_schema": schema, "style": style}, "</f>")


def deepseek(name: str, value: str, text: bool) -> str:
    return f'<｜DSML｜parameter name="{name}" string="{str(text).lower()}">{value}</｜DSML｜parameter>'


TEXTS: list[tuple[dict[str, Any], list[str], list[str], list[str]]] = [
    (
        tag("<a>", ANY, "</a>"),
        ["<a>x</</a>"], ["<a>x</"], ["<a></a>d"],
    ),
    (
        tag("<a>", ANY, ["</a>", "</b>", ""]),
        ["<a>x</b>", "<a>x"], [], ["<a></a>d"],
    ),
    (
        tag("<a>", {"type": "any_text", "excludes": ["no"]}, "</a>"),
        ["<a>n</a>"], [], ["<a>no"],
    ),
    (
        sequence(tag("<a>", ANY, "</a>"), triggered("<tag>", tags=[tag("<tag>", INTEGER, "<tag>")])),
        ["<a>x</a>hello<tag>12<tag>more", "<a></a>"], ["<a></a>hello<tag>12"], ["<a></a><tag>x", "<tag>"],
    ),
    (
        tag("<tag>a", ANY, "<tag>b"),
        ["<tag>axx<tag>b"], ["<tag>axx<tag>"], ["<tag>axx<tag>c"],
    ),
    (
        tag("<", triggered("{", tags=[tag("{", INTEGER, "}")], excludes=["x"]), ">"),
        ["<a{1}b>", "<>"], ["<{1}"], ["<x", "<>>"],
    ),
    (
        triggered("{", tags=[tag("{", triggered("[", tags=[tag("[", INTEGER, "]")]), "}")]),
        ["a{b[1]}c[1", "a{}"], ["a{b[1]", "a{b[1"], ["{[x"],
    ),
    (BRACES, ["", "a{1}b{2}"], ["{"], ["{x"]),
    (BRACES | {"at_least_one": True}, ["{1}", "{1}a{2}"], [""], ["a"]),
    (BRACES | {"stop_after_first": True}, ["a", "a{1}"], [], ["{1}a"]),
    (BRACES | {"stop_after_first": True, "at_least_one": True}, ["{1}"], [""], ["a", "{1}a"]),
    (
        {"type": "tags_with_separator", "tags": [tag("[", INTEGER, "]")], "separator": ", "},
        ["", "[1]", "[1], [2]"], ["[1], "], ["[1][2]"],
    ),
    (
        {"type": "tags_with_separator", "tags": [tag("[", INTEGER, "]")], "separator": "", "at_least_one": True},
        ["[1]", "[1][2]"], [""], ["x"],
    ),
    (
        {"type": "tags_with_separator", "tags": [tag("[", INTEGER, "]")], "separator": ",", "stop_after_first": True},
        ["", "[1]"], [], ["[1],"],
    ),
    ({"type": "or", "elements": [INTEGER, fixed("no")]}, ["1", "no"], ["n"], ["x"]),
    (sequence({"type": "regex", "pattern": "(?s:.*)"}, fixed("px"), INTEGER), ["apx1", "px12"], ["apx"], ["apxx"]),
    (sequence(ANY, fixed("px")), ["apx"], ["ap"], ["apxq"]),
    (sequence(fixed(""), INTEGER), ["1"], [""], ["x"]),
    (tag("<", {"type": "regex", "pattern": "[a-z]*"}, ["z>", ">"]), ["<ab>", "<abz>", "<>"], ["<ab"], ["<1"]),
    (tag("<", {"type": "regex", "pattern": ".*"}, "<tag>"), ["<ab<tag>"], ["<ab"], ["<ab<tag>a"]),
    (
        tag("<", {"type": "grammar", "grammar": 'root ::= "a" r0\nr0 ::= "b" | "}"'}, ">"),
        ["<ab>", "<a}>"], ["<ab"], ["<b"],
    ),
    (
        in_tags("qwen_xml", {"required": ["city"]}, **PLACE),
        [
            f"{XML}</f>", "<f>\n<parameter=city>\na</param\n</parameter>\n<parameter=n>\n12\n</parameter>\n</f>",
            f"{XML}<parameter=unit>C</parameter></f>", f"{XML}<parameter=unit>\n0\n</parameter></f>",
            f"{XML}<parameter=maybe>null</parameter><parameter=code>aaa</parameter></f>",
            f"{XML}<parameter=maybe>nulls</parameter><parameter=any>[1,</parameter></f>",
            f"{XML}<parameter=any>[1]</parameter></f>", f"{XML}<parameter=any>{{\"</param\"</parameter></f>",
            XML + '<parameter=of>{"s": "</parameter>"}</parameter></f>',
        ],
        [XML, f"{XML}<parameter=n>1", f"{XML}<parameter=code>aa"],
        [
            "<f><parameter=n>", "<f></f>", f"{XML}<parameter=n>x", f"{XML}<parameter=unit>K", f"{XML}<parameter=x",
            f"{XML}<parameter=code>aaaa", f"{XML}<parameter=code>ab", f"{XML}<parameter=n>1</parameter><parameter=n",
            XML + '<parameter=of>{"s": 1', f"{XML}<parameter=long>a</parameter>",
        ],
    ),
    (
        {"type": "qwen_xml_parameter", "json_schema": {"properties": {"n": {"type": "integer"}}}},
        ["", "<parameter=n>1</parameter>"], ["<parameter=n>1"], ["<parameter=m", "<parameter=n>x"],
    ),
    (
        in_tags("minimax_xml", {"additionalProperties": {"type": "integer"}}, city={"type": "string"}),
        ['<f><parameter name="city">x</parameter><parameter name="m">2</parameter></f>', "<f></f>"],
        ['<f><parameter name="m">2</parameter>'], ['<f><parameter name="m">x', "<f>x"],
    ),
    (
        in_tags("deepseek_xml", {"required": ["maybe"]}, maybe=PLACE["maybe"]),
        [f"<f>{deepseek('maybe', 'null', False)}</f>", f"<f>{deepseek('maybe', 'null', True)}\n</f>"],
        [f"<f>{deepseek('maybe', 'x', True)}"], [f"<f>{deepseek('maybe', 'x', False)}", "<f></f>"],
    ),
    (
        in_tags("glm_xml", {"required": ["city"]}, city={"type": "string"}, n={"type": "integer"}),
        [
            "<f>\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n</f>",
            "<f><arg_key>city</arg_key><arg_value></arg_value><arg_key>n</arg_key><arg_value>1</arg_value></f>",
        ],
        ["<f><arg_key>city</arg_key>"], ["<f><arg_key>n"],
    ),
    (in_tags("qwen_xml", {"properties": {}}), ["<f><parameter=a>1</parameter></f>", "<f></f>"], ["<f>"], ["<f>x"]),
    (in_tags("qwen_xml", {"properties": {}, "additionalProperties": False}), ["<f></f>"], ["<f>"], ["<f><p"]),
]  # fmt: skip
"""A format; texts that may end, that may go on, and that cannot be."""


@pytest.mark.parametrize("case", range(len(TEXTS)))
def test_texts(case: int) -> None:
    form, complete, partial, wrong = TEXTS[case]
    given = {"type": "structural_tag", "format": form}
    for said, texts in ((True, complete), (False, partial), (None, wrong)):
        assert {text: follows(given, text) for text in texts} == dict.fromkeys(texts, said)


def test_the_older_form() -> None:
    assert follows(OLDER, 'hi<f=a>12</f> yo <f=b>"x"</f>')
    assert follows(OLDER, "hi <f") is True
    assert follows(OLDER, "hi <f=c") is None
    assert follows(OLDER, "<f=b>12") is None


def nested(depth: int) -> dict[str, Any]:
    return tag("<", nested(depth - 1), ">") if depth else ANY


@pytest.mark.parametrize(
    ("form", "place", "said"),
    [
        ({"type": "any_tokens"}, ".type", "none of those"),
        (INTEGER | {"style": "yaml"}, ".style", "json, qwen_xml"),
        (INTEGER | {"any_order": True}, ".any_order", "order of the schema"),
        (in_tags("qwen_xml", {"type": "string"}), ".content.json_schema.type", "by name"),
        (in_tags("qwen_xml", {"minProperties": 1}), ".content.json_schema.minProperties", "in this style"),
        (in_tags("qwen_xml", {"required": ["a"]}), ".content.json_schema.required[0]", "none of the"),
        (in_tags("qwen_xml", a={"type": "string", "format": "date"}), f"{OF_A}.format", "only in JSON"),
        (in_tags("qwen_xml", a={"$ref": "#/$defs/b"}), f"{OF_A}.$ref", "#/$defs/NAME"),
        (in_tags("qwen_xml", a={"oneOf": [{"type": "integer"}, {"type": "null"}]}), f"{OF_A}.oneOf", "anyOf"),
        (in_tags("deepseek_xml", a={"enum": []}), f"{OF_A}.enum", "not empty"),
        ({"type": "any_text", "of": 1}, ".of", "not known"),
        ({"type": "tag", "begin": 7, "content": ANY, "end": ""}, ".begin", "string"),
        (tag("<", ANY, {"type": "token"}), ".end", "string"),
        ({"type": "tag", "begin": "<", "content": ANY}, ".end", "required"),
        ({"type": "sequence", "elements": []}, ".elements", "empty"),
        ({"type": "sequence", "elements": "x"}, ".elements", "array"),
        (sequence(INTEGER, [ANY]), ".elements[1]", "object"),  # type: ignore[arg-type]
        (sequence(ANY, INTEGER), ".elements[0]", "nothing ends"),
        (tag("<", sequence(INTEGER | {"json_schema": 7}), ""), ".content.elements[0].json_schema", "object"),
        (sequence({"type": "grammar", "grammar": "root = x"}), ".elements[0].grammar", "line 1"),
        (triggered(tags=[tag("<", INTEGER, "")]), ".triggers", "empty"),
        (triggered("<", tags=[]), ".tags", "empty"),
        (triggered("", tags=[tag("<", ANY, "")]), ".triggers[0]", "empty"),
        (triggered("<", tags=[tag("[", INTEGER, "]")]), ".tags[0].begin", "none of the triggers"),
        (triggered("<", "<a", tags=[tag("<a", INTEGER, "]")]), ".tags[0].begin", "more than one"),
        (triggered("<", "[", tags=[tag("<", INTEGER, "]")]), ".triggers[1]", "none of the tags"),
        (triggered("<a", "a", tags=[tag("<a", INTEGER, "]"), tag("a", INTEGER, "")]), "", "never comes"),
        (tag("<", triggered("]", tags=[tag("]", INTEGER, "]")]), "]"), ".content", "never comes"),
        (triggered("<", tags=[tag("<", INTEGER, "]")], excludes=["<"]), "", "excluded"),
        (triggered("<", tags=[tag("<", ANY, "")]), ".tags[0].content", "nothing ends"),
        (triggered("a<tag>", tags=[tag("a<tag>", INTEGER, "")]), "", "special"),
        (triggered("<", tags=[tag("<", INTEGER, "")], at_least_one=1), ".at_least_one", "boolean"),
        ({"type": "regex", "pattern": "\ud800"}, ".pattern", "surrogate"),
        (nested(40), ".content" * 32, "nested"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_names_its_place(form: dict[str, Any], place: str, said: str) -> None:
    with pytest.raises(BadGrammar) as raised:
        structural_tag({"type": "structural_tag", "format": form}, SPECIAL)
    assert raised.value.place == f".format{place}"
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("x", ""),
        ({}, ".structures"),
        ({"type": "object", "format": ANY}, ".type"),
        ({"format": ANY, "triggers": []}, ".triggers"),
        (OLDER | {"structures": [{"begin": "<f=", "end": ""}]}, ".structures[0].schema"),
        (OLDER | {"structures": [{"begin": "<f=", "schema": "{", "end": ""}]}, ".structures[0].schema"),
        (OLDER | {"structures": [{"begin": "x", "schema": {}, "end": ""}]}, ".structures[0].begin"),
    ],
)
def test_what_is_wrong_with_the_whole_names_its_place(given: Any, place: str) -> None:
    with pytest.raises(BadGrammar) as raised:
        structural_tag(given)
    assert raised.value.place == place


def test_parts_are_told_with_their_places() -> None:
    form = sequence(tag("<", INTEGER, ">"), {"type": "regex", "pattern": "a("})
    tagged = structural_tag({"format": form})
    assert tagged.parts == (
        (".format.elements[0].content.json_schema", grammars.json_schema({"type": "integer"})),
        (".format.elements[1].pattern", grammars.regex("a(")),
    )


def test_a_bad_pattern_of_an_argument_is_told_with_its_place() -> None:
    tagged = structural_tag({"format": in_tags("qwen_xml", a={"type": "string", "pattern": "^a($"})})
    assert tagged.parts == ((f".format{OF_A}", grammars.regex("(?:a()")),)
