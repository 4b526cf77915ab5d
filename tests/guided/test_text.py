"""Masks against trying every token, replaying against stepping, and finished texts against what was asked for."""

from __future__ import annotations

import json
import random
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from elastic_ep.gateway.guided import certain_arguments, certain_calls
from elastic_ep.guided import grammars
from elastic_ep.guided.grammars import LIMITS, to_lark
from elastic_ep.guided.masks import Asked, MaskMaker
from elastic_ep.guided.shared import Guide
from elastic_ep.guided.structural_tags import structural_tag
from elastic_ep.guided.text import GuidedText
from elastic_ep.guided.vocabulary import Vocabulary
from elastic_ep.wire.messages import Grammar
from tests.kit.bound import run
from tests.kit.guided_asks import guided_and_calls
from tests.kit.schemas import is_valid, schemas

END, OTHER_END, TAG = 0, 1, 2
_WORDS = [b'{"', b'": ', b'":', b'", "', b'"}', b"}", b"]", b"ab", b"abb", b"true", b"null", b"12", b"  ", b"\xc3\xa9",
          b"\xc3", b"\xa9\"", b"ab", b"\n   ", b"<tag>"]  # fmt: skip
VOCABULARY = Vocabulary(
    (b"<end>", b"<other>", b"<tag>", *[bytes([byte]) for byte in range(256)], *_WORDS, b"", b""),
    special=(END, OTHER_END, TAG),
    ends=(END,),
)
"""All bytes, tokens over the borders of JSON and of characters, the same text twice, and ids without a text."""
SIZE = len(VOCABULARY.tokens)


@cache
def tokenizer() -> LLTokenizer:
    return VOCABULARY.tokenizer()


def begun(grammar: Grammar, ends: tuple[int, ...] = ()) -> GuidedText:
    matcher = LLMatcher(tokenizer(), to_lark(grammar), log_level=0, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    return GuidedText(matcher, ends)


def mask(text: GuidedText) -> list[int]:
    words = np.zeros(VOCABULARY.mask_words, np.uint32)
    text.mask_into(words)
    assert not text.fault
    return [int(token) for token in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]


def by_trying(grammar: Grammar, tokens: list[int]) -> list[int]:
    """Every token of the vocabulary, each after a fresh start."""
    matcher = LLMatcher(tokenizer(), to_lark(grammar), log_level=0, limits=LIMITS)
    assert not tokens or matcher.consume_tokens(tokens)
    return [token for token in range(SIZE) if matcher.deep_copy().consume_token(token)]


def spelled(tokens: list[int]) -> str:
    return b"".join(VOCABULARY.tokens[token] for token in tokens if token != END).decode()


def walk(grammar: Grammar, seed: int, most: int = 200) -> list[int]:
    """A text at random, by masks alone; as long as it must be once it has 40 tokens."""
    draw, text, tokens = random.Random(seed), begun(grammar), list[int]()
    while len(tokens) < most:
        may = mask(text)
        tokens.append(END if END in may and len(tokens) > 40 else draw.choice(may))
        if tokens[-1] == END:
            break
        text.follow(tokens)
    return tokens


GRAMMARS = {
    "regex": grammars.regex("[ab]{1,4}(-[0-9]{2}|é+)"),
    "choice": grammars.choice(["ab", "abb", 'a"b\\', "é", "\x7f\n"]),
    "ebnf": grammars.ebnf('root ::= "a" item* "b"\nitem ::= [0-9] | "(" item ")"'),
    "object": grammars.json_object(),
    "schema": grammars.json_schema({"type": "object", "properties": {"ab": {"enum": ["é", 12, None]}}}),
    "compact": grammars.json_schema({"type": "array", "items": {"type": "boolean"}}, compact=True),
    "tag": grammars.lark(f"start: {grammars.literal('<tag>ab', {'<tag>': TAG})} {grammars.json_rule(True)}"),
    "tags": structural_tag(
        {"triggers": ["ab", "<tag>"], "structures": [
            {"begin": "abb", "schema": {"type": "integer"}, "end": "}"}, {"begin": "<tag>", "schema": True, "end": ""}
        ]},
        {"<tag>": TAG},
    ).grammar,
}  # fmt: skip


@pytest.mark.parametrize("name", GRAMMARS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.floats(0, 1))
def test_a_mask_is_all_tokens_that_can_come_next(name: str, seed: int, cut: float) -> None:
    tokens = walk(GRAMMARS[name], seed, most=60)
    tokens = tokens[: round(cut * (len(tokens) - 1))]
    text = begun(GRAMMARS[name])
    text.follow(tokens)
    assert mask(text) == by_trying(GRAMMARS[name], tokens)


@settings(max_examples=40, deadline=None)
@given(schemas, st.integers(0, 2**32), st.booleans())
def test_a_finished_text_fits_its_schema_and_replayed_is_as_stepped(
    schema: dict[str, Any], seed: int, compact: bool
) -> None:
    grammar = grammars.json_schema(schema, compact=compact)
    tokens = walk(grammar, seed)
    if tokens[-1] == END:
        assert is_valid(spelled(tokens), schema), spelled(tokens)
    assert not compact or not re.search(r"[\n\t]", spelled(tokens))
    at = random.Random(seed).randrange(len(tokens))
    stepped, replayed = begun(grammar), begun(grammar)
    for end in range(at + 1):
        stepped.follow(tokens[:end])
        mask(stepped)
    replayed.follow([7, 7, *tokens[:at]], 2)
    assert mask(stepped) == mask(replayed)


@pytest.mark.parametrize("place", range(6))
def test_what_benches_ask_for_is_valid_when_it_is_complete_and_not_before(place: int) -> None:
    """Without blanks, which have no end where the request does not bound them."""
    ask = guided_and_calls(6)[place]
    for seed in range(4):
        draw, text, tokens = random.Random(seed), begun(_grammar(ask.fields)), list[int]()
        while not tokens or tokens[-1] != END:
            may = mask(text)
            tokens.append(draw.choice([each for each in may if each == END or 35 < each < 130] or may))
            text.follow(tokens[:-1] if tokens[-1] == END else tokens)
        assert ask.valid(_answer(ask.fields, spelled(tokens)))
        with pytest.raises((ValueError, AssertionError)):
            assert ask.valid(_answer(ask.fields, spelled(tokens[:-2])))


def _grammar(fields: dict[str, Any]) -> Grammar:
    if "tools" in fields:
        functions = [tool["function"] for tool in fields["tools"]]
        if fields["tool_choice"] == "required":
            return certain_calls(functions, several=False)
        return certain_arguments(functions[0])
    if "regex" in fields:
        return grammars.regex(fields["regex"])
    if "structured_outputs" in fields:
        return grammars.choice(fields["structured_outputs"]["choice"])
    return grammars.json_schema(fields["response_format"]["json_schema"]["schema"], whitespace=" ?")


def _answer(fields: dict[str, Any], text: str) -> str:
    """As the kit tells calls."""
    if "tools" not in fields:
        return text
    if fields["tool_choice"] == "required":
        return json.dumps([[call["name"], json.dumps(call["arguments"])] for call in json.loads(text)])
    return json.dumps([[fields["tool_choice"]["function"]["name"], text]])


@pytest.mark.parametrize("seed", range(6))
def test_finished_texts_match(seed: int) -> None:
    assert re.fullmatch("[ab]{1,4}(-[0-9]{2}|é+)", spelled(walk(GRAMMARS["regex"], seed)))
    assert spelled(walk(GRAMMARS["choice"], seed)) in ["ab", "abb", 'a"b\\', "é", "\x7f\n"]
    assert isinstance(json.loads(spelled(walk(GRAMMARS["object"], seed, most=400))), dict)


def test_when_it_is_complete_it_ends_by_any_token_that_may_end_it() -> None:
    text = begun(grammars.regex("ab"), (OTHER_END,))
    assert END not in mask(text)
    assert OTHER_END not in mask(text)
    text.follow([VOCABULARY.tokens.index(b"ab")])
    assert mask(text) == [END, OTHER_END]


def test_special_tokens_come_where_the_grammar_names_them_alone() -> None:
    assert mask(begun(GRAMMARS["tag"])) == [TAG]
    assert TAG not in mask(begun(grammars.regex(".*")))


def test_a_text_that_has_left_its_grammar_says_so_and_nothing_of_itself() -> None:
    text = begun(grammars.regex("secret"))
    text.follow([3 + ord("x")])
    assert "cannot be continued" in text.fault
    assert not re.search("secret|x'", text.fault)
    text.mask_into(np.zeros(VOCABULARY.mask_words, np.uint32))  # means nothing, and does no harm


def test_a_vocabulary_with_which_it_cannot_go_on_is_noticed() -> None:
    poor = Vocabulary((b"<end>", b"a"), special=(0,), ends=(0,))
    text = GuidedText(LLMatcher(poor.tokenizer(), to_lark(grammars.regex("ab")), log_level=0, limits=LIMITS))
    words = np.zeros(1, np.uint32)
    text.mask_into(words)
    assert words[0] == 0b10
    assert not text.fault
    text.follow([1])
    text.mask_into(words)
    assert text.fault


@pytest.mark.parametrize("beside", [True, False])
def test_masks_of_many_texts_are_those_of_each(beside: bool) -> None:
    maker = MaskMaker(Guide.of(VOCABULARY), beside=beside)
    try:
        texts = [
            maker.open(grammar, (), stops=(END,)).result(10)
            for grammar in GRAMMARS.values()
            for _ in range(2)
        ]
        tokens = [walk(grammar, 3, most=9)[:-1] for grammar in GRAMMARS.values() for _ in range(2)]
        words = np.zeros((len(texts), maker.words), np.uint32)
        maker.start(
            [
                Asked(text, [5, *said], 1, row)
                for row, (text, said) in enumerate(zip(texts, tokens, strict=True))
            ],
            words,
        )
        assert beside or not words.any(), "not before they are waited for"
        maker.wait()
        for row, grammar in enumerate(grammar for grammar in GRAMMARS.values() for _ in range(2)):
            alone = begun(grammar)
            alone.follow(tokens[row])
            single = np.zeros(maker.words, np.uint32)
            alone.mask_into(single)
            assert (words[row] == single).all()
    finally:
        maker.close()


def test_the_vocabulary_travels_in_a_file(tmp_path: Path) -> None:
    assert Vocabulary.read(tmp_path) is None
    VOCABULARY.write(tmp_path)
    assert Vocabulary.read(tmp_path) == VOCABULARY


def test_the_fork_server_makes_what_ranks_need_and_no_thread(tmp_path: Path) -> None:
    VOCABULARY.write(tmp_path)
    code = f"""
import os
from pathlib import Path
from elastic_ep.guided.shared import shared
from elastic_ep.host.fork_server import preload
preload(("elastic_ep.guided.shared",), Path({str(tmp_path)!r}))
assert len(os.listdir("/proc/self/task")) == 1
os.remove({str(tmp_path / "vocabulary")!r})
assert shared(Path({str(tmp_path)!r})).words == {VOCABULARY.mask_words}
assert shared(Path("/nowhere")) is None
"""
    assert run([sys.executable, "-c", code], 60).returncode == 0
