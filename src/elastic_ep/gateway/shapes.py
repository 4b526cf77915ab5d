"""The JSON of OpenAI's two generating endpoints, whole and as server-sent events.

A chunk differs from the one before only in its text, so everything around the text is made once a choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from elastic_ep.gateway.job import Output
from elastic_ep.gateway.message import Call, Message
from elastic_ep.gateway.parsers.base import CallArguments, CallBegin, Content, Delta, Reasoning
from elastic_ep.gateway.turns import Turns
from elastic_ep.wire.messages import Token

_LEAST_LOGPROB = -9999.0  # as OpenAI writes minus infinity, which JSON cannot
_TOKENS_A_TURN = 64
"""With twenty alternatives each a few milliseconds."""
_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_escape = json.encoder.encode_basestring_ascii


class Json(str):
    """Text that is JSON already."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What every object of one response shares."""

    id: str
    created: int
    model: str
    output: Output


@dataclass(frozen=True, slots=True)
class SpelledToken:
    """A generated token with its part of the text, as logprobs show it.

    `raw` is what the token adds to the text where it stands: joined, those of all tokens are the text's bytes. A
    token without text, a special one, has its name there. `top` has the same for each of `token.top`.

    `start` is where it begins, in characters of the generated text.
    """

    token: Token
    raw: bytes
    top: tuple[bytes, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Usage:
    """`cached_tokens` are those of the prompts that did not have to be computed; None: that is not known yet."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None

    def plain(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return usage


class Shape(Protocol):
    """One endpoint's way to write choices."""

    prefix: str
    whole_object: str
    chunk_object: str
    prompts_of_choices: bool
    """Where what is told of prompts stands: with a choice, as each may have another one, or beside the choices."""

    def choice(self, index: int, text: str, logprobs: Any, finish: str) -> dict[str, Any]:
        """A choice of a response that is not streamed."""
        ...

    def opening(self, index: int) -> str | None:
        """A choice to stream before any text, as JSON but for its end."""
        ...

    def chunk_parts(self, index: int) -> tuple[str, str]:
        """What stands before and after the text in a streamed choice, up to its logprobs, as JSON."""
        ...

    def logprobs(self, tokens: Sequence[SpelledToken], offset: int) -> dict[str, Any]:
        """The logprobs object of `tokens`; the generated text begins at character `offset` of what is shown."""
        ...


class CompletionShape:
    prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    prompts_of_choices = True

    def choice(self, index: int, text: str, logprobs: Any, finish: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> str | None:
        return None

    def chunk_parts(self, index: int) -> tuple[str, str]:
        return f'{{"index":{index},"text":', ""

    def logprobs(self, tokens: Sequence[SpelledToken], offset: int) -> dict[str, Any]:
        return {
            "tokens": [_text(one.raw) for one in tokens],
            "token_logprobs": [_logprob(one.token) for one in tokens],
            "top_logprobs": [None if one.token.logprob is None else self._top(one) for one in tokens],
            "text_offset": [offset + one.start for one in tokens],
        }

    def _top(self, spelled: SpelledToken) -> dict[str, float]:
        """By text; the sampled token is always among them, and of two with one text the likelier stays."""
        top: dict[str, float] = {}
        for one, raw in zip(spelled.token.top, spelled.top, strict=True):
            top.setdefault(_text(raw), finite(one.logprob))
        top.setdefault(_text(spelled.raw), finite(spelled.token.logprob))
        return top


class ChatShape:
    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prompts_of_choices = False

    def choice(self, index: int, text: str, logprobs: Any, finish: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def message(self, index: int, message: Message, logprobs: Any, finish: str) -> dict[str, Any]:
        """A choice whose answer is told into reasoning, content and calls."""
        content, reasoning = "".join(message.content), "".join(message.reasoning)
        plain: dict[str, Any] = {"role": "assistant", "content": content or None, "refusal": None}
        if not message.calls:
            plain["content"] = content
        else:
            plain["tool_calls"] = [call_json(call) for call in message.calls]
        if message.reasoning:
            plain |= _reasoning(reasoning)
        return {"index": index, "message": plain, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> str | None:
        return f'{{"index":{index},"delta":{{"role":"assistant","content":""}}'

    def chunk_parts(self, index: int) -> tuple[str, str]:
        return f'{{"index":{index},"delta":{{"content":', "}"

    def logprobs(self, tokens: Sequence[SpelledToken], offset: int) -> dict[str, Any]:
        return {"content": [entry(spelled) for spelled in tokens], "refusal": None}


def call_json(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": "".join(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def delta_json(delta: Delta, message: Message) -> dict[str, Any]:
    """A delta of `message` in OpenAI's form."""
    match delta:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return _reasoning(text)
        case CallBegin(index, name):
            function = {"name": name, "arguments": ""}
            begun = {"index": index, "id": message.calls[index].id, "type": "function", "function": function}
            return {"tool_calls": [begun]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _reasoning(text: str) -> dict[str, Any]:
    """By the name that vLLM has for it now, and by the one that it, SGLang and DeepSeek had first."""
    return {"reasoning": text, "reasoning_content": text}


class ChunkWriter:
    """Makes the server-sent events of one choice."""

    __slots__ = ("_after", "_before", "_end", "_head", "_index", "_plain", "_prompt_tokens", "opening")

    def __init__(
        self, shape: Shape, answer: Answer, index: int, prompt_tokens: int, prompt_ids: Json | None = None
    ) -> None:
        """`prompt_ids`: the prompt's, if they are to be shown."""
        output = answer.output
        head = (
            f'data: {{"id":{_escape(answer.id)},"object":"{shape.chunk_object}",'
            f'"created":{answer.created},"model":{_escape(answer.model)},"choices":['
        )
        self._prompt_tokens = prompt_tokens
        self._head, self._index = head, index
        self._end: str | None = ',"usage":null}\n\n' if output.include_usage else "}\n\n"
        """None: every chunk has other figures."""
        if output.continuous_usage:
            self._end = None
        before, self._after = shape.chunk_parts(index)
        self._before = head + before
        self._plain = f'{self._after},"logprobs":null,"finish_reason":null}}]'
        first = shape.opening(index)
        if first is None and prompt_ids is not None:
            first = f'{before}""{self._after}'
        self.opening = b"" if first is None else self._first(head + first, shape, prompt_ids)

    def text(self, text: str, generated: int) -> bytes:
        """A chunk with nothing but text. `generated` tokens so far."""
        return (self._before + _escape(text) + self._plain + (self._end or self._usage(generated))).encode(
            "ascii"
        )

    def full(
        self,
        text: str,
        generated: int,
        logprobs: Any,
        finish: str | None,
        token_ids: Sequence[int] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> bytes:
        """`more`: members of the choice beside these."""
        ids = "" if token_ids is None else f',"token_ids":{_dumps(list(token_ids))}'
        if more:
            ids += f",{_dumps(more)[1:-1]}"
        told = logprobs if isinstance(logprobs, Json) else _dumps(logprobs)
        rest = f'{self._after},"logprobs":{told},"finish_reason":{_dumps(finish)}{ids}}}]'
        return f"{self._before}{_escape(text)}{rest}{self._end or self._usage(generated)}".encode("ascii")

    def delta(
        self,
        delta: dict[str, Any],
        generated: int,
        logprobs: Any,
        finish: str | None,
        token_ids: Sequence[int] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> bytes:
        """A chunk of a message that is not content alone."""
        choice = {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        if token_ids is not None:
            choice["token_ids"] = list(token_ids)
        choice |= more or {}
        return f"{self._head}{_dumps(choice)}]{self._end or self._usage(generated)}".encode("ascii")

    def _first(self, start: str, shape: Shape, prompt_ids: Json | None) -> bytes:
        ids = "" if prompt_ids is None else f',"prompt_token_ids":{prompt_ids}'
        mine, beside = (ids, "") if shape.prompts_of_choices else ("", ids)
        rest = f'{start},"logprobs":null,"finish_reason":null{mine}}}]{beside}'
        return f"{rest}{self._end or self._usage(0)}".encode("ascii")

    def _usage(self, generated: int) -> str:
        return f',"usage":{_dumps(Usage(self._prompt_tokens, generated).plain())}}}\n\n'


def usage_chunk(shape: Shape, answer: Answer, usage: Usage) -> bytes:
    """The last chunk of `stream_options.include_usage`: no choices, but the totals."""
    return sse({**_envelope(answer, shape.chunk_object), "choices": [], "usage": usage.plain()})


def ids_json(ids: Sequence[int]) -> Json:
    """HAZARD: for a long prompt some milliseconds. It is the same for all choices."""
    return Json(_dumps(list(ids)))


async def logprobs_json(shape: Shape, tokens: Sequence[SpelledToken], offset: int, turns: Turns) -> Json:
    """`shape.logprobs(tokens, offset)` as JSON. Others have their turn of the event loop every few tokens."""
    lists: dict[str, list[str]] = {}
    rest: dict[str, Any] = {}
    for start in range(0, max(1, len(tokens)), _TOKENS_A_TURN):
        part = tokens[start : start + _TOKENS_A_TURN]
        found = await turns.run(partial(_logprobs_json, shape, part, offset))
        for name, value in found.items():
            if isinstance(value, Json):
                lists.setdefault(name, []).append(value[1:-1])
            else:
                rest[name] = value
    return as_object(
        {name: Json(f"[{','.join(filter(None, parts))}]") for name, parts in lists.items()} | rest
    )


def _logprobs_json(shape: Shape, tokens: Sequence[SpelledToken], offset: int) -> dict[str, Any]:
    """`shape.logprobs(tokens, offset)` with each list as JSON."""
    found = shape.logprobs(tokens, offset)
    return {name: Json(_dumps(value)) if isinstance(value, list) else value for name, value in found.items()}


def as_object(fields: Mapping[str, Any]) -> Json:
    parts = [
        f"{_dumps(name)}:{value if isinstance(value, Json) else _dumps(value)}"
        for name, value in fields.items()
    ]
    return Json(f"{{{','.join(parts)}}}")


def whole(
    shape: Shape, answer: Answer, choices: Sequence[Json], usage: Usage, beside: Mapping[str, Json]
) -> Iterator[str]:
    """The body of a response that is not streamed, in pieces, ASCII. `beside`: more members, JSON already."""
    yield _dumps({**_envelope(answer, shape.whole_object), "choices": []})[:-2]
    for place, choice in enumerate(choices):
        if place:
            yield ","
        yield choice
    yield f'],"usage":{_dumps(usage.plain())}'
    for name, value in beside.items():
        yield f",{_dumps(name)}:{value}"
    yield "}"


def sse(body: dict[str, Any]) -> bytes:
    return f"data: {_dumps(body)}\n\n".encode("ascii")


def _envelope(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model}


def finite(logprob: float | None) -> float:
    """JSON has neither NaN nor infinity."""
    return logprob if logprob is not None and logprob > _LEAST_LOGPROB else _LEAST_LOGPROB


def _logprob(token: Token) -> float | None:
    """None of a prompt's first token."""
    return None if token.logprob is None else finite(token.logprob)


def entry(spelled: SpelledToken) -> dict[str, Any]:
    """As conversations and responses have it."""
    others = zip(spelled.token.top, spelled.top, strict=True)
    top = [_entry(raw, one.logprob) for one, raw in others]
    return {**_entry(spelled.raw, spelled.token.logprob), "top_logprobs": top}


def _entry(raw: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _text(raw), "logprob": finite(logprob), "bytes": list(raw)}


def _text(raw: bytes) -> str:
    """Part of a character shows as U+FFFD."""
    return raw.decode("utf-8", "replace")
