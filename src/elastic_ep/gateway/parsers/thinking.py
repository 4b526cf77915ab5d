"""Reasoning between two marks, before the answer."""

from __future__ import annotations

from elastic_ep.gateway.parsers.base import Reading, TextReader

BEGIN, END = "<think>", "</think>"


class Thinking(TextReader):
    """`<think>...</think>` at the beginning is reasoning; line ends around it belong to neither side.

    `begun`: the prompt has the first mark, or the model leaves it out; without an end all is reasoning then.
    """

    def __init__(self, *, begun: bool) -> None:
        super().__init__()
        self._begun = begun
        self._held = ""

    def _read(self) -> Reading[None]:
        self._keep("")
        yield from self._blanks()
        if not (yield from self._goes_on(BEGIN)) and not self._begun:
            self._give_back()
            return
        self._raw = None
        yield from self._lines()
        yield from self._upto(self._reason, END)
        self._held = ""
        yield from self._lines()

    def _lines(self) -> Reading[None]:
        while (yield from self._goes_on("\n")):
            pass

    def _reason(self, text: str) -> None:
        kept = text.rstrip("\n")
        if kept:
            self._tell("reasoning", 0, self._held + kept)
            self._held = ""
        self._held += text[len(kept) :]
