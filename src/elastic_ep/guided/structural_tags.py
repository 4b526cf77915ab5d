"""Structural tags, as vLLM's and SGLang's clients write them, become a grammar: free text up to a trigger, then what the
tag says, then free text again. No vocabulary but the names of special tokens.

Free text goes on up to the first of its stops: a trigger, or what ends the tag that it stands in. It holds no special
tokens: these come where a tag names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from llguidance import regex_to_lark

from elastic_ep.guided import grammars
from elastic_ep.guided.grammars import BadGrammar, literal
from elastic_ep.guided.parameters import NAME, STYLES, Parameter, Style, Text, parameters
from elastic_ep.wire.messages import Grammar

MOST_NESTED = 32
_ANY = "/(?s:.*)/"
_BLANK = r"/[ \n\t]{1,40}/"
"""Between arguments in tags, and around what is JSON in them; with more a model at a loss would go on with blanks."""


class TaggedText(NamedTuple):
    """`parts` of the grammar that can be wrong by themselves, each with its place in what was given."""

    grammar: Grammar
    parts: tuple[tuple[str, Grammar], ...]


class _After(NamedTuple):
    """What follows a part: one of `texts`. `last`: where that is "", the whole text may end."""

    texts: tuple[str, ...]
    last: bool


class _Tag(NamedTuple):
    begin: str
    content: Callable[[_After], str]
    ends: tuple[str, ...]
    place: str


_NOTHING = _After(("",), last=False)


def structural_tag(given: Any, special: Mapping[str, int] | None = None) -> TaggedText:
    """`given` has `format`, or `structures` and `triggers`. `special` tokens by name. Raises `BadGrammar`."""
    builder, end = _Builder(special or {}), _After(("",), last=True)
    node = _Node(given, "")
    if "format" in node.given:
        node.has_only("type", "format")
        start = builder.part(node.inner("format"), end)
    else:
        node.has_only("type", "structures", "triggers")
        start = builder.triggered(node, [builder.structure(one) for one in node.nodes("structures")], end)
    if node.given.get("type", "structural_tag") != "structural_tag":
        raise BadGrammar('must be "structural_tag"', ".type")
    text = "\n".join([f"start: {start}", *builder.rules, ""])
    return TaggedText(grammars.lark(text), tuple(builder.parts))


class _Node:
    """An object of what was given. Every method raises `BadGrammar`."""

    def __init__(self, given: Any, place: str, depth: int = 0) -> None:
        if not isinstance(given, dict):
            raise BadGrammar("must be an object", place)
        if depth > MOST_NESTED:
            raise BadGrammar(f"is nested more than {MOST_NESTED} deep", place)
        self.given = {name: value for name, value in given.items() if value is not None}
        self.place = place
        self._depth = depth

    def has_only(self, *names: str) -> None:
        for name in self.given.keys() - set(names):
            raise BadGrammar("is not known here", self.at(name[:40]))

    def at(self, name: str) -> str:
        return f"{self.place}.{name}"

    def value(self, name: str) -> Any:
        if name not in self.given:
            raise BadGrammar("is required", self.at(name))
        return self.given[name]

    def text(self, name: str) -> str:
        return _text(self.value(name), self.at(name))

    def texts(self, name: str, *, least: int = 0) -> tuple[str, ...]:
        """Without what is there twice. None is empty."""
        found = self._list(name, least) if least or name in self.given else []
        texts = [_text(one, f"{self.at(name)}[{index}]") for index, one in enumerate(found)]
        if "" in texts:
            raise BadGrammar("must not be empty", f"{self.at(name)}[{texts.index('')}]")
        return tuple(dict.fromkeys(texts))

    def ends(self) -> tuple[str, ...]:
        end = self.value("end")
        if not isinstance(end, list):
            return (self.text("end"),)
        return tuple(dict.fromkeys(_text(one, f"{self.at('end')}[{i}]") for i, one in enumerate(end))) or (
            "",
        )

    def flag(self, name: str) -> bool:
        found = self.given.get(name, False)
        if not isinstance(found, bool):
            raise BadGrammar("must be a boolean", self.at(name))
        return found

    def inner(self, name: str) -> _Node:
        return _Node(self.value(name), self.at(name), self._depth + 1)

    def nodes(self, name: str) -> list[_Node]:
        """At least one."""
        return [
            _Node(one, f"{self.at(name)}[{index}]", self._depth + 1)
            for index, one in enumerate(self._list(name, 1))
        ]

    def _list(self, name: str, least: int) -> list[Any]:
        found = self.value(name)
        if not isinstance(found, list):
            raise BadGrammar("must be an array", self.at(name))
        if len(found) < least:
            raise BadGrammar("must not be empty", self.at(name))
        return found


def _text(given: Any, place: str) -> str:
    if not isinstance(given, str):
        raise BadGrammar("must be a string", place)
    if not given.isascii() and any("\ud800" <= letter <= "\udfff" for letter in given):
        raise BadGrammar("holds a lone surrogate, which is not valid Unicode text", place)
    return given


class _Builder:
    """Writes the rules. What a method returns stands for a part and for what comes after it."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self.rules: list[str] = []
        self.parts: list[tuple[str, Grammar]] = []
        self._kinds: dict[str, Callable[[_Node, _After], str]] = {
            "const_string": self._const, "json_schema": self._json, "regex": self._regex, "grammar": self._grammar,
            "any_text": self._any_text, "sequence": self._sequence, "or": self._or, "tag": self._tag,
            "triggered_tags": self._triggered, "tags_with_separator": self._separated,
            "qwen_xml_parameter": self._qwen,
        }  # fmt: skip

    def part(self, node: _Node, after: _After) -> str:
        kind = node.text("type")
        if kind not in self._kinds:
            known = ", ".join(self._kinds)
            raise BadGrammar(f"is none of those that are followed here, which are {known}", node.at("type"))
        return self._kinds[kind](node, after)

    def structure(self, node: _Node) -> _Tag:
        """Of the older form."""
        node.has_only("begin", "schema", "end")
        schema, place = node.value("schema"), node.at("schema")
        return _Tag(
            node.text("begin"),
            lambda after: f"{self._schema(schema, place)} {self._one_of(after.texts)}",
            (node.text("end"),),
            node.place,
        )

    def triggered(self, node: _Node, tags: Sequence[_Tag], after: _After) -> str:
        triggers, excludes = node.texts("triggers", least=1), node.texts("excludes")
        first_only = node.flag("stop_after_first")
        behind: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        whole = []
        then = after if first_only else _NOTHING
        for tag in tags:
            met = [trigger for trigger in triggers if tag.begin.startswith(trigger)]
            if len(met) != 1:
                which = "none of the triggers" if not met else "more than one of the triggers"
                raise BadGrammar(f"begins with {which}", f"{tag.place}.begin")
            body = self._rule(tag.content(_inside(tag.ends, then)))
            follows = self._one_of(then.texts)
            behind[met[0]].append(f"{literal(tag.begin[len(met[0]) :], self._special)} {body} {follows}")
            whole.append(f"{literal(tag.begin, self._special)} {body} {follows}")
        for trigger, bodies in behind.items():
            if not bodies:
                raise BadGrammar(
                    "begins none of the tags", f"{node.at('triggers')}[{triggers.index(trigger)}]"
                )
        at_least_one = node.flag("at_least_one")
        if at_least_one and first_only:
            return f"({' | '.join(whole)})"
        until, end = self._free(node, (*triggers, *_ends(after)), excludes, after)
        met_tags = [f"{until[trigger]} ({' | '.join(bodies)})" for trigger, bodies in behind.items()]
        if first_only:
            return f"({' | '.join([*met_tags, end])})"
        begin = f"({' | '.join(whole)})" if at_least_one else ""
        return f"{begin} ({' | '.join(met_tags)})* {end}"

    def _const(self, node: _Node, after: _After) -> str:
        node.has_only("type", "value")
        return f"{literal(node.text('value'), self._special)} {self._one_of(after.texts)}"

    def _json(self, node: _Node, after: _After) -> str:
        node.has_only("type", "json_schema", "style", "any_order")
        if node.flag("any_order"):
            raise BadGrammar("must be false: members come in the order of the schema", node.at("any_order"))
        style = node.given.get("style", "json")
        if style in STYLES:
            return self._tagged(node, STYLES[style], after)
        if style != "json":
            raise BadGrammar(f"must be one of json, {', '.join(STYLES)}", node.at("style"))
        return (
            f"{self._schema(node.value('json_schema'), node.at('json_schema'))} {self._one_of(after.texts)}"
        )

    def _schema(self, schema: Any, place: str) -> str:
        try:
            grammar = grammars.json_schema(grammars.parsed(schema))
        except BadGrammar as error:
            raise BadGrammar(str(error), place + error.place) from error
        self.parts.append((place, grammar))
        return f"%json {grammar.text}"

    def _qwen(self, node: _Node, after: _After) -> str:
        """As xgrammar had it before there were styles."""
        node.has_only("type", "json_schema")
        return self._tagged(node, STYLES["qwen_xml"], after)

    def _tagged(self, node: _Node, style: Style, after: _After) -> str:
        """Arguments by name, each in tags, in the schema's order, and then those that it does not name."""
        place = node.at("json_schema")
        try:
            found = parameters(grammars.parsed(node.value("json_schema")))
        except BadGrammar as error:
            raise BadGrammar(str(error), place + error.place) from error
        blank = self._terminal(_BLANK)
        parts = []
        for one in found.named:
            body = self._rule(self._parameter(node, style, one, blank, literal(one.name, self._special)))
            parts.append(f"{blank}? {body}" if one.required else f"({blank}? {body})?")
        if found.others is not None:
            other = Parameter("", False, found.others, ".additionalProperties")
            body = self._rule(self._parameter(node, style, other, blank, self._terminal(f"/{NAME}/")))
            parts.append(f"({blank}? {body})*")
        return f"{' '.join(parts)} {blank}? {self._one_of(after.texts)}"

    def _parameter(self, node: _Node, style: Style, one: Parameter, blank: str, name: str) -> str:
        """With what ends it."""
        ways = []
        for value in one.values:
            if isinstance(value, Text):
                body = self._raw(node, value, style.end, node.at("json_schema") + one.place)
            else:
                schema = self._schema(value.schema, node.at("json_schema") + one.place)
                body = f"{blank}? {schema} {blank}? {literal(style.end, self._special)}"
            opened = [literal(part, self._special) for part in style.named(isinstance(value, Text))]
            ways.append(f"{f' {blank}? '.join(opened)} {body}")
        return f"{literal(style.begin, self._special)} {name} ({' | '.join(ways)})"

    def _raw(self, node: _Node, value: Text, end: str, place: str) -> str:
        """A string as it is, and what ends it."""
        line = literal("\n")
        if value.choices:
            texts = " | ".join([literal(text, self._special) for text in value.choices])
            return f"({line})? ({texts}) ({line})? {literal(end, self._special)}"
        if not value.patterns:
            return self._free(node, (end,), (), _After((end,), last=False))[1]
        self.parts += [(place, grammars.regex(pattern)) for pattern in value.patterns]
        whole = " & ".join([f"/{regex_to_lark(pattern)}/" for pattern in value.patterns])
        if self._names(end, place):
            return f"{self._terminal(whole)} {literal(end, self._special)}"
        clean = f"({whole} & {_without((end,))})"
        return self._rule(self._terminal(f"{clean} {literal(end)}"), lazy=True)

    def _regex(self, node: _Node, after: _After) -> str:
        """Up to the first place where what comes after can follow it: it could go on for ever otherwise."""
        node.has_only("type", "pattern")
        pattern, place = node.text("pattern"), node.at("pattern")
        self.parts.append((place, grammars.regex(pattern)))
        terminal = f"/{regex_to_lark(pattern)}/" if pattern else '""'
        plain = [text for text in after.texts if text and not self._names(text, node.place)]
        rules = [f"{terminal} {literal(text, self._special)}" for text in after.texts if text not in plain]
        if plain:
            rules.append(self._rule(f"{terminal} ({' | '.join(map(literal, plain))})", lazy=True))
        return f"({' | '.join(rules)})"

    def _grammar(self, node: _Node, after: _After) -> str:
        node.has_only("type", "grammar")
        try:
            grammar = grammars.ebnf(node.text("grammar"))
        except BadGrammar as error:
            raise BadGrammar(str(error), node.at("grammar") + error.place) from error
        self.parts.append((node.at("grammar"), grammar))
        nested = self._rule("%lark {\n" + grammar.text + "\n}")
        return f"{nested} {self._one_of(after.texts)}"

    def _any_text(self, node: _Node, after: _After) -> str:
        node.has_only("type", "excludes")
        return self._free(node, _ends(after), node.texts("excludes"), after)[1]

    def _sequence(self, node: _Node, after: _After) -> str:
        """A fixed text is what ends the part before it."""
        node.has_only("type", "elements")
        elements, made = node.nodes("elements"), list[str]()
        while elements:
            element = elements.pop(0)
            if elements and elements[0].given.get("type") == "const_string" and elements[0].text("value"):
                fixed = elements.pop(0)
                fixed.has_only("type", "value")
                then = after.texts if not elements else ("",)
                end = _After(tuple([fixed.text("value") + text for text in then]), last=False)
            else:
                end = _NOTHING if elements else after
            made.append(self.part(element, end))
        return " ".join(made)

    def _or(self, node: _Node, after: _After) -> str:
        node.has_only("type", "elements")
        return f"({' | '.join([self._rule(self.part(one, after)) for one in node.nodes('elements')])})"

    def _tag(self, node: _Node, after: _After) -> str:
        tag = self._read_tag(node)
        body = tag.content(_inside(tag.ends, after))
        return f"{literal(tag.begin, self._special)} {body} {self._one_of(after.texts)}"

    def _read_tag(self, node: _Node) -> _Tag:
        node.has_only("type", "begin", "content", "end")
        if node.given.get("type", "tag") != "tag":
            raise BadGrammar('must be "tag"', node.at("type"))
        content = node.inner("content")
        return _Tag(node.text("begin"), lambda after: self.part(content, after), node.ends(), node.place)

    def _triggered(self, node: _Node, after: _After) -> str:
        node.has_only("type", "triggers", "tags", "at_least_one", "stop_after_first", "excludes")
        return self.triggered(node, [self._read_tag(one) for one in node.nodes("tags")], after)

    def _separated(self, node: _Node, after: _After) -> str:
        node.has_only("type", "tags", "separator", "at_least_one", "stop_after_first")
        one = self._rule(" | ".join([self._tag(tag, _NOTHING) for tag in node.nodes("tags")]))
        more = f"({literal(node.text('separator'), self._special)} {one})*"
        some = one if node.flag("stop_after_first") else f"{one} {more}"
        some = some if node.flag("at_least_one") else f"({some})?"
        return f"{some} {self._one_of(after.texts)}"

    def _free(
        self, node: _Node, stops: Sequence[str], excludes: Sequence[str], after: _After
    ) -> tuple[dict[str, str], str]:
        """Text without any of `excludes` up to each of the stops, by stop; and up to what comes after."""
        if "" in after.texts and not after.last:
            raise BadGrammar(
                "has free text that nothing ends: put it last, or into a tag with an end", node.place
            )
        plain = [stop for stop in stops if not self._names(stop, node.place)]
        for index, stop in enumerate(plain):
            for other in (*plain[:index], *plain[index + 1 :], *excludes):
                if other in stop:
                    why = f"has {stop!r}, which never comes, as {other!r} stops the text or is excluded"
                    raise BadGrammar(why, node.place)
        never = [*plain, *excludes]
        rest = self._terminal(_without(never))
        until = {}
        for stop in stops:
            if self._names(stop, node.place):
                until[stop] = f"{rest} {literal(stop, self._special)}"
            else:
                wanted = f"({_ANY} {literal(stop)})"
                clean = f" & {_without(excludes)}" if excludes else ""
                until[stop] = self._rule(self._terminal(wanted + clean), lazy=True)
        ends = [until[stop] for stop in stops if stop in after.texts]
        return until, f"({' | '.join([*ends, rest] if after.last and '' in after.texts else ends)})"

    def _names(self, stop: str, place: str) -> bool:
        """Whether it begins with a special token, which is no text. Raises `BadGrammar` for one behind text."""
        if not any(name in stop for name in self._special):
            return False
        if not any(stop.startswith(name) for name in self._special):
            raise BadGrammar(f"has text before the special token in {stop!r}: nothing can end there", place)
        return True

    def _one_of(self, texts: Sequence[str]) -> str:
        return "" if texts == ("",) else f"({' | '.join([literal(one, self._special) for one in texts])})"

    def _rule(self, body: str, *, lazy: bool = False) -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"T{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name


def _inside(ends: tuple[str, ...], after: _After) -> _After:
    """What comes after the content of a tag that ends so."""
    return _After(ends, last=after.last and after.texts == ("",))


def _ends(after: _After) -> tuple[str, ...]:
    return tuple(text for text in after.texts if text)


def _without(texts: Sequence[str]) -> str:
    """Of a terminal: any text that holds none of these.

    HAZARD: a complement alone has bytes that are no text, too, and with these all special tokens.
    """
    return f"({_ANY} & ~({_ANY} ({' | '.join(map(literal, texts))}) {_ANY}))" if texts else _ANY
