"""The step protocol: what a rank's control loop and its forward thread must know of each other at a boundary.

Plain attributes, no locks: the control loop writes, the forward thread reads at each boundary. Two of them need
an order. The forward thread first says which step it is about to begin (`begun`), then looks at `hold_at`; the
control loop first sets `hold_at`, then looks at `begun`. The interpreter lock makes both orders total, so a
step that the control loop found not begun cannot begin past the hold.
"""

from __future__ import annotations

import threading
from collections import deque

from elastic_ep.placement import Placement
from elastic_ep.wire.messages import Assign, Cancel, Member, View

NEVER = 1 << 62
PROMISE_MARGIN = 2
"""Steps between the one in progress and the promised one: nobody stops unless the commit takes longer."""


class Mailbox:
    def __init__(self) -> None:
        # Written by the control loop.
        self.join_ready = False
        """There is a view, a placement or a death that the forward thread has not taken in."""
        self.view = View(epoch=0, seats=())
        self.placement: Placement | None = None
        """None: the one this rank was launched with."""
        self.hold_at = NEVER
        self.inbox: deque[Assign | Cancel] = deque()
        self.stop = False
        self.mask_ns = 0
        """When the control loop last issued a mask."""
        self._dead: dict[int, int] = {}
        """By rank, the newest incarnation that is known to be dead."""
        # Written by the forward thread.
        self.begun = -1
        """The step that it is in, or waits before."""
        self.waiting_at: int | None = None
        """The step before which the forward thread waits because of a hold or because the group is parked."""
        self._wake = threading.Event()

    # Control loop

    def adopt(self, view: View) -> None:
        self.view = view
        self.join_ready = True
        self._wake.set()

    def adopt_placement(self, placement: Placement) -> None:
        self.placement = placement
        self.join_ready = True
        self._wake.set()

    def peer_died(self, member: Member) -> None:
        """The next boundary routes around it, also if the view that lacks it comes later."""
        self._dead[member.rank] = max(member.incarnation, self._dead.get(member.rank, -1))
        self.join_ready = True

    def promise(self) -> int:
        """Hold before a step that is not begun yet; returns it."""
        while True:
            waiting_at = self.waiting_at
            step = waiting_at if waiting_at is not None else self.begun + PROMISE_MARGIN
            self.hold_at = step
            begun = self.begun
            if begun < step or (begun == step and self.waiting_at == step):
                return step

    def release(self) -> None:
        self.hold_at = NEVER
        self._wake.set()

    def deliver(self, message: Assign | Cancel) -> None:
        self.inbox.append(message)

    def request_stop(self) -> None:
        self.stop = True
        self._wake.set()

    # Forward thread

    def may_begin(self, step: int) -> bool:
        """Whether `step` may begin now; else `wait`."""
        self.waiting_at = None
        self.begun = step
        park_at = self.view.park_at  # read once: the control loop may adopt a view at any moment
        if self.hold_at <= step or (park_at is not None and park_at <= step):
            self.waiting_at = step
            return False
        return True

    def is_dead(self, member: Member) -> bool:
        return member.incarnation <= self._dead.get(member.rank, -1)

    def wait(self, timeout_s: float) -> None:
        self._wake.wait(timeout_s)
        self._wake.clear()
