"""An answer as reasoning, content and calls of tools, put together again from its deltas."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from elastic_ep.gateway.parsers.base import CallArguments, CallBegin, Content, Delta, Reasoning
from elastic_ep.gateway.parsers.registry import NAMED, MessageForm, MessageReader


@dataclass(slots=True)
class Call:
    """A call of a tool, as far as it has come."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


class Message:
    """What has come of one answer. `form` None: all of it is content."""

    def __init__(self, form: MessageForm | None) -> None:
        self._reader = MessageReader(form or MessageForm())
        self._named = form is not None and form.calls == NAMED
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[Call] = []

    def push(self, text: str) -> list[Delta]:
        return self._kept(self._reader.push(text))

    def finish(self) -> list[Delta]:
        return self._kept(self._reader.finish())

    def reason(self, finish: str) -> str:
        """OpenAI's finish_reason. A call that was cut off is told by "length"; one that was asked for by name, not."""
        return "tool_calls" if self.calls and finish == "stop" and not self._named else finish

    def _kept(self, deltas: list[Delta]) -> list[Delta]:
        for delta in deltas:
            match delta:
                case Content(text):
                    self.content.append(text)
                case Reasoning(text):
                    self.reasoning.append(text)
                case CallBegin(_, name):
                    self.calls.append(Call(f"call_{secrets.token_hex(12)}", name))
                case CallArguments(_, text):
                    self.calls[-1].arguments.append(text)
        return deltas
