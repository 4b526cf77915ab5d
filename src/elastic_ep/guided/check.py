"""Is a grammar one that ranks can follow? Asked where it may take its time: see gateway/text_process.py."""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher

from elastic_ep.guided.grammars import LIMITS, BadGrammar, to_lark
from elastic_ep.guided.vocabulary import Vocabulary
from elastic_ep.wire.messages import Grammar, GrammarKind

MAX_CPU_S = 1.0
"""To compile it, and for the first mask; a rank does so beside its steps, but needs a processor for it."""
_KEPT = 256
_MOST_PLACES = 200
"""Of a schema: so many parts are looked at to find the one that is wrong,"""
_SEARCH_CPU_S = 2.0
"""and no longer than this: each is compiled, and others wait."""
_LONGEST = 300
_AT = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)")
_REGEX_ERROR = re.compile(r"regex parse error:\n    (.*)\n    ( *)\^+\nerror: (.*)")
_DEFINITIONS = ("$defs", "definitions")


class GrammarChecker:
    """Remembers what it has checked. One thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokenizer = vocabulary.tokenizer()
        self._known: OrderedDict[Grammar, BadGrammar | None] = OrderedDict()

    def check(self, grammar: Grammar) -> None:
        """Raises `BadGrammar`."""
        if grammar in self._known:
            self._known.move_to_end(grammar)
        else:
            self._known[grammar] = self._fault(grammar)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        if (fault := self._known[grammar]) is not None:
            raise BadGrammar(str(fault), fault.place)

    def _fault(self, grammar: Grammar) -> BadGrammar | None:
        began = time.thread_time()
        matcher = LLMatcher(self._tokenizer, to_lark(grammar), log_level=0, limits=LIMITS)
        if matcher.is_error():
            return self._explained(grammar, matcher.get_error())
        if not _can_begin(matcher):
            return BadGrammar("leaves no text that the model could begin with")
        if time.thread_time() - began > MAX_CPU_S:
            return BadGrammar("takes too long to compile: make it smaller")
        return None

    def _explained(self, grammar: Grammar, error: str) -> BadGrammar:
        match grammar.kind:
            case GrammarKind.JSON_SCHEMA:
                return self._of_schema(json.loads(grammar.text)) or BadGrammar(_first_line(error))
            case GrammarKind.REGEX:
                return BadGrammar(_of_regex(error) or _first_line(error))
        if at := _AT.match(error):
            line, column, what = at.groups()
            return BadGrammar(f"{_of_regex(error) or _cut(what)}, at line {int(line) - 1}, column {column}")
        return BadGrammar(_first_line(error))

    def _of_schema(self, schema: dict[str, Any]) -> BadGrammar | None:
        """The smallest part of the schema that is refused by itself in the same words."""
        message = self._refusal(schema)
        if not message:
            return None
        found = ""
        shared = {name: schema[name] for name in _DEFINITIONS if name in schema}
        began = time.thread_time()
        for count, (place, part) in enumerate(_parts(schema, "")):
            if count >= _MOST_PLACES or time.thread_time() - began > _SEARCH_CPU_S:
                break
            if len(place) > len(found) and self._refusal({**shared, **part}) == message:
                found = place
        return BadGrammar(_of_regex(message) or _first_line(message), found)

    def _refusal(self, schema: dict[str, Any]) -> str:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        refused, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer, limits=LIMITS)
        return messages[0] if refused else ""


def _parts(node: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All objects within a schema, outer ones first. What is no schema (a list of properties) is accepted, as it says
    nothing."""
    if isinstance(node, dict):
        if place:
            yield place, node
        for name, inner in node.items():
            yield from _parts(inner, f"{place}.{name[:40]}")
    elif isinstance(node, list):
        for index, inner in enumerate(node):
            yield from _parts(inner, f"{place}[{index}]")


def _of_regex(error: str) -> str:
    """In one line; empty if it is not about a pattern."""
    found = _REGEX_ERROR.search(error)
    return f"{_cut(found[3])}, at character {len(found[2]) + 1} of the pattern" if found else ""


def _first_line(error: str) -> str:
    at = _AT.match(error)
    return _cut(re.split(r"\n", at[3] if at else error, maxsplit=1)[0])


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _can_begin(matcher: LLMatcher) -> bool:
    """Whether any text follows its grammar, as far as the first token shows."""
    matcher.compute_bitmask()
    return not matcher.is_error()
