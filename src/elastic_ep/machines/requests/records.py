"""What the routing machine knows of a request and of a rank."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.prefixes import DEPTHS
from elastic_ep.machines.tables import TableMachine
from elastic_ep.wire.messages import Assign, Member
from elastic_ep.wire.privacy import TokenId

HORIZON = 512
"""Tokens that an open-ended sequence is promised pages for, beyond those that it has: by the router and in a rank."""


@dataclass(slots=True)
class Request:
    """A live request. `emitted` holds the tokens that the client has had."""

    asked: ev.NewRequest
    life: TableMachine
    owner: Member | None = None
    emitted: list[TokenId] = field(default_factory=list)
    emitted_before: int = 0
    """Length of `emitted` when its owner got it."""
    fruitless: int = 0
    """Owners lost in a row without one token."""
    due_ms: int | None = None
    blames: int = 0
    """How often it was a suspect when a rank died."""
    own: int = 1
    """Pages that its owner promises it beyond its last mark."""
    reach: int = 0
    """With so many tokens out, it is promised more."""
    moved_from: frozenset[Member] = frozenset()
    """Words of these about it may still be on their way, even when one of them owns it again."""

    @property
    def alone(self) -> int:
        """As in `Assign`."""
        return ev.ALONE_AT_FIRST * ev.ALONE_GROWTH ** (self.blames - 1) if self.blames else 0

    def promise(self, config: ev.RoutingConfig) -> None:
        """Pages as the scheduler of a rank counts them; not to be called while a rank has it."""
        prompt, out = len(self.asked.prompt), len(self.emitted)
        most, self.reach = prompt + self.asked.params.max_tokens, self.asked.params.max_tokens
        if most >= config.max_model_len:
            most = min(config.max_model_len, prompt + out + HORIZON)
            self.reach = out + HORIZON // 2
        pages = -(-most // config.page_size)
        self.own = max(1, pages - _depth(len(self.asked.marks)))

    def assignment(self) -> Assign:
        asked = self.asked
        prompt, emitted = asked.prompt, tuple(self.emitted)
        return Assign(
            asked.request_id, prompt, emitted, asked.params, asked.seed, asked.choice, alone=self.alone
        )


@dataclass(slots=True)
class Rank:
    """A member that is up, and what was assigned to it, by request id and in order of assignment.

    It promises them pages of its KV cache, as many as its scheduler does. Pages that two requests share count once:
    `pages` are those of all marks that its requests have, and each request's `own`.
    """

    member: Member
    num_pages: int = 0
    """0: not counted."""
    requests: dict[int, Request] = field(default_factory=dict)
    accepting: bool = True
    faulty: bool = False
    last_assigned: int = 0
    blamed: tuple[int, ...] = ()
    held: frozenset[int] = frozenset()
    """Requests that wait in it, as it said last; some of them may be elsewhere by now."""
    pages: int = 0
    marks: dict[int, int] = field(default_factory=dict)
    """How many of its requests have each."""

    def take(self, request: Request) -> None:
        self.requests[request.asked.request_id] = request
        depth = 0
        for mark, below in zip(request.asked.marks, DEPTHS, strict=False):
            having = self.marks.get(mark, 0)
            if not having:
                self.pages += below - depth
            self.marks[mark] = having + 1
            depth = below
        self.pages += request.own

    def let_go(self, request: Request) -> None:
        del self.requests[request.asked.request_id]
        depth = 0
        for mark, below in zip(request.asked.marks, DEPTHS, strict=False):
            self.marks[mark] -= 1
            if not self.marks[mark]:
                del self.marks[mark]
                self.pages -= below - depth
            depth = below
        self.pages -= request.own

    def costs(self, request: Request) -> int:
        """Pages that it would have to promise to the request, which it has not, beside all others."""
        marks = request.asked.marks
        shared = next((place for place, mark in enumerate(marks) if mark not in self.marks), len(marks))
        return request.own + _depth(len(marks)) - _depth(shared)

    def has_room(self, request: Request) -> bool:
        """One sequence always fits."""
        return not self.requests or not self.num_pages or self.pages + self.costs(request) <= self.num_pages

    def load(self, seats: int, request: Request | None = None) -> float:
        """The share of its seats or of its pages that is promised, whichever is more; as if it had `request`, too."""
        requests, pages = len(self.requests), self.pages
        if request is not None:
            requests, pages = requests + 1, pages + self.costs(request)
        return max(requests / seats, pages / self.num_pages if self.num_pages else 0.0)


def _depth(marks: int) -> int:
    return DEPTHS[marks - 1] if marks else 0
