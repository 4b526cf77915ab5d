"""Continuous batching: which tokens of which sequences the next step computes. Synchronous, no IO, no tensors.

Decodes go first; what is left of the token budget goes to prompts, in chunks, so that a long prompt never holds up the
decodes. Waiting sequences are admitted first come, first served, but those in mid-answer (of a lost rank, say) before new
ones, and only while the pages that are promised to all fit: then nobody who has begun has to wait until another ends.

A sequence that may go on to the end of the context is promised less than it may come to need. If pages run out all the
same, the youngest without output gives its own back, else the youngest, and comes back later: the oldest always advances,
and no request fails for lack of pages.

What nobody has is computed: full pages of committed tokens have names, and who is admitted shares those on the device.
Those that are in host memory only (kv/shelf.py) are copied first, and meanwhile it is not computed. Others make the
copies: `take_copies` says which are wanted, `stored` and `fetched` that they are over.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from elastic_ep.config import EngineLimits
from elastic_ep.guided.text import GuidedText
from elastic_ep.kv.names import NO_PAGE, PageName, extend
from elastic_ep.kv.page_table import PageTable
from elastic_ep.machines.requests.records import HORIZON
from elastic_ep.wire.messages import Assign, SamplingParams


@dataclass(eq=False, slots=True)
class Sequence:
    """A request in progress. `tokens` is prompt and output; the KV cache holds the first `computed` of them."""

    request_id: int
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    seed: int
    choice: int
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    names: list[PageName] = field(default_factory=list)
    """Of its leading full pages, as far as they were needed."""
    full: int = 0
    """How many of `pages` are full and in the KV cache."""
    cached: int | None = None
    """Tokens that need not be computed when it was first admitted."""
    stops: frozenset[int] = frozenset()
    """Tokens that end it."""
    most: int = sys.maxsize
    """Tokens with which it ends, those of the prompt included."""
    alone_until: int = 0
    """Until it has put out so many tokens it is computed in steps of nothing else."""
    guided: GuidedText | None = None
    """Where it is in its grammar, if it has one."""
    given: int = 0
    """Of the prompt's tokens the last ones, which are put out as if they were drawn: see `SamplingParams.given`."""
    untold: int = 0
    """How many of these have not been put out yet."""
    plain_greedy: bool | None = None
    """Whether its tokens are the largest logits, once somebody has looked (sampler.py)."""

    @classmethod
    def of(cls, assign: Assign, eos: frozenset[int], max_model_len: int) -> Sequence:
        params = assign.params
        given, told = len(params.given), len(assign.emitted)
        untold = params.given[told:]
        return cls(
            request_id=assign.request_id,
            tokens=[*assign.prompt, *assign.emitted, *untold],
            prompt_len=len(assign.prompt) + given,
            params=params,
            seed=assign.seed,
            choice=assign.choice,
            stops=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos),
            most=min(len(assign.prompt) + params.max_tokens, max_model_len),
            alone_until=max(0, told - given) + assign.alone if assign.alone else 0,
            given=given,
            untold=len(untold),
        )

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def needed(self) -> int:
        """So many of its tokens need no logits before them: they are the prompt's, or have been put out."""
        return len(self.tokens) - self.untold

    def telling(self, place: int) -> Sequence:
        """From what would be drawn at `place` exactly the token that is there, with its log-probability."""
        params = SamplingParams(
            1, logprobs=self.params.given_logprobs, allowed_token_ids=(self.tokens[place],)
        )
        return Sequence(self.request_id, [], 0, params, 0, 0)


class Chunk(NamedTuple):
    """Compute tokens[start : start + length] of `sequence`. The last one of a chunk yields logits if a token that has not
    been put out comes next: one that is not known, or one that is given. A step may have several chunks of a sequence,
    one behind the other: all keys and values of a layer are written before any is read."""

    sequence: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        return self.start + self.length >= self.sequence.needed

    @property
    def target(self) -> Sequence:
        """What to draw from its logits, if it `samples`."""
        place = self.start + self.length
        return self.sequence if place == len(self.sequence.tokens) else self.sequence.telling(place)


class Fetch(NamedTuple):
    """Copy the pages of these names from the shelf into `pages`, from the first on, as far as they are there."""

    ticket: int
    names: list[PageName]
    pages: list[int]


class Copies(NamedTuple):
    """Wanted between device and shelf. Each page is held until its copy is over."""

    store: list[tuple[PageName, int]]
    fetch: list[Fetch]


class Scheduler:
    """`running` hold pages for all tokens that they have, `suspects` too: of these one is computed by itself in every
    other step, as it may break the device, and then only that one is to blame. `fetching`, by ticket, wait for pages.

    `root` is the name that chains of this model begin with. Without `share_prefixes` no request has pages of another,
    only its own of before. `on_shelf` says whether a page is in host memory; None: none ever is, and none goes there.

    Raises ValueError if one sequence of the greatest length would not fit into the cache.
    """

    def __init__(
        self,
        limits: EngineLimits,
        *,
        root: PageName = NO_PAGE,
        share_prefixes: bool = True,
        on_shelf: Callable[[PageName], bool] | None = None,
    ) -> None:
        self._limits = limits
        self._root = root
        self._share_prefixes = share_prefixes
        self._on_shelf = on_shelf
        self.pages = PageTable(limits.num_pages, limits.page_size)
        if limits.sequence_pages > limits.num_pages:
            raise ValueError(
                f"{limits.num_pages} KV pages of {limits.page_size} tokens cannot hold one sequence of "
                f"{limits.max_model_len} tokens"
            )
        if limits.max_num_batched_tokens < limits.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens must be at least max_num_seqs: every decode fits into a step"
            )
        self.running: list[Sequence] = []  # oldest first
        self.suspects: deque[Sequence] = deque()  # next first
        self.fetching: dict[int, Sequence] = {}
        self.waiting: deque[Sequence] = deque()  # those in mid-answer first
        self.preemptions = 0
        self.asked = self.hits = 0
        """Tokens of those admitted, and how many of these were in pages that somebody had."""
        self._suspects_turn = False
        self._tickets = 0
        self._fetches: dict[int, Fetch] = {}
        """In progress, those too that nobody waits for any more."""
        self._copies = Copies([], [])
        self._filled: list[Sequence] = []
        """Those with full pages that have no names yet."""

    @property
    def taken(self) -> int:
        """Seats."""
        return len(self.running) + len(self.suspects) + len(self.fetching)

    def add(self, sequence: Sequence) -> None:
        if sequence.output_len:
            self.waiting.insert(self._in_mid_answer(), sequence)
        else:
            self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Finished or cancelled."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.suspects:
            self.suspects.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.fetching = {ticket: one for ticket, one in self.fetching.items() if one is not sequence}
        self._release(sequence)

    def find(self, request_id: int) -> Sequence | None:
        everyone = (*self.running, *self.suspects, *self.fetching.values(), *self.waiting)
        return next((seq for seq in everyone if seq.request_id == request_id), None)

    def schedule(self, prompt_tokens: Callable[[], int] | None = None) -> list[Chunk]:
        """The next step's batch. Nothing is computed before `commit`: an uncommitted batch is scheduled again.

        `prompt_tokens` says how many tokens of prompts there may be beside decodes; None: as many as fit.
        """
        if self.suspects:
            self._suspects_turn = not self._suspects_turn
            if self._suspects_turn and (chunks := self._one_suspect()):
                return chunks
        chunks = self._decodes()
        budget = self._limits.max_num_batched_tokens - len(chunks)
        if prompt_tokens is not None and (len(chunks) < len(self.running) or self.waiting):
            budget = min(budget, prompt_tokens())
        prompts = self._prompts() if len(chunks) < len(self.running) else []
        for place, sequence in enumerate(prompts):
            rows = self._limits.max_num_seqs - len(chunks) - (len(prompts) - place - 1)
            budget -= _put(chunks, sequence, budget, rows)
        # Who is in mid-answer has its pages copied, whatever is left for others to compute.
        while (budget > 0 or self._in_mid_answer()) and (admitted := self._admit()):
            if admitted in self.running:
                budget -= _put(chunks, admitted, budget, self._limits.max_num_seqs - len(chunks))
        return chunks or self._one_suspect()

    def foresee(self, chunks: list[Chunk]) -> list[Chunk] | None:
        """The batch after `chunks`, which are being computed, if each of them gets a token and nobody comes or goes: they
        have pages for it then. None if they are not all that there is to do, or if there is no page without asking others
        for theirs."""
        if self.suspects or self.waiting or self.fetching or len(chunks) != len(self.running):
            return None
        page_size, foreseen = self._limits.page_size, []
        for sequence, start, length in chunks:
            after = start + 1
            if length != 1 or after != len(sequence.tokens):
                return None
            if after >= len(sequence.pages) * page_size:
                pages = self.pages.take(1)
                if pages is None:
                    return None
                sequence.pages += pages
            foreseen.append(Chunk(sequence, after, 1))
        return foreseen

    def _prompts(self) -> list[Sequence]:
        """Those with more than one token to compute. Who is in mid-answer has but a few, which its client waits for."""
        prompts = [one for one in self.running if one.computed + 1 < len(one.tokens)]
        return sorted(prompts, key=lambda one: not one.output_len)

    def commit(self, chunks: list[Chunk]) -> None:
        """The chunks are in the KV cache. The device is idle meanwhile: pages get their names later."""
        page_size = self._limits.page_size
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.computed = computed = chunk.start + chunk.length
            if computed // page_size > sequence.full:
                self._filled.append(sequence)

    # Copies of pages

    def take_copies(self) -> Copies:
        """Those that are wanted since this was last asked. To be asked while the device works: it names pages, too."""
        for sequence in self._filled:
            self._name_full_pages(sequence)
        self._filled.clear()
        copies, self._copies = self._copies, Copies([], [])
        return copies

    def stored(self, pages: list[int]) -> None:
        """They are on the shelf, or will not be."""
        for page in pages:
            self.pages.release([page])

    def fetched(self, ticket: int, good: int) -> None:
        """The `good` leading pages of a fetch are in the KV cache. Their sequence goes on, if it is still wanted."""
        fetch = self._fetches.pop(ticket)
        for page, name in zip(fetch.pages[:good], fetch.names, strict=False):
            self.pages.name(page, name)
        sequence = self.fetching.pop(ticket, None)
        if sequence is not None:
            sequence.full += good
            self._start(sequence)
        self.pages.release(fetch.pages)

    def _name_full_pages(self, sequence: Sequence) -> None:
        full = sequence.computed // self._limits.page_size
        if full > sequence.full:
            self._extend_names(sequence)
        for place in range(sequence.full, full):
            page, name = sequence.pages[place], sequence.names[place]
            if self.pages.name(page, name) and self._on_shelf is not None:
                self.pages.hold([page])
                self._copies.store.append((name, page))
        sequence.full = full

    def _extend_names(self, sequence: Sequence) -> None:
        root = self._root
        if not self._share_prefixes:
            root = PageName(sequence.request_id.to_bytes(len(NO_PAGE), "little"))
        extend(sequence.names, root, sequence.tokens, self._limits.page_size)

    # Room

    def _one_suspect(self) -> list[Chunk]:
        """A batch of one of the suspects; those that have proved themselves are none any more."""
        while self.suspects:
            sequence = self.suspects.popleft()
            if sequence.output_len >= sequence.alone_until:
                sequence.alone_until = 0
                self.running.append(sequence)
            elif self._make_room(sequence):
                self.suspects.append(sequence)
                chunks: list[Chunk] = []
                _put(chunks, sequence, self._limits.max_num_batched_tokens, self._limits.max_num_seqs)
                return chunks
        return []

    def _decodes(self) -> list[Chunk]:
        chunks = []
        page_size, preemptions = self._limits.page_size, self.preemptions
        for sequence in tuple(self.running):
            computed = sequence.computed
            if computed + 1 != len(sequence.tokens):
                continue
            if self.preemptions != preemptions and sequence not in self.running:
                continue  # it has had to give its pages to one before it
            if computed < len(sequence.pages) * page_size or self._make_room(sequence):
                chunks.append(Chunk(sequence, computed, 1))
        if self.preemptions != preemptions:  # of one that was in the batch already
            chunks = [chunk for chunk in chunks if chunk.sequence.pages]
        return chunks

    def _make_room(self, sequence: Sequence) -> bool:
        """Pages for all tokens of `sequence`, from others if need be. False: it was itself preempted."""
        missing = self.pages.pages_for(len(sequence.tokens)) - len(sequence.pages)
        if missing == 0:
            return True
        while (pages := self.pages.take(missing)) is None:
            victim = self._victim(sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += pages
        return True

    def _victim(self, asking: Sequence) -> Sequence:
        """The youngest of those without output, else the youngest; one under suspicion only if there is nobody else."""
        new = [sequence for sequence in self.running if not sequence.output_len]
        candidates = new or self.running or list(self.suspects)
        return candidates[-1] if candidates else asking

    def _preempt(self, victim: Sequence) -> None:
        if victim in self.running:
            self.running.remove(victim)
        elif victim in self.suspects:
            self.suspects.remove(victim)
        self._release(victim)
        self.waiting.insert(0 if victim.output_len else self._in_mid_answer(), victim)
        self.preemptions += 1

    def _admit(self) -> Sequence | None:
        """The first that waits, with pages, if there is a seat and room for what it is promised."""
        if not self.waiting or self.taken >= self._limits.max_num_seqs:
            return None
        sequence = self.waiting[0]
        self._extend_names(sequence)
        # Computed in any case is the last token before what is put out next: that is what it goes on from.
        names = sequence.names[: (sequence.needed - 1) // self._limits.page_size]
        here = self.pages.find(names)
        if self.taken and self._missing(sequence, here) > 0:
            return None
        self.pages.hold(here)
        pages = self.pages.take(self.pages.pages_for(len(sequence.tokens)) - len(here))
        if pages is None:
            self.pages.release(here)
            return None
        sequence.pages, sequence.full = here + pages, len(here)
        self.waiting.popleft()
        if self._on_shelf is not None and len(here) < len(names) and self._on_shelf(names[len(here)]):
            self._fetch(sequence, names[len(here) :])
        else:
            self._start(sequence)
        return sequence

    def _missing(self, sequence: Sequence, here: list[int]) -> int:
        """Pages that are too few for what it is promised beside all others; `here` are those that it would share."""
        wanted = self._promised(sequence) - len(here) + self.pages.unheld(here)
        return self.pages.held + self._promised_to_all() + wanted - self.pages.num_pages

    def _fetch(self, sequence: Sequence, names: list[PageName]) -> None:
        pages = sequence.pages[sequence.full : sequence.full + len(names)]
        self.pages.hold(pages)  # by whoever writes to them, whatever becomes of the sequence meanwhile
        self._tickets += 1
        fetch = Fetch(self._tickets, names, pages)
        self.fetching[fetch.ticket] = sequence
        self._fetches[fetch.ticket] = fetch
        self._copies.fetch.append(fetch)

    def _start(self, sequence: Sequence) -> None:
        """It has its pages, and those that somebody had are in them."""
        sequence.computed = sequence.full * self._limits.page_size
        self.asked += len(sequence.tokens)
        self.hits += sequence.computed
        if sequence.cached is None:
            sequence.cached = sequence.computed
        (self.suspects if sequence.alone_until else self.running).append(sequence)

    def _promised(self, sequence: Sequence) -> int:
        """Pages for all that it may generate; `HORIZON` ahead if it may go on to the end of the context."""
        known, longest = len(sequence.tokens), self._limits.max_model_len
        most = sequence.most if sequence.most < longest else min(longest, known + HORIZON)
        return self.pages.pages_for(most)

    def _promised_to_all(self) -> int:
        """Beyond what they have."""
        everyone = (*self.running, *self.suspects, *self.fetching.values())
        return sum([max(0, self._promised(sequence) - len(sequence.pages)) for sequence in everyone])

    def _in_mid_answer(self) -> int:
        """How many of those that wait, at their front."""
        return next(
            (place for place, seq in enumerate(self.waiting) if not seq.output_len), len(self.waiting)
        )

    def _release(self, sequence: Sequence) -> None:
        self._name_full_pages(sequence)
        self.pages.release(sequence.pages)
        sequence.pages = []
        sequence.computed = sequence.full = 0


def _put(chunks: list[Chunk], sequence: Sequence, budget: int, rows: int) -> int:
    """Add what comes next of `sequence`: at most `budget` tokens in at most `rows` chunks. Returns how many tokens."""
    start, last = sequence.computed, sequence.needed - 1
    if rows < 1 or budget < 1:
        return 0
    if not sequence.untold or start < last:
        end = last if sequence.untold else len(sequence.tokens)
        length = min(budget, end - start)
        chunks.append(Chunk(sequence, start, length))
        return length
    # A token that is given has its own row of logits, for which a chunk has but one. The last one has nothing to tell
    # if nothing is drawn.
    count = min(budget, rows, min(len(sequence.tokens), sequence.most - 1) - start)
    chunks += [Chunk(sequence, at, 1) for at in range(start, start + count)]
    return count
