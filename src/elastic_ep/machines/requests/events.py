"""What goes into the routing machine and what comes out of it.

`StopRequested`, `WorkBegan`, `WorkEnded`, `RankDrained` and `NothingWillServe` are the membership machine's own: one
event stops both machines, and what one of them says is what the other hears.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.membership.events import (
    NothingWillServe,
    RankDrained,
    StopRequested,
    WorkBegan,
    WorkEnded,
)
from elastic_ep.wire.messages import Assign, Cached, Cancel, FailureCode, Member, SamplingParams, Token
from elastic_ep.wire.privacy import PRIVATE, TokenId

__all__ = [
    "Blamed", "CancelRequested", "DeadlinePassed", "Deliver", "Drained", "Effect", "Event", "Failed", "Fault",
    "Finish", "FromCache", "Moved", "NewRequest", "NothingWillServe", "RankDown", "RankDrained", "RankDraining",
    "RankResumed", "RankUp", "Refuse", "Replayed", "RoutingConfig", "Send", "StopRequested", "Submitted", "Tick",
    "TokensCommitted", "WorkBegan", "WorkEnded",
]  # fmt: skip

ALONE_AT_FIRST = 1
ALONE_GROWTH = 16
"""A request that may have cost a rank computes so many tokens by itself, and each time so many times more."""
TOLERANCE, TOLERATED = 0.25, 4
"""See `RoutingConfig.tolerance`."""


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    """`max_num_seqs` is what a rank runs at once; `max_queued` how many requests may wait in the router.

    A rank is assigned `overcommit` times as many, so that it has the next one at hand when one finishes.
    Requests of a lost rank may fill a survivor to `replay_overcommit` times: their clients see a stall until a
    seat is free there, or anywhere, as what waits in a rank moves.

    A request fails when more than `max_fruitless_replays` ranks in a row died with it before it got one token:
    it may well be what kills them. After half as many it does not move any more. It also fails when a rank has died of
    it for certain, after another that may have: see `Blamed`.

    `num_pages` pages of `page_size` tokens are a rank's KV cache if it does not say otherwise; 0: pages are not counted.
    No sequence is longer than `max_model_len` tokens. A beginning of fewer than `least_shared` pages makes no rank better
    than another: it is computed within a step or two.

    A request that is not done `request_timeout_ms` after it was submitted fails. 0: it may take for ever.
    """

    max_num_seqs: int
    max_queued: int
    overcommit: float = 1.25
    replay_overcommit: float = 2.5
    max_fruitless_replays: int = 8
    retry_after_s: int = 1
    unavailable_retry_after_s: int = 30
    request_timeout_ms: int = 0
    num_pages: int = 0
    page_size: int = 16
    max_model_len: int = 1 << 30
    least_shared: int = 8

    @property
    def tolerance(self) -> float:
        """How much more than the least loaded rank one may have, as a share of what it can have, for a good reason.

        A rank that has the beginning of a prompt saves as many steps as the beginning is long. But all ranks' steps take
        as long as the fullest one's: a quarter more sequences make them a few percent longer. Of few seats a quarter is
        less than what comes and goes anyway: four requests.
        """
        return max(TOLERANCE, TOLERATED / self.max_num_seqs)

    @property
    def assign_limit(self) -> int:
        return math.ceil(self.max_num_seqs * self.overcommit)

    @property
    def replay_limit(self) -> int:
        return math.ceil(self.max_num_seqs * self.replay_overcommit)

    @property
    def max_fruitless_moves(self) -> int:
        return self.max_fruitless_replays // 2


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What a client wants; `request_id` was never used before. `params.max_tokens` is at least 1."""

    request_id: int
    prompt: tuple[TokenId, ...]
    params: SamplingParams
    seed: Annotated[int, PRIVATE]
    choice: int
    marks: tuple[int, ...] = ()
    """Which other prompts begin as this one does: see `prefixes.py`. None, or all that it can have."""


# Events


@dataclass(frozen=True, slots=True)
class Submitted:
    """`now_ms` as in a `Tick`."""

    request: NewRequest
    now_ms: int = 0


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The client went away or has enough. Harmless when the request has ended already."""

    request_id: int


@dataclass(frozen=True, slots=True)
class RankUp:
    """The member serves from now on. `num_pages` of KV cache are its; 0: it has not said."""

    member: Member
    num_pages: int = 0


@dataclass(frozen=True, slots=True)
class RankDraining:
    """The member finishes what it has and takes nothing new."""

    member: Member


@dataclass(frozen=True, slots=True)
class RankResumed:
    """The member drains no longer, and takes requests again."""

    member: Member


@dataclass(frozen=True, slots=True)
class RankDown:
    """The member is lost, or has drained as far as it could (`left`): what it still has continues elsewhere."""

    member: Member
    reason: str
    left: bool = False


@dataclass(frozen=True, slots=True)
class TokensCommitted:
    """From a step report: tokens of any of the member's requests, those of one request in order.

    The step's number and when it began and ended are for whoever reads the log.
    """

    member: Member
    tokens: tuple[Token, ...]
    step: int = 0
    started_ns: int = 0
    ended_ns: int = 0
    cached: tuple[Cached, ...] = ()
    held: tuple[int, ...] | None = None
    """As in the report: who waits in the member from now on. None: the same as before."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The member has let go of the request for good: it ends with this reason."""

    member: Member
    request_id: int
    code: FailureCode
    reason: Annotated[str, PRIVATE]


@dataclass(frozen=True, slots=True)
class Blamed:
    """The member is about to die, and says that it was computing these requests.

    They go on elsewhere, at first in steps of their own: so the next to die names the one that it died of. One that
    is the only suspect, and has been one before, has cost two ranks and fails.
    """

    member: Member
    request_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The time for a graceful stop is over: what still lives fails."""


Event = (
    Submitted
    | CancelRequested
    | RankUp
    | RankDraining
    | RankResumed
    | RankDown
    | TokensCommitted
    | Failed
    | Blamed
    | NothingWillServe
    | Tick
    | StopRequested
    | DeadlinePassed
)

# Effects


@dataclass(frozen=True, slots=True)
class Send:
    member: Member
    message: Assign | Cancel

    def plain_fields(self) -> tuple[Member, str, int, int]:
        """Whom, what, which request and from which position on: the rest is in earlier events."""
        emitted = len(self.message.emitted) if isinstance(self.message, Assign) else 0
        return self.member, type(self.message).__name__, self.message.request_id, emitted


@dataclass(frozen=True, slots=True)
class Deliver:
    """To the client: the next tokens, each index exactly once, in order."""

    request_id: int
    tokens: tuple[Token, ...]

    def plain_fields(self) -> tuple[int, int, int]:
        """Request, first index and number of tokens: the tokens themselves are in the event that brought them."""
        return self.request_id, self.tokens[0].index, len(self.tokens)


@dataclass(frozen=True, slots=True)
class FromCache:
    """To the client: so many tokens of its prompt did not have to be computed. Before its first token, once."""

    request_id: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Finish:
    """To the client: that was all. `reason` as in `Token.finish`; "abort" when it failed, for which `code` and `detail`
    say why."""

    request_id: int
    reason: str
    code: FailureCode | None = None
    detail: Annotated[str, PRIVATE] = ""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Not admitted: "busy" (come again after `retry_after_s` seconds), "unavailable", for which `detail` says why, or
    "stopping"."""

    request_id: int
    reason: str
    retry_after_s: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Replayed:
    """The request lost its rank and continues elsewhere."""

    request_id: int
    from_member: Member


@dataclass(frozen=True, slots=True)
class Moved:
    """The request waited in this rank and continues in one that has a free seat, or the rank has left."""

    request_id: int
    from_member: Member


@dataclass(frozen=True, slots=True)
class Fault:
    """The member broke the protocol. It gets nothing more and is not believed any more: fence it."""

    member: Member
    reason: str


@dataclass(frozen=True, slots=True)
class Drained:
    """A stop was requested and no request is left. Said once."""


Effect = (
    Send
    | Deliver
    | FromCache
    | Finish
    | Refuse
    | Replayed
    | Moved
    | Fault
    | WorkBegan
    | WorkEnded
    | RankDrained
    | Drained
)
Notice = Replayed | Moved | Fault | WorkBegan | WorkEnded | RankDrained | Drained
"""Effects that concern the rest of the run process."""
