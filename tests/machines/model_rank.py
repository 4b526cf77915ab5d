"""One rank in the model: the real rank machine and mailbox, and the boundary as the forward thread does it."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.rank import events as rk
from elastic_ep.machines.rank.machine import RankMachine
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.wire.messages import (
    Abort,
    Commit,
    Member,
    Numbered,
    RankReport,
    Snapshot,
    SnapshotRequest,
    View,
)


class Violation(Exception):
    """A property of the protocol does not hold."""


_NOT_IN_KEY = {"_behind", "_early", "placement"}
"""`_behind` says how long the shell goes on asking: here each question is answered, and a beat repeats it. Placements do
not change here, and in which order early messages came makes no difference."""
_MAILBOX = ("join_ready", "view", "hold_at", "begun", "waiting_at")


def copy_mailbox(mailbox: Mailbox) -> Mailbox:
    new = Mailbox()
    for name in _MAILBOX:
        setattr(new, name, getattr(mailbox, name))
    return new


class Begun(NamedTuple):
    step: int
    active: frozenset[Member]


class RankModel:
    """One rank process: the real rank machine and mailbox, and the boundary as the forward thread does it."""

    def __init__(self, me: Member) -> None:
        self.machine = RankMachine(me)
        for event in (rk.Started(), rk.EngineReady(), rk.WarmedUp()):
            self.machine.step(event)
        self.mailbox = Mailbox()
        self.step = 0
        self.in_step = False
        self.view = View(epoch=0, seats=())
        self.begun: tuple[Begun, ...] = ()
        """The last two steps begun: no peer can be further behind."""
        self.promised: tuple[int, int] | None = None
        """Attempt and step: what the rank gave its word for, whatever its machine believes."""
        self.over = 0
        """The last attempt whose end has reached the rank, perhaps ahead of a message that it lacks."""
        self.expelled = False
        self.stopping = False
        self.out: list[Any] = []

    def copy(self) -> RankModel:
        new = copy.copy(self)
        new.machine = copy.copy(self.machine)
        new.machine.lifecycle = copy.copy(self.machine.lifecycle)
        new.machine._early = dict(self.machine._early)
        new.mailbox = copy_mailbox(self.mailbox)
        new.out = []
        return new

    def key(self) -> tuple[Any, ...]:
        """Equal for ranks that can only go on in the same way."""
        machine = [part for part in self.machine.state().fields if part[0] not in _NOT_IN_KEY]
        early = frozenset(self.machine._early.items())
        mailbox = [getattr(self.mailbox, name) for name in _MAILBOX]
        own = (
            self.step,
            self.in_step,
            self.view,
            self.begun,
            self.promised,
            self.over,
            self.expelled,
            self.stopping,
        )
        return *machine, early, *mailbox, *own

    def hear(self, message: Numbered | Snapshot) -> None:
        self._redeem(message)
        for effect in self.machine.step(message):
            match effect:
                case rk.AskSnapshot():
                    self.out.append(SnapshotRequest())
                case rk.MakePromise(attempt, seated):
                    self._promise(attempt, seated)
                case rk.ReleaseHold():
                    self.mailbox.release()
                case rk.Adopt(view):
                    self.mailbox.adopt(view)
                case RankReport(state):
                    self.out.append(ev.Reported(self.machine.me, state))
                case rk.Expelled():
                    self.expelled = True
                case rk.StopSteps():
                    self.stopping = True
        self.machine.check()

    def boundary(self) -> None:
        """The forward thread ends its step, if it is in one, and begins the next, if it may."""
        if self.in_step:
            self.step += 1
            self.in_step = False
        if self.stopping:
            return
        me = self.machine.me
        if self.view.seat(me.rank) is None:
            seat = self.mailbox.view.seat(me.rank)
            if seat is None or seat.member != me:
                return
            self.step, self.view = seat.first_step, self.mailbox.view
        allowed = self.mailbox.may_begin(self.step)
        if self.mailbox.join_ready:
            self.mailbox.join_ready = False
            self.view = self.mailbox.view
        if not allowed:
            return
        if self.promised and self.step >= self.promised[1]:
            raise Violation(f"{me} begins step {self.step}, having promised {self.promised}")
        self.in_step = True
        active = frozenset(seat.member for seat in self.view.seats if seat.first_step <= self.step)
        self.begun = (*self.begun[-1:], Begun(self.step, active))

    def _promise(self, attempt: int, seated: bool) -> None:
        step = self.mailbox.promise() if seated else 0
        if seated and attempt > self.over and (self.promised is None or self.promised[0] != attempt):
            self.promised = (attempt, step)
        self.out.append(ev.Promised(self.machine.me, attempt, step))

    def _redeem(self, message: Numbered | Snapshot) -> None:
        if isinstance(message, Snapshot):
            current = message.number >= (self.machine.number or 0)
            if current and message.attempt is not None:
                self.over = max(self.over, message.attempt.attempt - 1)
            elif current and self.promised is not None:
                self.over = max(self.over, self.promised[0])
        elif isinstance(message.body, (Commit, Abort)):
            self.over = max(self.over, message.body.attempt)
        if self.promised is not None and self.promised[0] <= self.over:
            self.promised = None


def lost_between(older: RankModel, newer: RankModel) -> frozenset[Member]:
    """Whom `older` has in its view and `newer` knows to be lost."""
    if newer.machine.view.epoch <= older.view.epoch:
        return frozenset()
    return older.view.members - newer.machine.view.members
