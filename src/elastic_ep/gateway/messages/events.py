"""From the deltas of an answer to the events and the object of a message. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from elastic_ep.gateway.parsers.base import CallArguments, CallBegin, Content, Delta, Reasoning
from elastic_ep.gateway.shapes import Usage

_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class MessageWriter:
    """Every method that tells something returns events, in order, as server-sent events are written."""

    def __init__(self, message_id: str, model: str, new_id: Callable[[], str]) -> None:
        self._id = message_id
        self._model = model
        self._new_id = new_id
        self._blocks: list[dict[str, Any]] = []
        self._pieces: list[str] = []
        """Of the last block, which is open if there are any, even empty ones."""
        self._open = False
        self._calls = False

    def begin(self, prompt_tokens: int) -> list[bytes]:
        message = self._message(None, None, _usage(Usage(prompt_tokens, 0)))
        return [event("message_start", message=message), event("ping")]

    def push(self, deltas: Iterable[Delta]) -> list[bytes]:
        events: list[bytes] = []
        for delta in deltas:
            match delta:
                case Content(text):
                    events += self._switch({"type": "text", "text": ""})
                    events.append(self._delta({"type": "text_delta", "text": text}, text))
                case Reasoning(text):
                    events += self._switch({"type": "thinking", "thinking": "", "signature": ""})
                    events.append(self._delta({"type": "thinking_delta", "thinking": text}, text))
                case CallBegin(_, name):
                    block = {"type": "tool_use", "id": f"toolu_{self._new_id()}", "name": name, "input": {}}
                    events += self._close() + self._begin(block)
                    self._calls = True
                case CallArguments(_, text):
                    events.append(self._delta({"type": "input_json_delta", "partial_json": text}, text))
        return events

    def end(self, finish: str, stopped_by: str | None, usage: Usage) -> list[bytes]:
        """OpenAI's `finish`, and the stop string that was met."""
        events = self._close()
        reason = self._reason(finish, stopped_by)
        self._whole = self._message(reason, stopped_by, _usage(usage))
        delta = {"stop_reason": reason, "stop_sequence": stopped_by}
        return [*events, event("message_delta", delta=delta, usage=_usage(usage)), event("message_stop")]

    def message(self) -> str:
        """The object as JSON, after the end."""
        return _dumps(self._whole)

    def _reason(self, finish: str, stopped_by: str | None) -> str:
        if finish == "length":
            return "max_tokens"
        if self._calls:
            return "tool_use"
        return "end_turn" if stopped_by is None else "stop_sequence"

    def _message(self, reason: str | None, stopped_by: str | None, usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": self._blocks,
            "stop_reason": reason, "stop_sequence": stopped_by, "usage": usage,
        }  # fmt: skip

    def _switch(self, block: dict[str, Any]) -> list[bytes]:
        if self._open and self._blocks[-1]["type"] == block["type"]:
            return []
        return self._close() + self._begin(block)

    def _begin(self, block: dict[str, Any]) -> list[bytes]:
        begun = event("content_block_start", index=len(self._blocks), content_block=block)
        self._blocks.append(dict(block))
        self._pieces, self._open = [], True
        return [begun]

    def _delta(self, delta: dict[str, Any], text: str) -> bytes:
        self._pieces.append(text)
        return event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _close(self) -> list[bytes]:
        if not self._open:
            return []
        self._open = False
        block, text = self._blocks[-1], "".join(self._pieces)
        if block["type"] == "tool_use":
            block["input"] = _object(text)
        else:
            block[block["type"]] = text
        return [event("content_block_stop", index=len(self._blocks) - 1)]


def _object(text: str) -> dict[str, Any]:
    """A call's arguments; of one that was cut off there is no object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _usage(usage: Usage) -> dict[str, Any]:
    """Of the prompt, what was not there before, and what was."""
    cached = usage.cached_tokens or 0
    return {
        "input_tokens": usage.prompt_tokens - cached, "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0,
    }  # fmt: skip


def event(kind: str, **members: Any) -> bytes:
    return f"event: {kind}\ndata: {_dumps({'type': kind, **members})}\n\n".encode("ascii")
