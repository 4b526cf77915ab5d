"""A rank's expert slots: copies and checksums, on a thread of their own while the forward thread goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.host.scheduling import make_ordinary
from elastic_ep.timing import Timing
from elastic_ep.weights.peers import ExpertPull, Pulled, publish, pull_experts
from elastic_ep.weights.transfer import TransferPlane, WrongBytes
from elastic_ep.wire.slot_messages import CopySlot, SlotCopied, SlotSums, StateReady, SumSlots


class SlotWorker:
    """Carries out orders, and posts the answers. `open_plane`: this rank's end of the state plane.

    HAZARD: its thread must not be nicer than the others. On a busy machine it would be kept waiting while it holds the
    interpreter lock, the control loop with it, and the rank would be taken for hung.
    """

    def __init__(
        self,
        post: Callable[[StateReady | SlotCopied | SlotSums], None],
        open_plane: Callable[[], TransferPlane | str],
        timing: Timing,
    ) -> None:
        self._post = post
        self._open_plane = open_plane
        self._pull_s = timing.slot_pull_ms / 1000
        self._orders: queue.SimpleQueue[CopySlot | SumSlots] = queue.SimpleQueue()

    def order(self, message: CopySlot | SumSlots) -> None:
        self._orders.put(message)

    def start(self, runner: StepRunner) -> None:
        """Orders that came before the runner exists have waited."""
        threading.Thread(target=self._main, args=(runner,), name="slots", daemon=True).start()

    def _main(self, runner: StepRunner) -> None:
        make_ordinary()
        plane = self._publish(runner)
        put_back: list[CopySlot | SumSlots] = []
        while True:
            order = put_back.pop() if put_back else self._orders.get()
            if isinstance(order, SumSlots):
                self._post(SlotSums(order.ticket, tuple(runner.slot_sums())))
            elif plane is None or order.source is None:
                self._post(self._load(runner, order))
            else:
                pulls = _Pulls(order, self._orders, runner.slots_per_rank)
                for outcome in pull_experts(plane, runner.weights, pulls, self._pull_s):
                    self._post(self._pulled(outcome))
                put_back = pulls.others

    def _publish(self, runner: StepRunner) -> TransferPlane | None:
        """Let peers read this rank's weights, if they lie where peers can read."""
        device = runner.weights.embed.device.type
        plane = (
            self._open_plane() if device == "cpu" else f"weights on a {device} device are not served to peers"
        )
        if isinstance(plane, str):
            self._post(StateReady(None, 0, plane))
            return None
        address = publish(plane, runner.weights)
        weights = runner.weights
        self._post(StateReady(address, weights.dense_checksum(), pulled=weights.from_peers))
        return plane

    def _load(self, runner: StepRunner, order: CopySlot) -> SlotCopied:
        try:
            checksum = runner.copy_expert(order.layer, order.physical, order.logical)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            return SlotCopied(order.ticket, 0, f"{type(error).__name__}: {error}")
        return SlotCopied(order.ticket, checksum)

    def _pulled(self, outcome: Pulled) -> SlotCopied:
        ticket = outcome.pull.ticket
        if isinstance(outcome.failure, WrongBytes):
            return SlotCopied(ticket, outcome.failure.checksum)
        if outcome.checksum is None:
            return SlotCopied(ticket, 0, str(outcome.failure))
        return SlotCopied(ticket, outcome.checksum)


class _Pulls:
    """Orders to pull, as long as one comes after the other; the first of another kind is left in `others`."""

    def __init__(
        self, first: CopySlot, orders: queue.SimpleQueue[CopySlot | SumSlots], slots_per_rank: int
    ) -> None:
        self._next: CopySlot | None = first
        self._orders = orders
        self._width = slots_per_rank
        self.others: list[CopySlot | SumSlots] = []

    def __iter__(self) -> Iterator[ExpertPull]:
        return self

    def __next__(self) -> ExpertPull:
        order, self._next = self._next, None
        if order is None:
            order = self._take()
        assert order.source is not None
        assert order.origin is not None
        slot, source_slot = order.physical % self._width, order.origin % self._width
        return ExpertPull(order.source, source_slot, order.layer, slot, order.checksum, order.ticket)

    def _take(self) -> CopySlot:
        if self.others:
            raise StopIteration
        try:
            order = self._orders.get_nowait()
        except queue.Empty:
            raise StopIteration from None
        if isinstance(order, SumSlots) or order.source is None:
            self.others.append(order)
            raise StopIteration
        return order
