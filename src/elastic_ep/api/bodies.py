"""The bodies of POST requests: one table of fields for each endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elastic_ep.api.errors import prompt_too_long
from elastic_ep.api.fields import (
    Boolean,
    Field,
    Integer,
    Kind,
    ListOf,
    Number,
    Object,
    OneOf,
    Schema,
    String,
    bad_value,
    wrong_type,
)
from elastic_ep.api.settings import ApiSettings

_TEXT_PART = Object((Field("type", OneOf(("text",)), required=True), Field("text", String(), required=True)))
_STOP_STRINGS = ListOf(String(min_length=1, max_length=256), max_items=16, or_single=True)


@dataclass(frozen=True, slots=True)
class TokenList:
    """A prompt of token ids. One that is too long is refused before its ids are looked at."""

    token: Integer
    max_model_len: int

    def read(self, value: Any, param: str) -> tuple[int, ...]:
        if isinstance(value, list) and len(value) >= self.max_model_len:
            raise prompt_too_long(self.max_model_len, str(len(value)), param)
        return ListOf(self.token).read(value, param)

    def schema(self) -> Schema:
        return ListOf(self.token, 1, self.max_model_len - 1).schema()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A string, a list of strings, a list of token ids, or a list of such lists; read to a tuple of prompts."""

    token: Integer
    max_prompts: int
    max_model_len: int

    def read(self, value: Any, param: str) -> tuple[str | tuple[int, ...], ...]:
        if isinstance(value, str):
            return (String().read(value, param),)
        if not isinstance(value, list):
            raise wrong_type(param, "a string or an array", value)
        if not value:
            raise bad_value(param, "must not be empty.")
        if isinstance(value[0], (str, list)):
            kind: Kind = String() if isinstance(value[0], str) else TokenList(self.token, self.max_model_len)
            prompts: tuple[Any, ...] = ListOf(kind, max_items=self.max_prompts).read(value, param)
            return prompts
        return (TokenList(self.token, self.max_model_len).read(value, param),)

    def schema(self) -> Schema:
        tokens = TokenList(self.token, self.max_model_len).schema()
        texts = ListOf(String(), 1, self.max_prompts).schema()
        many = {"type": "array", "items": tokens, "minItems": 1, "maxItems": self.max_prompts}
        return {"anyOf": [String().schema(), texts, tokens, many]}


@dataclass(frozen=True, slots=True)
class Content:
    """A message's content: a string, or OpenAI's list of text parts joined to one."""

    def read(self, value: Any, param: str) -> str:
        if isinstance(value, list):
            return "".join(part["text"] for part in ListOf(_TEXT_PART).read(value, param))
        return String().read(value, param)

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "string"}, ListOf(_TEXT_PART).schema()]}


def _token_id(settings: ApiSettings) -> Integer:
    return Integer(0, settings.vocab_size - 1)


def _common_fields(settings: ApiSettings) -> tuple[Field, ...]:
    defaults = settings.defaults
    return (
        Field("model", String()),
        Field("n", Integer(1, min(128, settings.max_choices)), 1),
        Field("stream", Boolean(), False),
        Field("stream_options", Object((Field("include_usage", Boolean(), False),))),
        Field("stop", _STOP_STRINGS, ()),
        Field("stop_token_ids", ListOf(_token_id(settings), max_items=128), ()),
        Field("ignore_eos", Boolean(), False),
        Field("seed", Integer(-(2**63), 2**63 - 1)),
        Field("max_tokens", Integer(1, 2**31 - 1)),
        Field("temperature", Number(0.0, 2.0), defaults.temperature),
        Field("top_p", Number(0.0, 1.0, above_low=True), defaults.top_p),
        Field("top_k", Integer(-1, 2**31 - 1), defaults.top_k),
        Field("min_p", Number(0.0, 1.0), defaults.min_p),
        Field("repetition_penalty", Number(0.01, 100.0), defaults.repetition_penalty),
        Field("presence_penalty", Number(-2.0, 2.0), 0.0),
        Field("frequency_penalty", Number(-2.0, 2.0), 0.0),
        Field("logit_bias", OneOf(({},))),
    )


def completion_fields(settings: ApiSettings) -> tuple[Field, ...]:
    return (
        Field(
            "prompt", Prompt(_token_id(settings), settings.max_choices, settings.max_model_len), required=True
        ),
        *_common_fields(settings),
        Field("logprobs", Integer(0, settings.max_logprobs)),
        Field("echo", Boolean(), False),
        Field("suffix", OneOf(("",))),
        Field("best_of", OneOf((1,))),
    )


_MESSAGE = Object(
    (
        Field("role", String(min_length=1, max_length=64), required=True),
        Field("content", Content(), ""),
        Field("name", String()),
        Field("reasoning_content", String()),
        Field("tool_calls", OneOf(([],))),
    )
)


def chat_fields(settings: ApiSettings) -> tuple[Field, ...]:
    return (
        Field("messages", ListOf(_MESSAGE, min_items=1, max_items=settings.max_model_len), required=True),
        *_common_fields(settings),
        Field("max_completion_tokens", Integer(1, 2**31 - 1)),
        Field("logprobs", Boolean(), False),
        Field("top_logprobs", Integer(0, settings.max_logprobs)),
        Field("add_generation_prompt", Boolean(), True),
        Field("chat_template_kwargs", Object()),
        Field("tools", OneOf(([],))),
        Field("response_format", OneOf(({"type": "text"},))),
    )


def tokenize_fields() -> tuple[Field, ...]:
    return (Field("prompt", String(), required=True), Field("add_special_tokens", Boolean(), True))


def detokenize_fields(settings: ApiSettings) -> tuple[Field, ...]:
    return (Field("tokens", ListOf(_token_id(settings), max_items=settings.max_model_len), required=True),)
