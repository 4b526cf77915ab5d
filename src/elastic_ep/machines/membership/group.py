"""What state the group is in: derived from what the membership machine knows, and kept nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from elastic_ep.machines.membership.events import GroupState
from elastic_ep.machines.membership.records import Attempt
from elastic_ep.wire.messages import View


class Facts(Protocol):
    """What the group's state is derived from; the membership machine has it."""

    stopping: bool
    attempt: Attempt | None
    view: View

    @property
    def covered(self) -> bool: ...

    @property
    def wanted(self) -> int:
        """Ranks that are to have a seat,"""
        ...

    @property
    def staying(self) -> int:
        """and those that have one, and keep it."""
        ...


@dataclass(frozen=True, slots=True)
class Case:
    state: GroupState
    when: str
    """In words, for the chart."""
    holds: Callable[[Facts], bool]


GROUP = (
    Case(GroupState.STOPPING, "it was asked to stop", lambda m: m.stopping),
    Case(GroupState.ADMITTING, "ranks are being admitted", lambda m: bool(m.attempt and m.attempt.joiners)),
    Case(GroupState.FORMING, "nobody has a seat", lambda m: not m.view.seats),
    Case(GroupState.HOLDING, "an expert has no copy", lambda m: not m.covered),
    Case(GroupState.PAUSED, "the members are parked", lambda m: m.view.park_at is not None),
    Case(GroupState.SERVING, "every rank that is wanted has a seat", lambda m: m.staying == m.wanted),
    Case(GroupState.DEGRADED, "else", lambda m: True),
)
"""The group's state is the first one that holds."""
