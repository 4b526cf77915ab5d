"""Asks ranks what the bytes in their expert slots amount to, and remembers what they said."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import anyio

from elastic_ep.wire.messages import Member
from elastic_ep.wire.slot_messages import SlotSums, SumSlots

Place = tuple[int, int]
"""(layer, physical expert)"""


class Audit:
    def __init__(self, send: Callable[[Member, SumSlots], None]) -> None:
        self._send = send
        self._tickets = 0
        self._awaited: dict[int, set[Member]] = {}
        """By ticket, for questions that somebody waits for: who may answer yet."""
        self._lost: dict[int, set[Member]] = {}
        """And who was lost before it did."""
        self._news = anyio.Event()
        self.sums: dict[Place, int] = {}
        """The newest checksum of each slot."""
        self.corrupt: list[Place] = []
        """Every slot that was ever found to differ, in the order of finding."""

    def ask(self, members: Iterable[Member]) -> int:
        """Have these members sum their slots; the ticket of the question."""
        self._tickets += 1
        for member in sorted(members):
            self._send(member, SumSlots(self._tickets))
        return self._tickets

    async def ask_and_wait(self, members: Collection[Member], deadline_s: float) -> set[Member]:
        """Ask, and wait until each of `members` has answered or is lost; those who did not answer, in time or at all."""
        ticket = self.ask(members)
        awaited = self._awaited[ticket] = set(members)
        lost = self._lost[ticket] = set()
        try:
            with anyio.move_on_after(deadline_s):
                while awaited:
                    await self._news.wait()
            return awaited | lost
        finally:
            del self._awaited[ticket], self._lost[ticket]

    def answered(self, member: Member, message: SlotSums) -> None:
        self.sums |= {(layer, physical): checksum for layer, physical, checksum in message.sums}
        self._awaited.get(message.ticket, set()).discard(member)
        self._tell()

    def members_changed(self, members: Collection[Member]) -> None:
        """Whoever is not among `members` any more answers nothing."""
        for ticket, awaited in self._awaited.items():
            self._lost[ticket] |= awaited - set(members)
            awaited &= set(members)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()
