"""The rank's side of the membership protocol.

It keeps the numbered messages in order (asking for a snapshot when one is missing) and says what follows from
each: whom to connect to, when to promise, which view to adopt, whom to mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.placement import Placement
from elastic_ep.wire.messages import (
    Abort,
    Beat,
    Commit,
    Member,
    Numbered,
    PlacementChanged,
    Prepare,
    Published,
    Snapshot,
    View,
)

# Effects


@dataclass(frozen=True, slots=True)
class AskSnapshot:
    """A message is missing."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Get ready for these members, which stay inactive."""

    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class MakePromise:
    """Choose a step not begun yet, hold before it, and tell the controller. A joiner (`seated` false) promises 0."""

    attempt: int
    seated: bool


@dataclass(frozen=True, slots=True)
class ReleaseHold:
    """The promise is redeemed or void."""


@dataclass(frozen=True, slots=True)
class Mask:
    member: Member


@dataclass(frozen=True, slots=True)
class Adopt:
    """Use this view from the next boundary on."""

    view: View


@dataclass(frozen=True, slots=True)
class AdoptPlacement:
    """Route by this placement from the next boundary on."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class Expelled:
    """The others go on without this incarnation: it must exit."""


Effect = AskSnapshot | Connect | MakePromise | ReleaseHold | Mask | Adopt | AdoptPlacement | Expelled


class MemberMachine:
    """Events are the messages themselves: `Numbered` from PUB, `Snapshot` from the controller."""

    def __init__(self, me: Member) -> None:
        self.me = me
        self.number: int | None = None
        self.view = View(epoch=0, seats=())
        self.attempt: Prepare | None = None
        self.placement: Placement | None = None
        self._early: dict[int, Numbered] = {}
        self._effects: list[Effect] = []

    def step(self, event: Numbered | Snapshot) -> list[Effect]:
        self._effects = []
        if isinstance(event, Snapshot):
            self._on_snapshot(event)
        else:
            self._on_numbered(event)
        return self._effects

    def check(self) -> None:
        assert self.number is not None or not self.view.seats, "a view without a number"
        assert all(number > (self.number or 0) for number in self._early), "an old message is kept"

    def _on_numbered(self, event: Numbered) -> None:
        if isinstance(event.body, Beat):
            if self.number is None or event.number > self.number:
                self._effects.append(AskSnapshot())
            return
        if self.number is not None and event.number <= self.number:
            return
        self._early[event.number] = event
        if self.number is None or self.number + 1 not in self._early:
            self._effects.append(AskSnapshot())
            return
        self._apply_in_order()

    def _on_snapshot(self, event: Snapshot) -> None:
        if self.number is not None and event.number < self.number:
            return
        self.number = event.number
        self._early = {number: kept for number, kept in self._early.items() if number > event.number}
        if event.placement is not None and event.placement != self.placement:
            self.placement = event.placement
            self._effects.append(AdoptPlacement(event.placement))
        self._adopt(event.view)
        if event.attempt is None:
            self._end_attempt()
        else:
            self._prepare(event.attempt)
        self._apply_in_order()

    def _apply_in_order(self) -> None:
        assert self.number is not None
        while (event := self._early.pop(self.number + 1, None)) is not None:
            self.number = event.number
            self._apply(event.body)

    def _apply(self, body: Published) -> None:
        match body:
            case Prepare():
                self._prepare(body)
            case Commit():
                self._adopt(body.view)
                self._end_attempt()
            case Abort():
                self._end_attempt()
            case View():
                self._adopt(body)
            case PlacementChanged():
                assert self.placement is not None, "a change of a placement that no snapshot brought"
                self.placement = self.placement.changed(body.version, body.changes)
                self._effects.append(AdoptPlacement(self.placement))
            case Beat():
                raise AssertionError("a beat is never kept")

    def _prepare(self, prepare: Prepare) -> None:
        if self.attempt == prepare:
            return  # promising twice would move the hold past the promise that counts
        self.attempt = prepare
        seated = self.me in self.view.members
        if seated:
            others = prepare.joiners
        elif self.me in prepare.joiners:
            others = tuple(sorted(self.view.members | set(prepare.joiners) - {self.me}))
        else:
            return
        if others:
            self._effects.append(Connect(others))
        self._effects.append(MakePromise(prepare.attempt, seated))

    def _end_attempt(self) -> None:
        if self.attempt is not None:
            self.attempt = None
            self._effects.append(ReleaseHold())

    def _adopt(self, view: View) -> None:
        if view.epoch <= self.view.epoch:
            return
        gone = self.view.members - view.members
        was_seated = self.me in self.view.members
        self.view = view
        self._effects.extend(Mask(member) for member in sorted(gone - {self.me}))
        if was_seated and self.me not in view.members:
            self._effects.append(Expelled())
        else:
            self._effects.append(Adopt(view))
