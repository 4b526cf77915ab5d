"""From the deltas of an answer to the events and the object of a response. Pure: no clock, no ids of its own making."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.parsers.base import CallArguments, CallBegin, Content, Delta, Reasoning
from elastic_ep.gateway.responses.body import About
from elastic_ep.gateway.shapes import Json, SpelledToken, Usage, as_object, entry

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_NONE = Json("[]")
_PREFIXES = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}


class ResponseWriter:
    """Every method that tells something returns events, in order, as server-sent events are written."""

    def __init__(
        self, response_id: str, created: int, model: str, about: About, new_id: Callable[[], str]
    ) -> None:
        """`new_id`: for items and calls, without a prefix."""
        self.id = response_id
        self.status: Status = "queued"
        self._created = created
        self._model = model
        self._head = about.head
        self._new_id = new_id
        self._sequence = 0
        self._items: list[str] = []
        """Those that are done, as JSON."""
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        """Text or arguments of the open one."""
        self._logprobs: list[str] = []
        """Of its tokens, as JSON."""
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None
        self._incomplete: dict[str, str] | None = None
        self._reasoning_tokens = 0

    # What is told

    def begin(self) -> list[bytes]:
        created = self._of_response("response.created", "in_progress")
        return [created, self._of_response("response.in_progress", "in_progress")]

    def queue(self) -> list[bytes]:
        """Instead, of one that nobody waits for."""
        return [
            self._of_response("response.created", "queued"),
            self._of_response("response.queued", "queued"),
        ]

    def start(self) -> list[bytes]:
        """After `queue`."""
        return [self._of_response("response.in_progress", "in_progress")]

    def push(
        self, deltas: Iterable[Delta], generated: int, tokens: Sequence[SpelledToken] = ()
    ) -> list[bytes]:
        """`generated`: tokens so far. `tokens`: those since the last time, if log-probabilities are told."""
        events: list[bytes] = []
        for delta in deltas:
            match delta:
                case Content(text):
                    switched = self._switch("message")
                    own = [_dumps(entry(one)) for one in (_of_text(tokens, text) if switched else tokens)]
                    self._logprobs += own
                    told = Json(f"[{','.join(own)}]")
                    events += switched + self._text("response.output_text.delta", text, logprobs=told)
                case Reasoning(text):
                    self._reasoning_tokens = generated
                    events += self._switch("reasoning") + self._text("response.reasoning_text.delta", text)
                case CallBegin(_, name):
                    events += self._close() + self._begin("function_call", name)
                case CallArguments(_, text):
                    self._pieces.append(text)
                    kind = "response.function_call_arguments.delta"
                    events.append(self._event(kind, **self._place(), delta=text))
            tokens = ()  # what is no text of the answer has none
        return events

    def end(self, finish: str, usage: Usage) -> list[bytes]:
        """OpenAI's `finish`; one that met its bound is incomplete, and so is the item that it met it in."""
        cut = finish == "length"
        events = self._close("incomplete" if cut else "completed")
        self._usage = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens or 0, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if not cut:
            return [*events, self._of_response("response.completed", "completed")]
        self._incomplete = {"reason": "max_output_tokens"}
        return [*events, self._of_response("response.incomplete", "incomplete")]

    def fail(self, error: ApiError) -> list[bytes]:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._error = {"code": code, "message": error.message}
        events = self._close("incomplete")
        return [*events, self._of_response("response.failed", "failed")]

    def cancel(self) -> list[bytes]:
        """There is no event for it."""
        events = self._close("incomplete")
        self.status = "cancelled"
        return events

    @property
    def output(self) -> str:
        """The items that are done, a JSON array."""
        return f"[{','.join(self._items)}]"

    def response(self) -> str:
        """The object as JSON."""
        front = _dumps(
            {"id": self.id, "object": "response", "created_at": self._created, "status": self.status,
             "model": self._model, "error": self._error, "incomplete_details": self._incomplete,
             "usage": self._usage}
        )  # fmt: skip
        return f'{front[:-1]},"output":{self.output},{self._head}}}'

    # Items

    def _switch(self, kind: str) -> list[bytes]:
        if self._open is not None and self._open["type"] == kind:
            return []
        return self._close() + self._begin(kind)

    def _begin(self, kind: str, name: str = "") -> list[bytes]:
        item: dict[str, Any] = {"id": _PREFIXES[kind] + self._new_id(), "type": kind, "status": "in_progress"}
        match kind:
            case "function_call":
                item |= {"call_id": f"call_{self._new_id()}", "name": name, "arguments": ""}
            case "message":
                item |= {"role": "assistant", "content": []}
            case _:
                item |= {"summary": [], "content": []}
        self._open, self._pieces, self._logprobs = item, [], []
        added = self._event("response.output_item.added", output_index=len(self._items), item=item)
        if kind == "function_call":
            return [added]
        part = self._event(
            "response.content_part.added", **self._place(), content_index=0, part=_part(kind, "")
        )
        return [added, part]

    def _text(self, kind: str, text: str, **more: Any) -> list[bytes]:
        self._pieces.append(text)
        return [self._event(kind, **self._place(), content_index=0, delta=text, **more)]

    def _close(self, status: str = "completed") -> list[bytes]:
        item = self._open
        if item is None:
            return []
        text, place = "".join(self._pieces), self._place()
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            kind = "response.function_call_arguments.done"
            events = [self._event(kind, **place, name=item["name"], arguments=text)]
        else:
            logprobs = Json(f"[{','.join(self._logprobs)}]")
            part = _part(item["type"], text, logprobs)
            item["content"] = Json(f"[{part}]")
            told: dict[str, Any] = {"logprobs": logprobs} if item["type"] == "message" else {}
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            events = [
                self._event(f"response.{kind}.done", **place, content_index=0, text=text, **told),
                self._event("response.content_part.done", **place, content_index=0, part=part),
            ]
        done = as_object(item)
        events.append(self._event("response.output_item.done", output_index=len(self._items), item=done))
        self._items.append(done)
        self._open = None
        return events

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._items)}

    def _of_response(self, kind: str, status: Status) -> bytes:
        self.status = status
        return self._written(kind, f'"response":{self.response()}')

    def _event(self, kind: str, **members: Any) -> bytes:
        return self._written(kind, as_object(members)[1:-1])

    def _written(self, kind: str, members: str) -> bytes:
        number, self._sequence = self._sequence, self._sequence + 1
        data = f'{{"type":"{kind}","sequence_number":{number},{members}}}'
        return f"event: {kind}\ndata: {data}\n\n".encode("ascii")


def _part(kind: str, text: str, logprobs: Json = _NONE) -> Json:
    if kind == "message":
        return as_object({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
    return as_object({"type": "reasoning_text", "text": text})


def _of_text(tokens: Sequence[SpelledToken], text: str) -> Sequence[SpelledToken]:
    """Those of an answer that begins with `text`: before them there may be some that end what came before it."""
    first, left = len(tokens), len(text.encode())
    while first and len(tokens[first - 1].raw) <= left:
        first -= 1
        left -= len(tokens[first].raw)
    return tokens[first:]
