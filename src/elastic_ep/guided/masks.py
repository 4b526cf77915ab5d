"""A rank's masks: which tokens may come next in each guided text, computed while the step is.

The tokens that a step goes on from are known before it begins, so its masks are asked for first (`start`) and waited
for last (`wait`). Where the forward thread computes the step itself, masks are computed on another. Where a device does,
they are by the forward thread while it would wait for the device: of two threads each would take the interpreter's lock
from the other for every text, in steps that may be shorter than a millisecond. Grammars are compiled on another thread: a
text takes part in steps from when its own is ready.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher

from elastic_ep.guided.grammars import LIMITS, to_lark
from elastic_ep.guided.shared import Guide
from elastic_ep.guided.text import GuidedText, Words
from elastic_ep.wire.messages import Grammar

WAIT_S = 10.0
"""For the masks of a step, each of which llguidance bounds to some milliseconds."""
_KEPT = 64
"""Compiled grammars: to copy one takes microseconds, to compile it milliseconds."""


class Asked(NamedTuple):
    """The next token of `text`, which is `tokens` from `first` on. Nobody changes `tokens` before the wait."""

    text: GuidedText
    tokens: Sequence[int]
    first: int
    row: int


class MaskMaker:
    """Its threads begin with the first grammar. `beside`: masks are computed on one of them."""

    def __init__(self, guide: Guide, *, beside: bool = True) -> None:
        self.words = guide.words
        self._tokenizer = guide.tokenizer
        self._special = guide.special
        self._compiler = ThreadPoolExecutor(1, "grammars")
        self._masks = ThreadPoolExecutor(1, "masks")
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._beside = beside
        self._running: Future[None] | None = None
        self._asked: tuple[Sequence[Asked], Words] | None = None

    def open(self, grammar: Grammar, emitted: Sequence[int], stops: Collection[int]) -> Future[GuidedText]:
        """A text of which there is the beginning `emitted`. The future raises ValueError if it cannot go on."""
        return self._compiler.submit(self._open, grammar, tuple(emitted), self._special.intersection(stops))

    def _open(self, grammar: Grammar, emitted: tuple[int, ...], ends: frozenset[int]) -> GuidedText:
        text = GuidedText(self._matcher(grammar), ends)
        text.follow(emitted)
        text.mask_into(np.empty(self.words, np.uint32))  # the first one takes longest
        if text.fault:
            raise ValueError(text.fault)
        return text

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        known = self._compiled.get(grammar)
        if known is None:
            known = LLMatcher(self._tokenizer, to_lark(grammar), log_level=0, limits=LIMITS)
            if known.is_error():
                raise ValueError("its grammar cannot be compiled")
            self._compiled[grammar] = known
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return known.deep_copy()

    def start(self, asked: Sequence[Asked], words: Words) -> None:
        """Compute them, into the rows of `words` [n, self.words]."""
        if self._beside:
            self._running = self._masks.submit(_fill, asked, words)
        else:
            self._asked = asked, words

    def wait(self) -> None:
        """Until they are there. Raises TimeoutError."""
        running, self._running = self._running, None
        if running is not None:
            running.result(WAIT_S)
        asked, self._asked = self._asked, None
        if asked is not None:
            _fill(*asked)

    def close(self) -> None:
        for pool in (self._compiler, self._masks):
            pool.shutdown(wait=False, cancel_futures=True)


def _fill(asked: Sequence[Asked], words: Words) -> None:
    for text, tokens, first, row in asked:
        text.follow(tokens, first)
        text.mask_into(words[row])
