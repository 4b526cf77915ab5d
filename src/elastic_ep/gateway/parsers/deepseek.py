"""Calls between special tokens: DeepSeek's formats, and Kimi's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from elastic_ep.gateway.parsers.base import Reading, TextReader, Tool

_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_FENCE, _FENCE_END = "```json\n", f"```{_CALL_END}"


class SectionedCalls(TextReader):
    """A section of calls, each with a mark before it and one behind it."""

    begin, end, call = "", "", ""

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        super().__init__()

    def _read(self) -> Reading[None]:
        while mark := (yield from self._upto(self._content, self.begin)):
            self._keep(mark)
            yield from self._blanks()
            while (yield from self._goes_on(self.call)):
                if not (yield from self._call()):
                    break
                yield from self._blanks()
            if self._raw is not None:
                self._give_back()
            yield from self._goes_on(self.end)

    @abstractmethod
    def _call(self) -> Reading[bool]:
        """What follows a call's first mark. False: it is none, or does not end."""


class DeepSeekV31(SectionedCalls):
    """Name, separator, arguments."""

    begin, end, call = _BEGIN, _END, _CALL

    def _call(self) -> Reading[bool]:
        name, mark = yield from self._name(_SEPARATOR)
        if not name or not mark:
            return False
        tell = self._arguments(self._begin(name))
        return bool((yield from self._upto(tell, _CALL_END)))


class DeepSeekV3(DeepSeekV31):
    """The word "function", separator, name, arguments as a fenced block; as R1 writes it, too."""

    def _call(self) -> Reading[bool]:
        _, mark = yield from self._name(_SEPARATOR)
        name, end = yield from self._name("\n")
        if not mark or not name or not end:
            return False
        tell = self._arguments(self._begin(name))
        yield from self._blanks()
        yield from self._goes_on(_FENCE)
        ends = (f"\n{_FENCE_END}", _FENCE_END, f"\n{_CALL_END}", _CALL_END)
        return bool((yield from self._upto(tell, *ends)))


class KimiK2(SectionedCalls):
    """`functions.NAME:NUMBER`, a mark, arguments."""

    begin, end, call = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"

    def _call(self) -> Reading[bool]:
        header, mark = yield from self._name("<|tool_call_argument_begin|>")
        name, _, number = header.strip().removeprefix("functions.").rpartition(":")
        if not mark or not name or not number.isdecimal():
            return False
        tell = self._arguments(self._begin(name))
        yield from self._blanks()
        return bool((yield from self._upto(tell, "<|tool_call_end|>")))
