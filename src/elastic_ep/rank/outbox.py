"""What a rank's threads have to say: to its control loop, which passes on what is for the controller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.exchange.base import Exchange
from elastic_ep.machines.rank.events import ThreadEvent
from elastic_ep.wire.messages import RequestFailed, StepReport
from elastic_ep.wire.slot_messages import ExpertLoads, PlacementSeen, SlotCopied, SlotSums, StateReady
from elastic_ep.wire.store_messages import StoreDelete, StoreGet, StoreSet


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is built. Posted once; of the exchange the control loop's half is the control loop's from now on."""

    runner: StepRunner
    exchange: Exchange


Message = (
    StepReport
    | PlacementSeen
    | ExpertLoads
    | StateReady
    | SlotCopied
    | SlotSums
    | StoreSet
    | StoreGet
    | StoreDelete
    | RequestFailed
)
"""For the controller."""
Posted = Message | Ready | ThreadEvent
Post = Callable[[Posted], None]


class Outbox:
    """One a rank, in order. `wake` makes the control loop `take`; it is called from any thread."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._items: deque[Posted] = deque()
        self._wake = wake

    def post(self, item: Posted) -> None:
        """Any thread but the control loop's. Raises RuntimeError when the loop has ended."""
        self._items.append(item)
        self._wake()

    def take(self) -> Iterator[Posted]:
        """The control loop's: until there is nothing left."""
        while self._items:
            yield self._items.popleft()
