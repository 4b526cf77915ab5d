"""Cutting text at, or behind, the first stop string, whatever pieces the text arrives in."""

from __future__ import annotations

import re
from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that *ends* first in a text (of several that end together, the one that began
    first). That rule, and no rule about beginnings, can be applied while the text is still growing, so the
    cut does not depend on how the text is split into tokens.

    One Knuth-Morris-Pratt automaton a stop string: O(1) a character, and its state is exactly how much text
    must be held back.
    """

    __slots__ = ("_failures", "_first", "_held", "_include", "_states", "_stops")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`stops` must hold no empty string. `include`: the text is cut behind the stop string, not before it."""
        self._include = include
        self._stops = tuple(stops)
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._first = re.compile("|".join(sorted({re.escape(stop[0]) for stop in self._stops}))).search
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain to come before the cut, the stop string that was found)."""
        if not self._held and self._first(text) is None:
            return text, None
        buffer = self._held + text
        for place in range(len(self._held), len(buffer)):
            longest = self._advance(buffer[place])
            if longest:
                self._held = ""
                found = buffer[place + 1 - longest : place + 1]
                return buffer[: place + 1 - (0 if self._include else longest)], found
        keep = len(buffer) - max(self._states)
        self._held = buffer[keep:]
        return buffer[:keep], None

    def finish(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """Take one character; the length of the longest stop string that ends with it, or 0."""
        longest = 0
        for index, stop in enumerate(self._stops):
            state = self._states[index]
            while state and stop[state] != character:
                state = self._failures[index][state]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                longest = max(longest, state)
                state = 0
            self._states[index] = state
        return longest


def _failure_function(stop: str) -> list[int]:
    """At [k]: the length of the longest proper prefix of `stop` that is also a suffix of its first k."""
    failure = [0] * (len(stop) + 1)
    state = 0
    for place in range(1, len(stop)):
        while state and stop[state] != stop[place]:
            state = failure[state]
        if stop[state] == stop[place]:
            state += 1
        failure[place + 1] = state
    return failure
