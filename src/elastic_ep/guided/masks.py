"""A rank's masks: which tokens may come next in each guided text, computed while the step is.

The tokens that a step goes on from are known before it begins, so its masks are asked for first (`start`) and waited
for last (`wait`). Where the forward thread computes the step itself, masks are computed beside it. Where a device does,
the forward thread has them computed while it would wait for the device: of two threads each would take the interpreter's
lock from the other, in steps that may be shorter than a millisecond. All texts of a step are handed over at once, to
threads that need no such lock: with a vocabulary of 150,000 a mask takes a third of a millisecond. Grammars are compiled
on another thread: a text takes part in steps from when its own is ready.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher

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
    """Its threads begin with the first grammar. `beside`: masks are computed while the thread that asks goes on.
    `threads` compute them."""

    def __init__(self, guide: Guide, *, beside: bool = True, threads: int = 1) -> None:
        self.words = guide.words
        self._tokenizer = guide.tokenizer
        self._special = guide.special
        self._compiler = ThreadPoolExecutor(1, "grammars")
        self._masks = ThreadPoolExecutor(1, "masks")
        self._threads = threads
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
            self._running = self._masks.submit(self._fill, asked, words)
        else:
            self._asked = asked, words

    def wait(self) -> None:
        """Until they are there. Raises TimeoutError."""
        running, self._running = self._running, None
        if running is not None:
            running.result(WAIT_S)
        asked, self._asked = self._asked, None
        if asked is not None:
            self._fill(*asked)

    def close(self) -> None:
        for pool in (self._compiler, self._masks):
            pool.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(self._threads)

    def _fill(self, asked: Sequence[Asked], words: Words) -> None:
        _follow(self._executor, asked)
        going = [one for one in asked if not one.text.fault]
        rows, size = [(one.text.matcher, one.row) for one in going], words.shape[1] * words.itemsize
        if rows:
            self._executor.unsafe_compute_mask_ptr(rows, words.ctypes.data, size, len(words))
        for text, _, _, row in going:
            text.masked(words[row])


def _follow(executor: LLExecutor, asked: Sequence[Asked]) -> None:
    """Each its new tokens: one, but for a text that begins, or whose step is computed again."""
    texts, last = [], []
    for text, tokens, first, _ in asked:
        new = text.unseen(tokens, first)
        if len(new) == 1 and not text.fault:
            texts.append(text)
            last.append((text.matcher, new[0]))
        elif new and not text.matcher.consume_tokens(list(new)):
            text.note_fault()
    for text, followed in zip(texts, executor.consume_token_par(last) if last else (), strict=True):
        if not followed:
            text.note_fault()
