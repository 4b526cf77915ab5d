"""What every machine is: `step(event) -> list[effect]`.

Events and effects are frozen dataclasses. A machine does no IO, reads no clock, draws no random numbers, logs
nothing: time comes in as a `Tick`, effects go out and a thin shell performs them. The same machine therefore
runs in production, under hypothesis, under exhaustive search and in replay. The form follows dask's worker
state machine (events in, instructions out) and etcd's raft (time as ticks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

EventT = TypeVar("EventT", contravariant=True)
EffectT = TypeVar("EffectT", covariant=True)


class UnexpectedEvent(Exception):
    """The machine's table has no row for this event in its present state."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: `now_ms` is the shell's monotonic clock, milliseconds."""

    now_ms: int


class Machine(Protocol[EventT, EffectT]):
    def step(self, event: EventT) -> Sequence[EffectT]:
        """Take one event, change state, say what must be done. Raises `UnexpectedEvent`."""
        ...

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        ...
