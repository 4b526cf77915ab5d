"""Asks ranks what the bytes in their expert slots amount to, and remembers what they said."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import anyio

from elastic_ep.messages import Member
from elastic_ep.slot_messages import SlotSums, SumSlots

Place = tuple[int, int]
"""(layer, physical expert)"""


class Proofs:
    def __init__(self, send: Callable[[Member, SumSlots], None]) -> None:
        self._send = send
        self._tickets = 0
        self._awaited: dict[int, set[Member]] = {}
        self._news = anyio.Event()
        self.sums: dict[Place, int] = {}
        """The newest checksum of each slot."""
        self.corrupt: list[Place] = []
        """Every slot that was ever found to differ, in the order of finding."""

    def ask(self, members: Iterable[Member]) -> int:
        """Have these members sum their slots; the ticket of the question."""
        self._tickets += 1
        self._awaited[self._tickets] = set(members)
        for member in sorted(self._awaited[self._tickets]):
            self._send(member, SumSlots(self._tickets))
        return self._tickets

    def heard(self, member: Member, message: SlotSums) -> None:
        self.sums |= {(layer, physical): checksum for layer, physical, checksum in message.sums}
        self._awaited.get(message.ticket, set()).discard(member)
        self._news.set()
        self._news = anyio.Event()

    async def answers(self, ticket: int, deadline_s: float) -> set[Member]:
        """Wait for all answers to a question; those who did not answer in time."""
        with anyio.move_on_after(deadline_s):
            while self._awaited[ticket]:
                await self._news.wait()
        return self._awaited.pop(ticket)
