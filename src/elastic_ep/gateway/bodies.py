"""The bodies of POST requests: a table of fields for each endpoint, of all that clients of OpenAI, vLLM and SGLang send.

`python -m elastic_ep.gateway.reference` writes docs/api.md from them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from elastic_ep.gateway import unsupported
from elastic_ep.gateway.conversation import prompt_fields
from elastic_ep.gateway.errors import prompt_too_long
from elastic_ep.gateway.fields import (
    Boolean,
    Field,
    Integer,
    Kind,
    Label,
    ListOf,
    Number,
    Object,
    OneOf,
    Schema,
    String,
    bad_value,
    wrong_type,
)
from elastic_ep.gateway.settings import SAMPLING_KINDS, ApiSettings, SamplingDefaults
from elastic_ep.wire.messages import Bias

_MOST_TOKEN_IDS = 1024
_BIAS = Number(-100.0, 100.0)
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
class LogitBias:
    """What to add to tokens' logits: token ids as JSON object names, as OpenAI has it."""

    token: Integer

    def read(self, value: Any, param: str) -> tuple[Bias, ...]:
        if not isinstance(value, dict):
            raise wrong_type(param, "an object", value)
        if len(value) > _MOST_TOKEN_IDS:
            raise bad_value(param, f"must have at most {_MOST_TOKEN_IDS} entries.")
        biases = {}
        for name, add in value.items():
            within = f"{param}.{name[:20]}"
            if not re.fullmatch("[0-9]{1,9}", name):
                raise bad_value(param, "must have token ids as its names.")
            biases[self.token.read(int(name), within)] = _BIAS.read(add, within)
        return tuple(Bias(token, add) for token, add in biases.items())

    def schema(self) -> Schema:
        return {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": _BIAS.schema(),
            "maxProperties": _MOST_TOKEN_IDS,
        }


def _token_id(settings: ApiSettings) -> Integer:
    return Integer(0, settings.vocab_size - 1)


def _request_id(name: str) -> Field:
    return Field(name, String(1, 128, pattern="[!-~]+"), about="Becomes the answer's id, behind its prefix.")


def _common_fields(settings: ApiSettings) -> tuple[Field, ...]:
    token_ids = ListOf(_token_id(settings), max_items=128)
    return (
        Field("model", String()),
        Field("n", Integer(1, min(128, settings.max_choices)), 1),
        Field("stream", Boolean(), False),
        Field("stream_options", _STREAM_OPTIONS),
        Field("stop", _STOP_STRINGS, ()),
        Field("stop_token_ids", token_ids, ()),
        Field("include_stop_str_in_output", Boolean(), False, about="The text ends with what stopped it."),
        Field("no_stop_trim", Boolean(), False, about="SGLang's name for include_stop_str_in_output."),
        Field("ignore_eos", Boolean(), False),
        Field("min_tokens", Integer(0, 2**31 - 1), 0, about="Nothing ends the text before it has so many."),
        Field("seed", Integer(-(2**63), 2**63 - 1)),
        Field("max_tokens", Integer(1, 2**31 - 1)),
        *_sampling_fields(settings.defaults),
        Field("presence_penalty", Number(-2.0, 2.0), 0.0),
        Field("frequency_penalty", Number(-2.0, 2.0), 0.0),
        Field("logit_bias", LogitBias(_token_id(settings)), ()),
        Field(
            "allowed_token_ids",
            ListOf(_token_id(settings), max_items=_MOST_TOKEN_IDS),
            (),
            about="Only these are picked; [] is all.",
        ),
        Field("skip_special_tokens", Boolean(), True, about="False: special tokens are part of the text."),
        Field(
            "return_token_ids", Boolean(), False, about="token_ids and prompt_token_ids are in the answer."
        ),
        Field(
            "truncate_prompt_tokens",
            Integer(-1, 2**31 - 1),
            about="Keep so many tokens of each prompt; -1: as many as fit.",
        ),
        Field(
            "truncation_side",
            OneOf(("left", "right"), "a prompt is cut at one of its ends"),
            "left",
            about="Where the prompt is cut: left keeps its last tokens.",
        ),
        _request_id("request_id"),
        _request_id("rid"),
        *(Field(name, Label(), about="Accepted. It never changes an answer.") for name in _LABELS),
        *unsupported.EVERYWHERE,
    )


_LABELS = (
    "user", "metadata", "safety_identifier", "session_id", "extra_key", "cache_salt", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options",
)  # fmt: skip
"""Who asks, or hints for a cache of prompts, which there is none: nothing is shared between requests."""
_STREAM_OPTIONS = Object(
    (
        Field("include_usage", Boolean(), False),
        Field("continuous_usage_stats", Boolean(), False, about="Every chunk tells the usage so far."),
        Field("include_obfuscation", OneOf((False,), "chunks are not padded")),
    )
)


def _sampling_fields(defaults: SamplingDefaults) -> tuple[Field, ...]:
    return tuple(Field(name, kind, getattr(defaults, name)) for name, kind in SAMPLING_KINDS.items())


def completion_fields(settings: ApiSettings) -> tuple[Field, ...]:
    return (
        Field(
            "prompt", Prompt(_token_id(settings), settings.max_choices, settings.max_model_len), required=True
        ),
        *_common_fields(settings),
        Field("logprobs", Integer(0, settings.max_logprobs)),
        Field("echo", Boolean(), False),
        Field("add_special_tokens", Boolean(), True),
        Field("best_of", Integer(1, 128), about="As n: the best of more choices than are shown is not told."),
        *unsupported.COMPLETIONS,
    )


def chat_fields(settings: ApiSettings) -> tuple[Field, ...]:
    return (
        *prompt_fields(settings),
        *_common_fields(settings),
        Field("max_completion_tokens", Integer(1, 2**31 - 1)),
        Field("logprobs", Boolean(), False),
        Field("top_logprobs", Integer(0, settings.max_logprobs), 0),
        Field(
            "return_prompt_token_ids", Boolean(), False, about="SGLang's: prompt_token_ids are in the answer."
        ),
        *unsupported.CHAT,
    )


def tokenize_fields() -> tuple[Field, ...]:
    return (Field("prompt", String(), required=True), Field("add_special_tokens", Boolean(), True))


def detokenize_fields(settings: ApiSettings) -> tuple[Field, ...]:
    return (Field("tokens", ListOf(_token_id(settings), max_items=settings.max_model_len), required=True),)


def relaunch_fields() -> tuple[Field, ...]:
    return (Field("rank", Integer(0, 2**31 - 1)),)
