"""gpt-oss's format: messages, each with a channel and perhaps a recipient. Reasoning and calls are told by one parser."""

from __future__ import annotations

import re
from collections.abc import Sequence

from elastic_ep.gateway.parsers.base import Reading, Tell, TextReader, Tool

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_LONGEST_HEADER = 1024


class Harmony(TextReader):
    """`<|channel|>analysis<|message|>...<|end|>`: analysis is reasoning, what goes to `functions.NAME` a call."""

    shows_special = True

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        super().__init__()
        self._reasoned = False

    def _read(self) -> Reading[None]:
        mark = yield from self._goes_on("<|channel|>", "<|start|>")
        while mark:
            self._keep(mark)
            header, begun = yield from self._header(mark)
            if not begun:
                self._give_back()
                return
            yield from self._body(header)
            mark = yield from self._goes_on("<|channel|>", "<|start|>")

    def _header(self, mark: str) -> Reading[tuple[str, bool]]:
        pieces, length = [mark], 0
        while (yield from self._more()) and length < _LONGEST_HEADER:
            if (yield from self._goes_on("<|message|>")):
                return "".join(pieces), True
            pieces.append(self._take(1))
            length += 1
        return "", False

    def _body(self, header: str) -> Reading[None]:
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        self._raw = None
        tell: Tell = self._content
        if recipient is not None:
            index = self._begin(recipient.group(1).removeprefix("functions."))
            tell = self._arguments(index)
            if (yield from self._goes_on(*_ENDS)):
                tell("{}")
                return
        elif channel is not None and channel.group(1) == "analysis":
            tell = self._reason
            self._reason("\n" if self._reasoned else "")
            self._reasoned = True
        if (yield from self._upto(tell, *_ENDS)) == "<|start|>":
            self._at -= len("<|start|>")  # the next message's, whose predecessor did not end

    def _reason(self, text: str) -> None:
        self._tell("reasoning", 0, text)
