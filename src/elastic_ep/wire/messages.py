"""Every message that crosses a process boundary.

Messages are frozen dataclasses, packed (`codec.py`) as one array ``[type name, field, field, ...]``. Unpacking checks
every field against its declared type, so a malformed or foreign message raises `MalformedMessage` and never
reaches a machine. Who sent it is in the envelope (`sockets.py`).

Which message travels where (`docs/architecture.md`, planes):

* PUB, controller to all, numbered: `Prepare`, `Commit`, `Abort`, `View`, `PlacementChanged`, `Beat`, wrapped in
  `Numbered`.
* ROUTER/DEALER, rank to controller: `Hello`, `RankReport`, `Promise`, `Heartbeat`, `StepReport`, `RequestFailed`,
  `SnapshotRequest`, of `slot_messages.py` `PlacementSeen`, `StateReady`, `SlotCopied`, `SlotSums`, `ExpertLoads`, and
  of `store_messages.py` `StoreSet`, `StoreGet`, `StoreDelete`.
* ROUTER/DEALER, controller to rank: `Snapshot`, `Assign`, `Cancel`, `Drain`, `Resume`, `Shutdown`,
  `CopySlot`, `SumSlots`, `StoreValue`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, NamedTuple

from elastic_ep.placement import Change, Placement
from elastic_ep.wire.privacy import PRIVATE, TokenId
from elastic_ep.wire.slot_messages import (
    CopySlot,
    ExpertLoads,
    PlacementSeen,
    SlotCopied,
    SlotSums,
    StateReady,
    SumSlots,
)
from elastic_ep.wire.store_messages import StoreDelete, StoreGet, StoreSet, StoreValue


class Member(NamedTuple):
    """One launch of one rank."""

    rank: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.rank}.{self.incarnation}"


class RankState(StrEnum):
    """The lifecycle of a rank; the words that operators see."""

    LAUNCHING = "Launching"
    INIT_CUDA = "InitCUDA"
    INIT_DIST = "InitDist"
    JOINING = "Joining"
    SERVING = "Serving"
    DRAINING = "Draining"
    STOPPED = "Stopped"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True)
class Seat:
    """A member's place in a view: it takes part in every step from `first_step` on."""

    rank: int
    incarnation: int
    first_step: int

    @property
    def member(self) -> Member:
        return Member(self.rank, self.incarnation)


@dataclass(frozen=True, slots=True)
class View:
    """Who takes part, from which step on. Self-contained: the newest epoch wins, whatever came before it.

    A member that is in an older view and not in this one is lost: mask it at once. `park_at` is the step
    that nobody may begin (the group pauses at the boundary before it), or None. Who `left` was asked to, and may live
    still: it ends by itself.
    """

    epoch: int
    seats: tuple[Seat, ...]
    park_at: int | None = None
    left: tuple[Member, ...] = ()

    def seat(self, rank: int) -> Seat | None:
        return next((seat for seat in self.seats if seat.rank == rank), None)

    @property
    def members(self) -> frozenset[Member]:
        return frozenset(seat.member for seat in self.seats)


@dataclass(frozen=True, slots=True)
class Prepare:
    """Connect to the joiners (inactive) and promise. Without joiners: promise, the group wants to park."""

    attempt: int
    joiners: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """All promised: the attempt's outcome is this view."""

    attempt: int
    view: View


@dataclass(frozen=True, slots=True)
class Abort:
    """The attempt is void, and so is every promise made for it."""

    attempt: int


@dataclass(frozen=True, slots=True)
class PlacementChanged:
    """Read-copy-update: each rank routes by it from its own next boundary on. Versions count up by one."""

    version: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Beat:
    """Nothing new. Shows the last number, so that a lost message is noticed."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """A PUB message with its number. A `Beat` repeats the last number, all others take the next."""

    number: int
    body: Prepare | Commit | Abort | View | PlacementChanged | Beat


@dataclass(frozen=True, slots=True)
class Hello:
    """The rank holds its death mutex and its control loop runs: it can be watched now."""

    pid: int


@dataclass(frozen=True, slots=True)
class RankReport:
    """The rank's lifecycle moved to `state`. `reason` explains `Failed`; `Joining` tells the pages of its KV cache.

    `suspects` of `Failed` are the requests that it was computing and that may be to blame; none: it is the rank's fault.
    """

    state: RankState
    reason: str = ""
    suspects: tuple[int, ...] = ()
    num_pages: int = 0


@dataclass(frozen=True, slots=True)
class Promise:
    """I will not begin `step` before I hear Commit or Abort of `attempt`. A joiner promises step 0."""

    attempt: int
    step: int


class PageCounts(NamedTuple):
    """What a rank knows of its pages. Counters begin at 0 with each of its incarnations.

    Of its device: pages in `total`, `held` by requests and copies, `named` (others may share them); `queries` are tokens
    of admitted requests, `hits` those among them that were in pages already; `evictions` of named pages. Of its part of
    the shelf: pages and bytes that are there; pages `stored`, `fetched` (from any rank's part), `dropped` (for new ones,
    or as they came too fast), and `bad` (not taken, as their checksum did not fit).
    """

    total: int = 0
    held: int = 0
    named: int = 0
    queries: int = 0
    hits: int = 0
    evictions: int = 0
    shelf_pages: int = 0
    shelf_bytes: int = 0
    stored: int = 0
    fetched: int = 0
    dropped: int = 0
    bad: int = 0


NO_PAGES = PageCounts()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sign of life.

    `step` is the step the forward thread is in, `operations` counts its exchange operations, `cpu_ms` the
    processor time of the forward thread, `waiting_for` the rank whose data it waits for, `parked` that it
    waits at a boundary because it was told to.
    """

    step: int
    operations: int
    cpu_ms: int
    waiting_for: int | None
    parked: bool
    pages: PageCounts = NO_PAGES


class Bias(NamedTuple):
    token: TokenId
    add: Annotated[float, PRIVATE]
    """To its logit."""


class GrammarKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    """A JSON array of strings, one of which is the text."""
    LARK = "lark"
    """As llguidance knows it. EBNF becomes this: see guided/grammars.py."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the generated text, from its first token to the one that ends it, has to be.

    Whoever sets one has had it checked (guided/check.py), and makes it by a function of guided/grammars.py.
    """

    kind: GrammarKind
    text: Annotated[str, PRIVATE]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens; the same meaning as in vLLM. Defaults: greedy.

    `logprobs` is the number of alternatives to report (0: the sampled token's own), None for no logprobs. Before
    `min_tokens` tokens no token that ends the sequence is picked. `allowed_token_ids` empty: all are. No word of
    `bad_words`, each some tokens in a row, is completed.

    With a `grammar` no token is picked after which the text could not become one of the grammar's, whatever else is
    asked: when it is complete, even one that ends it before `min_tokens`.

    The first tokens are those `given`, not drawn: the end of a prompt, whose log-probabilities are wanted, with so many
    alternatives. They count to `max_tokens`, and for all else to the prompt.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    stop_token_ids: tuple[TokenId, ...] = ()
    logprobs: int | None = None
    min_tokens: int = 0
    logit_bias: Annotated[tuple[Bias, ...], PRIVATE] = ()
    allowed_token_ids: tuple[TokenId, ...] = ()
    grammar: Grammar | None = None
    given: tuple[TokenId, ...] = ()
    given_logprobs: int = 0
    bad_words: Annotated[tuple[tuple[int, ...], ...], PRIVATE] = ()


@dataclass(frozen=True, slots=True)
class Assign:
    """Run this request from position len(prompt) + len(emitted) on.

    `emitted` is what earlier owners already produced. Sampling noise at a position is a function of
    (`seed`, `choice`, position) alone, so any rank continues the same stream.

    `alone`: so many tokens are to be computed in steps of nothing else, as the request may have cost a rank.
    """

    request_id: int
    prompt: tuple[TokenId, ...]
    emitted: tuple[TokenId, ...]
    params: SamplingParams
    seed: Annotated[int, PRIVATE]
    choice: int
    alone: int = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget this request. Unknown or finished ids are no error."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what you run, take nothing new."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Drain no longer."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Stop at the next boundary and exit."""


class TopLogprob(NamedTuple):
    token: TokenId
    logprob: Annotated[float, PRIVATE]


class Token(NamedTuple):
    """One committed token. `index` counts the request's generated tokens from 0, earlier owners' included.

    `finish` is "stop" (end-of-sequence or stop token; that token is included), "length", "abort" or None.
    """

    request_id: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs of a token
    token: TokenId
    finish: str | None = None
    logprob: Annotated[float | None, PRIVATE] = None
    top: Annotated[tuple[TopLogprob, ...], PRIVATE] = ()


class Cached(NamedTuple):
    """So many tokens of the request's prompt were in pages that were there before, and were not computed."""

    request_id: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step brought. Sent when tokens were committed or the step was poisoned, perhaps while the next one runs.

    `masked` names the ranks that were masked during a poisoned step, `mask_ns` is when a mask was last issued here.
    `started_ns`, `ended_ns` and `mask_ns` are CLOCK_MONOTONIC nanoseconds.
    """

    step: int
    epoch: int
    started_ns: int
    ended_ns: int
    tokens: tuple[Token, ...]
    running: int
    waiting: int
    operations: int
    """As in a heartbeat, which this replaces; so is `cpu_ms`."""
    cpu_ms: int
    masked: tuple[int, ...] = ()
    mask_ns: int = 0
    held: tuple[int, ...] | None = None
    """The requests that wait in this rank from now on; None: the same as before."""
    pages: PageCounts = NO_PAGES
    cached: tuple[Cached, ...] = ()
    """Of requests whose first token is among `tokens`; those without any are left out."""


class FailureCode(StrEnum):
    """Why a request ended before its time; the word that clients see."""

    REFUSED = "request_refused"
    """It cannot be run as it is."""
    FAILED = "request_failed"
    """To compute it raised an error."""
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"
    """Nothing will serve it."""
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """This rank has let go of the request, and no other would do better. Tokens that it has reported stand.

    `code` is `REFUSED` or `FAILED`.
    """

    request_id: int
    code: FailureCode
    reason: str


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """The rank has just started or has seen a gap in the numbers."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the PUB messages up to `number` amount to: the view, and the attempt in progress, if any."""

    number: int
    view: View
    attempt: Prepare | None
    placement: Placement | None = None


FromRank = (
    Hello
    | RankReport
    | Promise
    | Heartbeat
    | StepReport
    | RequestFailed
    | SnapshotRequest
    | PlacementSeen
    | StateReady
    | SlotCopied
    | SlotSums
    | ExpertLoads
    | StoreSet
    | StoreGet
    | StoreDelete
)
ToRank = Snapshot | Assign | Cancel | Drain | Resume | Shutdown | CopySlot | SumSlots | StoreValue
Published = Prepare | Commit | Abort | View | PlacementChanged | Beat
