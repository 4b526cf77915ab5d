"""What clients give becomes a `Grammar`, and a `Grammar` what llguidance compiles. Nothing here knows a vocabulary.

Whoever wants a text of fixed and free parts (calls of tools, say) writes a rule of them in Lark:

    call = f"{literal('<tool_call>', special)} {json_rule(schema)} {literal('</tool_call>', special)}"
    Grammar(GrammarKind.LARK, f"start: ({call})+")

`special` are the tokenizer's special tokens by name: they are no text to a grammar, only themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLParserLimits, regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from elastic_ep.guided import exactness
from elastic_ep.wire.messages import Grammar, GrammarKind

MAX_CHARACTERS = 64 << 10
"""Of a grammar. Compiling takes time, and every rank that gets the request does it again."""
MAX_RULES = 500
"""Of one in EBNF: turning it into Lark takes the square of it."""
LIMITS = LLParserLimits(verbose_errors=False, max_lexer_states=50_000)
"""HAZARD: verbose errors hold the grammar and the text, which are the client's."""
HEADER = '%llguidance {"no_forcing": true}\n'
"""HAZARD: otherwise, where only one text can follow, its usual tokens are forced: a mask would depend on a tokenizer,
and masks would not be all that may come."""
WHITESPACE = r"( |\r?\n[ \t]{0,40})?"
"""Between the parts of a JSON text: a blank, or a new line, indented or not. With more a model at a loss would go on
with blanks until its tokens are used up."""
_OPTIONS = "x-guidance"
_HEADERS = re.compile(r"^[ \t]*%llguidance\b(?!\s*\{\s*\}\s*$)", re.MULTILINE)
"""One with options, wherever they are: they need not stand on its line."""


class BadGrammar(ValueError):
    """No text can be made to follow it, for the reason that the message says. `place` is where in it, as in
    ".properties.age"; empty where the message says that, or it is the whole."""

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(message)
        self.place = place


def json_schema(schema: Any, *, whitespace: str | None = None, compact: bool = False) -> Grammar:
    """`schema` is an object or true. `whitespace` is a pattern; `compact`: there is none. Raises `BadGrammar`."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise BadGrammar("must be an object")
    if _OPTIONS in schema:
        raise BadGrammar("is not taken from clients", f".{_OPTIONS}")
    schema = _exact(schema)
    pattern = "" if compact else WHITESPACE if whitespace is None else whitespace
    options = {"whitespace_pattern": pattern} if pattern else {"whitespace_flexible": False}
    try:
        text = json.dumps({**schema, _OPTIONS: options}, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise BadGrammar(f"is not JSON: {error}") from error
    return Grammar(GrammarKind.JSON_SCHEMA, _short(text))


def _exact(schema: dict[str, Any]) -> dict[str, Any]:
    """Raises `BadGrammar`."""
    try:
        nearer: dict[str, Any] = exactness.drawn_in(schema)
        fault = next(exactness.faults(nearer), None)
    except RecursionError as error:
        raise BadGrammar("is nested too deeply") from error
    if fault is not None:
        raise BadGrammar(*fault)
    return nearer


def parsed(schema: Any) -> Any:
    """Of a schema as a client gives it: its JSON as a string will do, too. Raises `BadGrammar`."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise BadGrammar(f"is not JSON: {error}") from error


def json_object() -> Grammar:
    """Any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> Grammar:
    """The whole text matches. Raises `BadGrammar`."""
    return Grammar(GrammarKind.REGEX, _short(pattern))


def choice(texts: Sequence[str]) -> Grammar:
    """Raises `BadGrammar`."""
    if not texts:
        raise BadGrammar("must not be empty")
    return Grammar(GrammarKind.CHOICE, _short(json.dumps(list(texts), ensure_ascii=False)))


def ebnf(text: str) -> Grammar:
    """EBNF, as GBNF and xgrammar write it, or Lark. Raises `BadGrammar`."""
    if _short(text).count("::=") > MAX_RULES:
        raise BadGrammar(f"has more than {MAX_RULES} rules")
    try:
        text = any_to_lark(text)
    except GbnfToLarkError as error:
        raise BadGrammar(f"is not EBNF: {error}") from error
    except (Exception, RecursionError) as error:  # it raises bare ones, too
        raise BadGrammar(f"is not EBNF: {error or type(error).__name__}") from error
    return lark(text)


def lark(text: str) -> Grammar:
    """Raises `BadGrammar`."""
    if _HEADERS.search(text):
        raise BadGrammar("sets options with %llguidance, which are not taken from clients")
    return Grammar(GrammarKind.LARK, _short(text))


def literal(text: str, special: Mapping[str, int] | None = None) -> str:
    """Of a rule in Lark: exactly this text; where the name of a special token stands in it, that token."""
    known = special or {}
    names = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True) if name)
    parts = [part for part in re.split(f"({names})", text) if part] if names else [text]
    return " ".join(f"<[{known[part]}]>" if part in known else _quoted(part) for part in parts) or _quoted("")


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """Of a rule in Lark: a JSON text that fits the schema. Raises `BadGrammar`."""
    return f"%json {json_schema(schema).text}"


def to_lark(grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            body = f"start: %json {grammar.text}"
        case GrammarKind.REGEX:
            body = f"start: /{regex_to_lark(grammar.text)}/" if grammar.text else 'start: ""'
        case GrammarKind.CHOICE:
            body = "start: " + " | ".join(map(_quoted, json.loads(grammar.text)))
        case GrammarKind.LARK:
            body = grammar.text
    return HEADER + body


def _quoted(text: str) -> str:
    """HAZARD: in ASCII, as a raw DEL is no character of a string in Lark."""
    return json.dumps(text)


def _short(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise BadGrammar(f"comes to {len(text)} characters, and may have {MAX_CHARACTERS}")
    return text
