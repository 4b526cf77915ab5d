"""Where a text is in its grammar: a function of the grammar and the tokens so far, and of nothing else.

So a rank that takes over a text replays its tokens, and goes on as the one before would have.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

Words = npt.NDArray[np.uint32]
"""Masks: bit t % 32 of word t // 32 says whether token t may come next."""
ANY = np.uint32(0xFFFFFFFF)
"""A word with which all may."""


class GuidedText:
    """One text. One thread at a time. `ends` are tokens that may end it when it is complete, beside the vocabulary's."""

    def __init__(self, matcher: LLMatcher, ends: Collection[int] = ()) -> None:
        self.matcher = matcher
        self._ends = tuple(ends)
        self._followed = 0
        self.fault = ""
        """Why it cannot go on; then masks mean nothing."""

    def follow(self, tokens: Sequence[int], first: int = 0) -> None:
        """The text is `tokens` from `first` on, of which it has seen the beginning."""
        new = self.unseen(tokens, first)
        if new and not self.matcher.consume_tokens(list(new)):
            self.note_fault()

    def unseen(self, tokens: Sequence[int], first: int = 0) -> Sequence[int]:
        """Of the text, which the caller now has the matcher follow."""
        new = tokens[first + self._followed :]
        self._followed += len(new)
        return new

    def mask_into(self, words: Words) -> None:
        """Which tokens may come next. `words` is contiguous."""
        if not self.fault:
            self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            self.masked(words)

    def masked(self, words: Words) -> None:
        """`words` are what the matcher makes of it: what it does not know is added."""
        if self.matcher.is_stopped() and self.matcher.is_error():
            self.note_fault()
        elif self._ends and self.matcher.is_accepting():
            for token in self._ends:
                words[token >> 5] |= np.uint32(1 << (token & 31))

    def note_fault(self) -> None:
        self.fault = self.fault or _reason(self.matcher)


def _reason(matcher: LLMatcher) -> str:
    """Without what it may quote of the text."""
    return f"its text cannot be continued by its grammar ({matcher.stop_reason()})"
