"""Which grammar a request asks its text to follow, in the words of OpenAI, vLLM and SGLang.

Compiling one takes milliseconds, of some a second: that is done in the text process (`reading.py`), before a rank
hears of the request.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from elastic_ep.gateway import unsupported
from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.fields import Array, Body, Text, bad_value, fault
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.guided import grammars
from elastic_ep.guided.check import GrammarChecker
from elastic_ep.guided.grammars import BadGrammar
from elastic_ep.guided.structural_tags import structural_tag
from elastic_ep.guided.vocabulary import Vocabulary
from elastic_ep.wire.messages import Grammar


def _schema_like(given: Any) -> Any:
    if not isinstance(given, dict | bool | str):
        raise fault("invalid_type", "must be an object, or its JSON as a string.")
    return given


Schema = Annotated[
    Any,
    AfterValidator(_schema_like),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "boolean"}, {"type": "string"}]}),
    Field(description="A JSON Schema; its JSON as a string will do, too."),
]
_MOST_CHOICES = 10_000
Choices = Annotated[list[Text], Array(most=_MOST_CHOICES)]
_NotEmpty = Annotated[Text, Field(min_length=1)]
"""In an object that is there for a grammar alone; beside other fields an empty one is none, as clients send it."""


def _tag_like(given: Any) -> Any:
    if not isinstance(given, dict | str):
        raise fault("invalid_type", "must be an object, or its JSON as a string.")
    return given


TagLike = Annotated[
    Any,
    AfterValidator(_tag_like),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]}),
    Field(
        description="Text that is free up to a trigger, and then as the tag of the trigger has it: {format}, or "
        "{structures, triggers}; its JSON as a string will do, too."
    ),
]


_MOST_KNOWN = 256
_PROGRAMS = ("structured_outputs.grammar", "guided_grammar", "ebnf")


class JsonSchemaFormat(Body):
    """`strict` or not, every answer fits."""

    name: Text | None = None
    description: Text | None = None
    given: Schema = Field(alias="schema")
    strict: bool = False


class _Whole(Body):
    """An object of which every field says what the text has to be: none is ignored."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name in self.model_extra or ():
            raise fault("unsupported_parameter", "is not known here.", inside=f".{name[:40]}")
        return self


class ResponseFormat(_Whole):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    format: dict[str, Any] | None = Field(None, description="Of a structural tag.")
    structures: list[dict[str, Any]] | None = Field(None, description="Of one in the form before 'format'.")
    triggers: list[Text] | None = Field(None, description="What a structure begins with.")


class StructuredOutputs(_Whole):
    """vLLM's."""

    refused = unsupported.STRUCTURED_OUTPUTS
    given_json: Schema = Field(None, alias="json")
    regex: _NotEmpty | None = None
    choice: Annotated[Choices, Array(1, _MOST_CHOICES)] | None = None
    grammar: _NotEmpty | None = Field(None, description="In EBNF or Lark.")
    json_object: bool = False
    whitespace_pattern: Text | None = Field(None, description="Of what may stand between parts of JSON.")
    disable_any_whitespace: bool = Field(False, description="JSON without blanks.")
    disable_fallback: bool = Field(False, description="There is none.")
    structural_tag: TagLike = None


class Guiding(Body):
    """At most one grammar."""

    response_format: ResponseFormat | None = Field(
        None,
        description="{type: text or json_object}, {type: json_schema, json_schema: {schema}} or {type: structural_tag, "
        "format} (or with structures and triggers): what the answer is.",
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="vLLM's: one of json, json_object, regex, choice, grammar and structural_tag; beside JSON "
        "whitespace_pattern or disable_any_whitespace.",
    )
    guided_json: Schema = Field(None, description="As structured_outputs.json, and so are the others.")
    guided_regex: Text = ""
    guided_choice: Choices = Field(default_factory=list)
    guided_grammar: Text = ""
    guided_whitespace_pattern: Text | None = None
    json_schema: Schema = Field(None, description="SGLang's name for structured_outputs.json.")
    regex: Text = Field("", description="SGLang's name for structured_outputs.regex.")
    ebnf: Text = Field("", description="SGLang's name for structured_outputs.grammar.")
    structural_tag: TagLike = Field(None, description="As structured_outputs.structural_tag.")


class Unchecked(Exception):
    """A grammar that is to be read where that may take its time."""


class KnownGrammars:
    """Those that were found well elsewhere, for who has not the time to look. Clients ask for the same ones again."""

    def __init__(self) -> None:
        self._known: OrderedDict[Grammar, None] = OrderedDict()

    def add(self, grammar: Grammar) -> None:
        self._known[grammar] = None
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)

    def check(self, grammar: Grammar) -> None:
        """Raises `Unchecked`."""
        if grammar not in self._known:
            raise Unchecked
        self._known.move_to_end(grammar)


def is_tagged(values: Guiding) -> bool:
    """Whether the text is to follow a structural tag: then what the model says freely is read as ever."""
    form, new = values.response_format, values.structured_outputs
    return (
        (form is not None and form.type == "structural_tag")
        or _given(values.structural_tag)
        or (new is not None and new.structural_tag is not None)
    )


def certain_calls(functions: Sequence[Mapping[str, Any]], *, several: bool) -> Grammar:
    """The text is an array of calls of these tools, at least one. Raises `BadGrammar`.

    Each tool's schema is a document of its own, as what it refers to is within it.
    """
    calls = []
    for function in functions:
        name = json.dumps(function["name"], ensure_ascii=False)
        begin, end = grammars.literal(f'{{"name": {name}, "arguments": '), grammars.literal("}")
        calls.append(f"{begin} {grammars.json_rule(_arguments(function))} {end}")
    rules = "".join(f"call_{place}: {call}\n" for place, call in enumerate(calls))
    one = " | ".join(f"call_{place}" for place in range(len(calls)))
    more = f"({grammars.literal(', ')} call)*" if several else ""
    start = f"{grammars.literal('[')} call {more} {grammars.literal(']')}"
    return grammars.lark(f"start: {start}\ncall: {one}\n{rules}")


def certain_arguments(function: Mapping[str, Any]) -> Grammar:
    """The text is the arguments of a call of this tool. Raises `BadGrammar`."""
    return grammars.json_schema(_arguments(function))


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tool without parameters has an object without members. Raises `BadGrammar`."""
    nothing = {"properties": {}, "additionalProperties": False}
    schema = {"type": "object", **(function.get("parameters") or nothing)}
    if schema["type"] != "object":
        raise BadGrammar('must be "object": a call has named arguments', ".type")
    return schema


class GrammarReader:
    """From what a request says to a grammar that ranks can follow. Every method raises `ApiError`.

    `known`: no other is read, nor one of a kind that is work to turn into ours; `Unchecked` is raised then.
    """

    def __init__(
        self, settings: ApiSettings, text: ChatTokenizer, known: KnownGrammars | None = None
    ) -> None:
        self._settings = settings
        self._text = text
        self._known = known

    def warm_up(self) -> None:
        """Make what grammars are checked with: with 150,000 tokens that takes most of a second."""
        _ = self._checker

    def read(self, values: Guiding) -> Grammar | None:
        asked = [(param, make) for param, given, make in _wishes(values, self._tagged) if given]
        _check_details(values, [param for param, _ in asked])
        if not asked:
            return None
        if len(asked) > 1:
            first, second = asked[0][0], asked[1][0]
            raise ApiError(
                f"'{second}' cannot be honoured together with '{first}': a text follows one grammar.",
                param=second,
                code="invalid_value",
            )
        ((param, make),) = asked
        if self._known is not None and (is_tagged(values) or param in _PROGRAMS):
            raise Unchecked
        try:
            return self.checked(make(), param)
        except BadGrammar as error:
            raise refusal(param, error) from error

    def checked(self, grammar: Grammar, param: str) -> Grammar:
        """`grammar`, which came from the field `param`."""
        if isinstance(self._checker, str):
            raise ApiError(
                f"'{param}' cannot be honoured here: {self._checker}.",
                param=param,
                code="unsupported_parameter",
            )
        try:
            self._checker.check(grammar)
        except BadGrammar as error:
            raise refusal(param, error) from error
        return grammar

    def _tagged(self, given: Any) -> Grammar:
        """Raises `BadGrammar`, with the place of the part that is wrong."""
        tagged = structural_tag(grammars.parsed(given), self._text.special_ids)
        if isinstance(self._checker, str):
            return tagged.grammar
        try:
            self._checker.check(tagged.grammar)
        except BadGrammar:
            for place, part in tagged.parts:
                try:
                    self._checker.check(part)
                except BadGrammar as error:
                    raise BadGrammar(str(error), place + error.place) from error
            raise
        return tagged.grammar

    @cached_property
    def _checker(self) -> GrammarChecker | KnownGrammars | str:
        """Or why there is none."""
        if self._known is not None:
            return self._known
        found = vocabulary(self._settings, self._text)
        return GrammarChecker(found) if isinstance(found, Vocabulary) else found


def vocabulary(settings: ApiSettings, text: ChatTokenizer) -> Vocabulary | str:
    """What texts are guided with, or why none can be."""
    ends = {token for token in settings.ends if token < settings.vocab_size}
    if not ends:
        return "no token is known to end a text of this model"
    if not text.spells_tokens:
        return "this model's tokenizer does not say what text a token stands for by itself"
    size = settings.vocab_size
    tokens = tuple([text.token_bytes(token) for token in range(size)])
    special = tuple([token for token in range(size) if text.is_special(token)])
    return Vocabulary(tokens, special, tuple(sorted(ends)))


def _wishes(
    values: Guiding, tagged: Callable[[Any], Grammar]
) -> list[tuple[str, bool, Callable[[], Grammar]]]:
    """Field, whether it is given, and what makes a grammar of it, which raises `BadGrammar`."""
    old, pattern = values, values.guided_whitespace_pattern
    wishes: list[tuple[str, bool, Callable[[], Grammar]]] = [
        ("guided_json", _given(old.guided_json), lambda: _schema(old.guided_json, pattern)),
        ("guided_regex", bool(old.guided_regex), lambda: grammars.regex(old.guided_regex)),
        ("guided_choice", bool(old.guided_choice), lambda: grammars.choice(old.guided_choice)),
        ("guided_grammar", bool(old.guided_grammar), lambda: grammars.ebnf(old.guided_grammar)),
        ("json_schema", _given(old.json_schema), lambda: _schema(old.json_schema, pattern)),
        ("regex", bool(old.regex), lambda: grammars.regex(old.regex)),
        ("ebnf", bool(old.ebnf), lambda: grammars.ebnf(old.ebnf)),
        ("structural_tag", _given(old.structural_tag), lambda: tagged(old.structural_tag)),
    ]
    if (form := values.response_format) is not None:
        wishes += [
            ("response_format", form.type == "json_object", grammars.json_object),
            (
                "response_format.json_schema.schema",
                form.type == "json_schema",
                lambda: _schema(_required(form.json_schema).given, pattern),
            ),
            (
                "response_format",
                form.type == "structural_tag",
                lambda: tagged({name: getattr(form, name) for name in form.model_fields_set}),
            ),
        ]
    if (new := values.structured_outputs) is not None:
        blanks, compact = new.whitespace_pattern, new.disable_any_whitespace
        wishes += [
            (
                "structured_outputs.json",
                new.given_json is not None,
                lambda: _schema(new.given_json, blanks, compact=compact),
            ),
            ("structured_outputs.regex", bool(new.regex), lambda: grammars.regex(new.regex or "")),
            ("structured_outputs.choice", bool(new.choice), lambda: grammars.choice(new.choice or [])),
            ("structured_outputs.grammar", bool(new.grammar), lambda: grammars.ebnf(new.grammar or "")),
            (
                "structured_outputs.json_object",
                new.json_object,
                lambda: _schema({"type": "object"}, blanks, compact=compact),
            ),
            (
                "structured_outputs.structural_tag",
                new.structural_tag is not None,
                lambda: tagged(new.structural_tag),
            ),
        ]
    return wishes


def _check_details(values: Guiding, asked: Sequence[str]) -> None:
    """Raises `ApiError` for what says more about a grammar than the one that is `asked` for has."""
    old = ("guided_json", "json_schema", "response_format.json_schema.schema")
    details: list[tuple[str, bool, tuple[str, ...]]] = [
        ("guided_whitespace_pattern", values.guided_whitespace_pattern is not None, old),
    ]
    if (new := values.structured_outputs) is not None:
        json_texts = ("structured_outputs.json", "structured_outputs.json_object")
        details += [
            ("structured_outputs.whitespace_pattern", new.whitespace_pattern is not None, json_texts),
            ("structured_outputs.disable_any_whitespace", new.disable_any_whitespace, json_texts),
        ]
        if new.disable_any_whitespace and new.whitespace_pattern is not None:
            raise bad_value(
                "structured_outputs.whitespace_pattern", "cannot be honoured with 'disable_any_whitespace'."
            )
    for name, given, beside in details:
        if given and not set(beside) & set(asked):
            raise bad_value(name, f"needs '{beside[0]}' beside it.")
    form = values.response_format
    for name, kind in _OF_TYPES.items():
        if form is not None and getattr(form, name) is not None and form.type != kind:
            raise bad_value(f"response_format.{name}", f"needs 'response_format.type' to be \"{kind}\".")


_OF_TYPES = {
    "json_schema": "json_schema",
    "format": "structural_tag",
    "structures": "structural_tag",
    "triggers": "structural_tag",
}
"""Fields of `response_format`, and the type that has them."""


def _required(form: JsonSchemaFormat | None) -> JsonSchemaFormat:
    if form is None:
        param = "response_format.json_schema"
        raise ApiError(f"'{param}' is required.", param=param, code="missing_required_parameter")
    return form


def _given(schema: Any) -> bool:
    return schema is not None and schema != ""


def _schema(given: Any, whitespace: str | None, *, compact: bool = False) -> Grammar:
    return grammars.json_schema(grammars.parsed(given), whitespace=whitespace, compact=compact)


def refusal(param: str, error: BadGrammar) -> ApiError:
    place = f"{param}{error.place}"
    return ApiError(f"'{place}' cannot be followed: {error}.", param=place, code="invalid_grammar")
