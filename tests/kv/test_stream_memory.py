"""Scheduler, page table and shelf together, with what stands in each page: nobody goes on from others' tokens.

A number stands for the keys and values of a token: it depends on all tokens up to it, as they do. Copies come to their
end at any time, fetches page by page; steps are poisoned, requests cancelled, ranks die, the shelf loses pages.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastic_ep.config import EngineLimits
from elastic_ep.engine.scheduler import Chunk, Fetch, Scheduler, Sequence
from elastic_ep.kv.names import PageName, extend
from elastic_ep.wire.messages import SamplingParams

PAGE = 2
LONGEST = 16
PARAMS = SamplingParams(max_tokens=99)
ROOT = PageName(16)
GARBAGE = -1


def values(tokens: list[int]) -> list[int]:
    """What stands for the keys and values of each of `tokens`."""
    found, value = [], 7
    for token in tokens:
        value = hash((value, token))
        found.append(value)
    return found


class StreamMemory(RuleBasedStateMachine):
    """One rank, its successors, and a shelf that outlives them."""

    @initialize(
        pages=st.integers(8, 14), seats=st.integers(1, 4), tokens=st.integers(4, 20), share=st.booleans()
    )
    def begin(self, pages: int, seats: int, tokens: int, share: bool) -> None:
        self.limits = EngineLimits(LONGEST, seats, max(seats, tokens), PAGE, pages)
        self.share = share
        self.shelf: dict[PageName, list[int]] = {}
        self.wanted: dict[int, list[int]] = {}
        """Tokens of each live request."""
        self.prompts: dict[int, int] = {}
        self.numbers = 0
        self.computed = 0
        self.launch()

    def launch(self) -> None:
        self.scheduler = Scheduler(
            self.limits, root=ROOT, share_prefixes=self.share, on_shelf=self.shelf.__contains__
        )
        self.cells: dict[int, list[int]] = {}
        self.stores: deque[tuple[PageName, int]] = deque()
        self.fetches: deque[tuple[Fetch, int]] = deque()
        self.again: list[Chunk] = []
        for number, tokens in self.wanted.items():
            self.scheduler.add(Sequence(number, list(tokens), self.prompts[number], PARAMS, 0, 0))

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def request(self, prompt: list[int]) -> None:
        if len(self.wanted) < 6:
            self.numbers += 1
            self.wanted[self.numbers], self.prompts[self.numbers] = list(prompt), len(prompt)
            self.scheduler.add(Sequence(self.numbers, list(prompt), len(prompt), PARAMS, 0, 0))

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.wanted))))

    def end(self, number: int) -> None:
        del self.wanted[number]
        sequence = self.scheduler.find(number)
        assert sequence is not None
        self.scheduler.remove(sequence)
        self.again = [chunk for chunk in self.again if chunk.sequence is not sequence]

    @rule(poisoned=st.booleans(), token=st.integers(0, 1))
    def step(self, poisoned: bool, token: int) -> None:
        chunks = self.again or self.scheduler.schedule()
        self.take_copies()
        for chunk in chunks:
            self.compute(chunk, poisoned)
        self.again = chunks if poisoned else []
        if poisoned:
            return
        self.scheduler.commit(chunks)
        self.computed += sum(chunk.length for chunk in chunks)
        for chunk in chunks:
            if chunk.samples:
                sequence = chunk.sequence
                sequence.tokens.append(token)
                self.wanted[sequence.request_id].append(token)
                if len(sequence.tokens) >= LONGEST:
                    self.end(sequence.request_id)

    @rule()
    def take_copies(self) -> None:
        copies = self.scheduler.take_copies()
        self.stores += copies.store
        self.fetches += [(fetch, 0) for fetch in copies.fetch]

    def compute(self, chunk: Chunk, poisoned: bool) -> None:
        sequence = chunk.sequence
        right = values(sequence.tokens)
        for place in range(chunk.start):
            assert self.cell(sequence, place)[place % PAGE] == right[place], (
                "it would go on from another's tokens"
            )
        for place in range(chunk.start, chunk.start + chunk.length):
            self.cell(sequence, place)[place % PAGE] = GARBAGE if poisoned else right[place]

    def cell(self, sequence: Sequence, place: int) -> list[int]:
        return self.cells.setdefault(sequence.pages[place // PAGE], [GARBAGE] * PAGE)

    @precondition(lambda self: self.stores)
    @rule(dropped=st.booleans())
    def store(self, dropped: bool) -> None:
        name, page = self.stores.popleft()
        if not dropped:
            assert name not in self.shelf or self.shelf[name] == self.cells[page], "two contents of one name"
            self.shelf[name] = list(self.cells[page])
        self.scheduler.stored([page])

    @precondition(lambda self: self.fetches)
    @rule(torn=st.booleans())
    def fetch(self, torn: bool) -> None:
        """One page of the oldest."""
        fetch, good = self.fetches.popleft()
        content = None if torn or good == len(fetch.names) else self.shelf.get(fetch.names[good])
        if content is None:
            self.scheduler.fetched(fetch.ticket, good)
        else:
            self.cells[fetch.pages[good]] = list(content)
            self.fetches.appendleft((fetch, good + 1))

    @precondition(lambda self: self.shelf)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        del self.shelf[data.draw(st.sampled_from(sorted(self.shelf)))]

    @rule()
    def die(self) -> None:
        self.launch()

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        scheduler.pages.check()
        everyone = [*scheduler.running, *scheduler.suspects, *scheduler.fetching.values()]
        assert len(everyone) + len(scheduler.waiting) == len(self.wanted)
        assert len(everyone) <= self.limits.max_num_seqs
        held: list[int] = [page for sequence in everyone for page in sequence.pages]
        held += [page for _, page in self.stores] + [
            page for fetch, _ in self.fetches for page in fetch.pages
        ]
        copies: Any = scheduler._copies
        held += [page for _, page in copies.store] + [page for fetch in copies.fetch for page in fetch.pages]
        assert {page: held.count(page) for page in held} == scheduler.pages._holders
        for sequence in everyone:
            assert sequence.full * PAGE <= max(sequence.computed, len(sequence.tokens))

    def teardown(self) -> None:
        """Undisturbed from now on, everyone comes to its end."""
        for _ in range(2000 if hasattr(self, "scheduler") else 0):
            while self.stores:
                self.store(dropped=True)
            while self.fetches:
                self.fetch(torn=False)
            if not self.wanted:
                assert self.scheduler.pages.held == 0
                return
            self.step(poisoned=False, token=1)
        assert not getattr(self, "wanted", None), "never done"


StreamMemory.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=60)
TestStreamMemory = StreamMemory.TestCase


def test_a_lost_rank_costs_a_stream_its_last_page() -> None:
    """Whatever it had, prompt or answer: its next rank computes a page at most, if the shelf had time."""
    world = StreamMemory()
    world.begin(pages=8, seats=2, tokens=20, share=True)
    world.request([0, 1, 0, 1, 1])
    for _ in range(5):
        world.step(poisoned=False, token=1)
        world.take_copies()
        while world.stores:
            world.store(dropped=False)
    world.computed = 0
    world.die()
    world.step(poisoned=False, token=1)
    assert world.computed == 0, "its pages are on their way"
    while world.fetches:
        world.fetch(torn=False)
    world.step(poisoned=False, token=1)
    assert 1 <= world.computed <= PAGE


def test_names_do_not_depend_on_how_they_were_extended() -> None:
    tokens = [3, 1, 4, 1, 5, 9, 2]
    at_once: list[PageName] = []
    extend(at_once, ROOT, tokens, PAGE)
    bit_by_bit: list[PageName] = []
    for length in range(len(tokens) + 1):
        extend(bit_by_bit, ROOT, tokens[:length], PAGE)
    assert at_once == bit_by_bit
    assert len(at_once) == len(set(at_once)) == 3
