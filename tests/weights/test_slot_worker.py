"""A rank's slot worker with real peers: orders to pull, what goes wrong with them, and none without peers."""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable

import pytest

from elastic_ep.placement import EMPTY
from elastic_ep.rank.slots import SlotWorker
from elastic_ep.timing import USUAL
from elastic_ep.weights.bank import Weights
from elastic_ep.weights.transfer import TransferPlane, open_plane
from elastic_ep.wire.messages import Member
from elastic_ep.wire.slot_messages import CopySlot, SlotCopied, SlotSum, SlotSums, StateReady, SumSlots
from tests.weights.source import PLACEMENT, Source, source, weights_of

ME = Member(1, 7)
WIDTH = PLACEMENT.slots_per_rank
SPARE = [slot for slot, logical in enumerate(PLACEMENT.on_rank(0, 1)) if logical == EMPTY]
FILLED = [slot for slot, logical in enumerate(PLACEMENT.on_rank(0, 0)) if logical != EMPTY]
DEADLINE_S = 30.0


class Runner:
    """What the worker needs of a runner."""

    slots_per_rank = WIDTH

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.loaded: list[int] = []

    def copy_expert(self, layer: int, physical: int, logical: int) -> int:
        if logical >= PLACEMENT.num_experts:
            raise KeyError(f"expert {logical}")
        self.loaded.append(logical)
        self.weights.load_expert(layer, physical % WIDTH, logical)
        return self.weights.checksum(layer, physical % WIDTH)

    def slot_sums(self) -> list[SlotSum]:
        return [SlotSum(0, WIDTH, 5)]


class Bench:
    """A worker at work, and what it has said."""

    def __init__(self, open_plane: Callable[[], TransferPlane | str]) -> None:
        self._news: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.runner = Runner(weights_of(1))
        self.worker = SlotWorker(self._news.put, open_plane, USUAL)
        self.worker.start(self.runner)  # type: ignore[arg-type]  # it has all that is used

    def heard(self) -> object:
        return self._news.get(timeout=DEADLINE_S)

    def copied(self) -> SlotCopied:
        message = self.heard()
        assert isinstance(message, SlotCopied)
        return message


def pull(ticket: int, peer: Source, source_slot: int, slot: int, checksum: int | None) -> CopySlot:
    return CopySlot(ticket, 0, WIDTH + slot, 0, checksum, source_slot, peer.address)


@pytest.fixture
def bench(plane: TransferPlane) -> Bench:
    bench = Bench(lambda: plane)
    ready = bench.heard()
    assert isinstance(ready, StateReady)
    assert ready.address is not None
    assert ready.address.session == plane.session
    assert ready.dense_sum == bench.runner.weights.dense_checksum()
    return bench


def test_pulls_one_after_the_other_and_answers_each(bench: Bench) -> None:
    theirs = weights_of(0)
    with source() as peer:
        for ticket, (slot, from_slot) in enumerate(zip(SPARE * 3, FILLED * 2, strict=False), 1):
            bench.worker.order(pull(ticket, peer, from_slot, slot, theirs.checksum(0, from_slot)))
        bench.worker.order(SumSlots(99))
        for ticket, from_slot in enumerate((FILLED * 2)[: len(SPARE) * 3], 1):
            assert bench.copied() == SlotCopied(ticket, theirs.checksum(0, from_slot))
    assert bench.heard() == SlotSums(99, (SlotSum(0, WIDTH, 5),))
    assert bench.runner.loaded == []


def test_wrong_bytes_are_answered_with_their_checksum_and_not_written(bench: Bench) -> None:
    theirs, before = weights_of(0), bench.runner.weights.checksum(0, SPARE[0])
    right = theirs.checksum(0, FILLED[0])
    with source() as peer:
        peer.corrupt(0, FILLED[0])
        bench.worker.order(pull(1, peer, FILLED[0], SPARE[0], right))
        answer = bench.copied()
    assert answer.error == ""
    assert answer.checksum != right
    assert bench.runner.weights.checksum(0, SPARE[0]) == before


def test_a_dead_source_is_answered_with_an_error_and_the_next_order_carried_out(bench: Bench) -> None:
    theirs = weights_of(0)
    checksum = theirs.checksum(0, FILLED[0])
    with source() as dead, source() as living:
        dead.signal(signal.SIGKILL)
        bench.worker.order(pull(1, dead, FILLED[0], SPARE[0], checksum))
        bench.worker.order(pull(2, living, FILLED[0], SPARE[1], checksum))
        assert bench.copied().error
        assert bench.copied() == SlotCopied(2, checksum)


def test_a_stopped_source_is_given_up_in_time(bench: Bench) -> None:
    checksum = weights_of(0).checksum(0, FILLED[0])
    with source() as peer:
        bench.worker.order(pull(1, peer, FILLED[0], SPARE[0], checksum))
        assert bench.copied().checksum == checksum
        peer.signal(signal.SIGSTOP)
        began = time.monotonic()
        bench.worker.order(pull(2, peer, FILLED[1], SPARE[1], None))
        assert bench.copied().error  # by the library's time limit, or by ours
        assert time.monotonic() - began < DEADLINE_S / 3
        bench.worker.order(CopySlot(3, 0, WIDTH + SPARE[0], 3))
        assert not bench.copied().error


def test_without_a_state_plane_the_checkpoint_serves_and_the_reason_is_said() -> None:
    bench = Bench(lambda: "not installed")
    assert bench.heard() == StateReady(None, 0, "not installed")
    bench.worker.order(CopySlot(1, 0, WIDTH + SPARE[0], 3))
    assert bench.copied() == SlotCopied(1, bench.runner.weights.checksum(0, SPARE[0]))
    bench.worker.order(CopySlot(2, 0, WIDTH + SPARE[0], 99))
    assert bench.copied().error == "KeyError: 'expert 99'"


def test_a_plane_or_the_reason_why_there_is_none() -> None:
    found = open_plane()
    assert isinstance(found, TransferPlane) or "Mooncake" in found
