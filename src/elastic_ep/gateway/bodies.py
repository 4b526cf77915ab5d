"""The bodies of POST requests: a model for each endpoint, with all that clients of OpenAI, vLLM and SGLang send.

`python scripts/api_reference.py` writes docs/api.md from them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, create_model

from elastic_ep.gateway import unsupported
from elastic_ep.gateway.conversation import ChatPrompt, Message, ToolChoice
from elastic_ep.gateway.fields import Array, Body, Integer, Refused, Text, fault
from elastic_ep.gateway.guided import Guiding
from elastic_ep.gateway.settings import ApiSettings, Sampling
from elastic_ep.wire.messages import Bias

_MOST_TOKEN_IDS = 1024
_LABELS = (
    "user", "metadata", "safety_identifier", "session_id", "extra_key", "cache_salt", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options",
)  # fmt: skip
"""Who asks, or hints for a cache of prompts, which there is none: nothing is shared between requests."""
Prompts = list[str | list[int]]
Stops = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=256)]],
    Array(most=16),
    BeforeValidator(
        lambda stop: stop if isinstance(stop, list) else [stop], json_schema_input_type=str | list[str]
    ),
]
RequestId = Annotated[str, Field(min_length=1, max_length=128, pattern="^[!-~]+$")]
_ITS_ID = Field(None, description="Becomes the answer's id, behind its prefix.")


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="Every chunk tells the usage so far.")
    refused = unsupported.STREAM_OPTIONS


class Generating(Guiding, Sampling):
    """Of both endpoints. What the model or the server bounds is bounded by `completion_body` and `chat_body`."""

    model: Text | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stops = Field(default_factory=list)
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = Field(False, description="The text ends with what stopped it.")
    no_stop_trim: bool = Field(False, description="SGLang's name for include_stop_str_in_output.")
    ignore_eos: bool = False
    min_tokens: Annotated[int, Integer(0)] = Field(
        0, description="Nothing ends the text before it has so many."
    )
    seed: Annotated[int | None, Integer(-(2**63), 2**63 - 1)] = None
    max_tokens: Annotated[int | None, Integer(1)] = None
    prompt_logprobs: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: tuple[Bias, ...] = ()
    allowed_token_ids: Sequence[int] = ()
    bad_words: Annotated[list[Annotated[Text, Field(min_length=1, max_length=256)]], Array(most=128)] = Field(
        [], description="Never generated, at a text's beginning or behind a blank."
    )
    skip_special_tokens: bool = Field(True, description="False: special tokens are part of the text.")
    return_token_ids: bool = Field(False, description="token_ids and prompt_token_ids are in the answer.")
    truncate_prompt_tokens: Annotated[int | None, Integer(-1)] = Field(
        None, description="Keep so many tokens of each prompt; -1: as many as fit."
    )
    truncation_side: Literal["left", "right"] = Field(
        "left", description="Where the prompt is cut: left keeps its last tokens."
    )
    request_id: RequestId | None = _ITS_ID
    rid: RequestId | None = _ITS_ID


class Completion(Generating):
    refused = unsupported.EVERYWHERE | unsupported.COMPLETIONS
    prompt: Prompts
    max_tokens: Annotated[int | None, Integer(0)] = Field(
        None, description="Default 16. 0: nothing is generated, the prompt is scored if that is asked for."
    )
    logprobs: int | None = None
    echo: bool = Field(False, description="The text begins with the prompt, and so do logprobs.")
    add_special_tokens: bool = True
    best_of: Annotated[int | None, Integer(1, 128)] = Field(
        None, description="As n: the best of more choices than are shown is not told."
    )


class Chat(ChatPrompt, Generating):
    refused = unsupported.EVERYWHERE | unsupported.CHAT
    max_completion_tokens: Annotated[int | None, Integer(1)] = None
    logprobs: bool = False
    top_logprobs: int = 0
    tool_choice: ToolChoice | None = Field(
        None,
        description="Default auto if there are tools. A grammar makes a call certain, and reasoning has no place then.",
    )
    parallel_tool_calls: bool = Field(True, description="False: of several calls the first.")
    include_reasoning: bool = Field(True, description="False: reasoning is left out.")
    separate_reasoning: bool = Field(True, description="SGLang's. False: reasoning is part of the content.")
    return_prompt_token_ids: bool = Field(False, description="SGLang's: prompt_token_ids are in the answer.")


class Tokenize(ChatPrompt):
    """A text, or the prompt that a conversation makes."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Array(1)] | None = None  # type: ignore[assignment]  # here it need not be given
    add_special_tokens: bool | None = Field(  # type: ignore[assignment]  # here it depends on the prompt
        None, description="Default true for a prompt, false for messages."
    )
    return_token_strs: bool = Field(False, description="token_strs is in the answer.")


class Detokenize(Body):
    model: Text | None = None
    tokens: list[int]


class Relaunch(Body):
    rank: Annotated[int | None, Integer(0)] = None


class Kill(Body):
    """Its incarnation too: who asks twice kills no other one."""

    rank: Annotated[int, Integer(0)]
    incarnation: Annotated[int, Integer(1)]


DRAIN_S = 120
"""What requests of a rank that drains have by default, in seconds; as in vLLM."""
_Patience = Annotated[int, Integer(0, 86_400)]


class Drain(Body):
    """Which rank, and how many seconds its requests have to end before they go on elsewhere."""

    rank: Annotated[int, Integer(0)]
    drain_timeout: _Patience = DRAIN_S


class Scale(Body):
    new_data_parallel_size: Annotated[int, Integer(1)]
    drain_timeout: _Patience = DRAIN_S


@cache
def completion_body(settings: ApiSettings) -> type[Completion]:
    return create_model(
        "Completion",
        __base__=Completion,
        prompt=(_prompts(settings), ...),
        logprobs=(Annotated[int | None, Integer(0, settings.max_logprobs)], None),
        **_bounded(settings),
    )


@cache
def chat_body(settings: ApiSettings) -> type[Chat]:
    made = create_model(
        "Chat",
        __base__=Chat,
        messages=(Annotated[list[Message], Array(1, settings.max_model_len)], ...),
        top_logprobs=(Annotated[int, Integer(0, settings.max_logprobs)], 0),
        **_bounded(settings),
    )
    if not settings.trust_request_chat_template:
        made.refused = {**made.refused, **unsupported.CHAT_TEMPLATE}
    if settings.reasoning_parser is None:
        made.refused = {**made.refused, **unsupported.REASONING_PARSER}
    return made


@cache
def tokenize_body(settings: ApiSettings) -> type[Tokenize]:
    made = create_model("Tokenize", __base__=Tokenize)
    if not settings.trust_request_chat_template:
        made.refused = unsupported.CHAT_TEMPLATE
    return made


@cache
def detokenize_body(settings: ApiSettings) -> type[Detokenize]:
    return create_model(
        "Detokenize", __base__=Detokenize, tokens=(_token_ids(settings, settings.max_model_len), ...)
    )


def of_chat_alone(
    settings: ApiSettings, offered: Collection[str], renamed: Mapping[str, str]
) -> dict[str, Refused]:
    """What another endpoint for conversations, with the fields `offered`, refuses of those that /v1/chat/completions has.

    `renamed`: fields by the names that they have there.
    """
    chat = chat_body(settings)
    refused = {name: one for name, one in chat.refused.items() if name not in offered}
    for name in chat.model_fields.keys() - refused.keys() - set(offered):
        field = chat.model_fields[name]
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        empty = isinstance(default, list | tuple) and not default
        neutral: tuple[Any, ...] = ([], {}) if empty else () if default is None else (default,)
        why = f"see '{renamed[name]}'" if name in renamed else "it is a field of /v1/chat/completions"
        refused[name] = Refused(neutral, why)
    return dict(sorted(refused.items()))


def _bounded(settings: ApiSettings) -> dict[str, Any]:
    some: Any = Field([], description="Only these are picked; [] is all.")
    defaults = settings.defaults.model_dump()
    return {
        "n": (Annotated[int, Integer(1, min(128, settings.max_choices))], 1),
        "stop_token_ids": (_token_ids(settings, 128), []),
        "logit_bias": (_logit_bias(settings), ()),
        "allowed_token_ids": (_token_ids(settings, _MOST_TOKEN_IDS), some),
        "prompt_logprobs": (
            Annotated[int | None, Integer(0, settings.max_logprobs)],
            Field(
                None,
                description="Of each token of the prompt, and of so many alternatives. Not with 'stream'.",
            ),
        ),
        **{
            name: (Annotated[field.annotation, *field.metadata], defaults[name])
            for name, field in Sampling.model_fields.items()
        },
        **labels(),
    }


def labels() -> dict[str, Any]:
    """Fields, for `create_model`."""
    return {name: (Any, Field(None, description="Accepted. It never changes an answer.")) for name in _LABELS}


def _token_ids(settings: ApiSettings, most: int, least: int = 0) -> Any:
    token = Annotated[int, Integer(0, settings.vocab_size - 1)]
    return Annotated[list[token], Array(least, most)]


def _prompts(settings: ApiSettings) -> Any:
    """A string, a list of strings, a list of token ids, or a list of such lists; read to a list of prompts."""
    longest = settings.max_model_len

    def short(ids: Any) -> Any:
        # One that is too long is refused before its ids are looked at.
        if isinstance(ids, list) and len(ids) >= longest:
            raise fault("prompt_too_long", "is too long.", longest=longest, tokens=str(len(ids)))
        return ids

    ids: Any = Annotated[_token_ids(settings, longest - 1, least=1), BeforeValidator(short)]
    many = Array(1, settings.max_choices)
    alone = AfterValidator(lambda prompt: [prompt])
    return Annotated[
        Annotated[Text, alone, Tag("|text")]
        | Annotated[list[Text], many, Tag("|texts")]
        | Annotated[ids, alone, Tag("|ids")]
        | Annotated[list[ids], many, Tag("|lists")],
        Discriminator(
            _form, custom_error_type="prompt_type", custom_error_message="must be a string or an array"
        ),
    ]


def _form(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "|text"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else 0
    return "|texts" if isinstance(first, str) else "|lists" if isinstance(first, list) else "|ids"


def _logit_bias(settings: ApiSettings) -> Any:
    """What to add to tokens' logits: token ids as JSON object names, as OpenAI has it."""

    def biases(given: dict[str, float]) -> tuple[Bias, ...]:
        if unknown := [name for name in given if int(name) >= settings.vocab_size]:
            raise fault("invalid_value", f"must be below {settings.vocab_size}.", inside=f".{unknown[0]}")
        return tuple(
            Bias(token, add) for token, add in {int(name): add for name, add in given.items()}.items()
        )

    name = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
    return Annotated[
        dict[name, Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=_MOST_TOKEN_IDS),
        AfterValidator(biases),
    ]
