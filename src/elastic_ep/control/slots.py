"""A rank's expert slots: copies and checksums, on a thread of their own while the forward thread goes on."""

from __future__ import annotations

import queue
import threading

from elastic_ep.control.mailbox import Mailbox
from elastic_ep.control.scheduling import make_background, make_ordinary
from elastic_ep.messages import Member
from elastic_ep.model.runner import ModelRunner
from elastic_ep.slot_messages import CopySlot, SlotCopied, SlotSums, SumSlots

NICENESS = 5
"""Above the forward thread's: steps come first, repair takes what is left."""


class SlotWorker:
    """Carries out orders one after the other, and leaves the answers in the mailbox."""

    def __init__(self, me: Member, mailbox: Mailbox) -> None:
        self._me = me
        self._mailbox = mailbox
        self._orders: queue.SimpleQueue[CopySlot | SumSlots] = queue.SimpleQueue()

    def order(self, message: CopySlot | SumSlots) -> None:
        self._orders.put(message)

    def start(self, runner: ModelRunner) -> None:
        """Orders that came before the runner exists have waited."""
        threading.Thread(target=self._main, args=(runner,), name="slots", daemon=True).start()

    def _main(self, runner: ModelRunner) -> None:
        make_ordinary()
        make_background(NICENESS)
        while True:
            message = self._orders.get()
            if isinstance(message, CopySlot):
                self._mailbox.post(self._copy(runner, message))
            else:
                self._mailbox.post(SlotSums(*self._me, message.ticket, tuple(runner.slot_sums())))

    def _copy(self, runner: ModelRunner, order: CopySlot) -> SlotCopied:
        try:
            checksum = runner.copy_expert(order.layer, order.physical, order.logical)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            return SlotCopied(*self._me, order.ticket, 0, f"{type(error).__name__}: {error}")
        return SlotCopied(*self._me, order.ticket, checksum)
