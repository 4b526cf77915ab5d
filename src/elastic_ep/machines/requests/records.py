"""What the routing machine knows of a request and of a rank."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.tables import TableMachine
from elastic_ep.wire.messages import Assign, Member
from elastic_ep.wire.privacy import TokenId


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
    moved_from: frozenset[Member] = frozenset()
    """Words of these about it may still be on their way, even when one of them owns it again."""

    @property
    def alone(self) -> int:
        """As in `Assign`."""
        return ev.ALONE_AT_FIRST * ev.ALONE_GROWTH ** (self.blames - 1) if self.blames else 0

    def assignment(self) -> Assign:
        asked = self.asked
        prompt, emitted = asked.prompt, tuple(self.emitted)
        return Assign(
            asked.request_id, prompt, emitted, asked.params, asked.seed, asked.choice, alone=self.alone
        )


@dataclass(slots=True)
class Rank:
    """A member that is up, and what was assigned to it, by request id and in order of assignment."""

    member: Member
    requests: dict[int, Request] = field(default_factory=dict)
    accepting: bool = True
    faulty: bool = False
    last_assigned: int = 0
    blamed: tuple[int, ...] = ()
