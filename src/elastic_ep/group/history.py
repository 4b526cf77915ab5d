"""What has become of ranks, of the host and of the group lately: for who looks on. Bounded, on the event loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import structlog

from elastic_ep.group.port import Loss, Move

MOST_MOVES = 4096
MOST_LOSSES = 100
GROUP, HOST = -1, -2
"""As the rank of a move: the group as a whole, and the fork server, which is the host's part that starts ranks."""
log = structlog.get_logger()


class History:
    """`edition` counts its changes. A listener is called after each; it must be quick."""

    def __init__(self) -> None:
        self.moves: deque[Move] = deque(maxlen=MOST_MOVES)
        self.losses: deque[Callable[[], Loss]] = deque(maxlen=MOST_LOSSES)
        """Oldest first. A loss becomes better known with time: its cause, its stall, its rank's return."""
        self.number = 0
        """Of the newest move; they are numbered from 1 on."""
        self.losses_edition = 0
        self._listeners: list[Callable[[], None]] = []

    def listen(self, wake: Callable[[], None]) -> None:
        self._listeners.append(wake)

    def moved(self, rank: int, incarnation: int, state: str) -> None:
        self.number += 1
        self.moves.append(Move(self.number, time.time_ns() // 1_000_000, rank, incarnation, state))
        self._tell()

    def lost(self, loss: Callable[[], Loss]) -> None:
        """`loss` tells what is known of it, whenever it is asked."""
        self.losses.append(loss)
        self.loss_changed()

    def loss_changed(self) -> None:
        self.losses_edition += 1
        self._tell()

    def since(self, number: int) -> tuple[Move, ...]:
        """Moves after that one, oldest first, as far as they are kept."""
        wanted = min(len(self.moves), self.number - number)
        return tuple(self.moves[place] for place in range(len(self.moves) - wanted, len(self.moves)))

    def _tell(self) -> None:
        for wake in self._listeners:
            try:
                wake()
            except Exception:  # HAZARD: whoever looks on is no reason for the group to fail
                log.exception("a listener failed")
