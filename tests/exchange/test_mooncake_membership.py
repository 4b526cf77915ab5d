"""Connecting, masking and activating over Mooncake without a GPU: the buffer is a fake that meets peers as the real."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elastic_ep.exchange import device, mooncake
from elastic_ep.exchange.base import ExchangeShape, Work
from elastic_ep.exchange.mooncake import MooncakeExchange
from elastic_ep.exchange.step_barrier import StepBarrier
from elastic_ep.exchange.store import IncarnationStore, PeerGone
from elastic_ep.wire.messages import Member
from tests.kit.file_store import FileStore

SHAPE = ExchangeShape(num_ranks=3, max_tokens=4, hidden=128, top_k=2, slots_per_rank=2, operations_per_step=2)
ME, PEER, OTHER = Member(0, 0), Member(1, 2), Member(2, 0)
CONNECT_TIMEOUT_MS = 30_000
DEADLINE_S = 10.0
"""Far below the former: a wait that only its timeout ends is found out."""


class Buffer:
    """Mooncake's, as far as membership goes; `calls` is what reached it."""

    def __init__(self, rank: int, store: IncarnationStore, timeout: timedelta) -> None:
        self._rank = rank
        self._store = store
        self._timeout = timeout
        self.calls: list[tuple[Any, ...]] = []
        self.staged: dict[int, bytes] = {}
        self.connecting = threading.Event()

    @classmethod
    def create_elastic(
        cls, *, rank: int, tcp_store_group: IncarnationStore, metadata_timeout_ms: int, **_: Any
    ) -> Buffer:
        return cls(rank, tcp_store_group, timedelta(milliseconds=metadata_timeout_ms))

    @staticmethod
    def get_low_latency_buffer_size_hint(*_: int) -> int:
        return 0

    def update_memory_buffers(self, *_: int) -> None:
        pass

    def connect_ranks(self, ranks: list[int], activate: bool) -> None:
        (rank,) = ranks
        assert not activate
        assert rank not in self.staged, "the library refuses a slot that is occupied"
        self.calls.append(("connect", rank))
        self._store.set(f"MOONCAKE_EP/{self._rank}/{rank}", b"address of %d" % self._rank)
        self.connecting.set()
        key = f"MOONCAKE_EP/{rank}/{self._rank}"
        self._store.wait([key], self._timeout)
        (self.staged[rank],) = self._store.multi_get([key])
        self._store.delete_key(key)

    def disconnect_ranks(self, ranks: list[int]) -> None:
        self.calls.append(("disconnect", *ranks))
        for rank in ranks:
            del self.staged[rank]

    def query_mask_buffer(self, masks: torch.Tensor) -> None:
        """Nobody is masked by a kernel."""

    def update_mask_buffer(self, rank: int, masked: bool) -> None:
        self.calls.append(("mask" if masked else "unmask", rank))


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        current_device=lambda: 0,
        current_stream=lambda device: stream,
        device=lambda device: nullcontext(),
        stream=lambda stream: nullcontext(),
        Stream=lambda *_, **__: stream,
        Event=lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
    )
    fake = SimpleNamespace(
        cuda=cuda,
        device=torch.device,
        int32=torch.int32,
        bfloat16=torch.bfloat16,
        zeros=lambda size, **_: torch.zeros(size),
    )
    monkeypatch.setattr(mooncake, "torch", fake)
    monkeypatch.setattr(device, "torch", fake)
    monkeypatch.setattr(mooncake, "load_buffer_class", lambda: Buffer)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


class End:
    """One rank's exchange; all that share `directory` meet."""

    def __init__(self, directory: Path, member: Member, barrier: Any = None) -> None:
        self._directory = directory
        self.member = member
        self.exchange = MooncakeExchange(
            SHAPE,
            member,
            FileStore(directory),
            barrier=barrier,
            timeout_ms=20_000,
            connect_timeout_ms=CONNECT_TIMEOUT_MS,
        )
        self.buffer: Buffer = self.exchange._buffer

    def expected_by(self, peer: Member) -> None:
        """`peer` has left its address already."""
        store = IncarnationStore(FileStore(self._directory))
        store.incarnations = dict((peer, self.member))
        store.set(f"MOONCAKE_EP/{peer.rank}/{self.member.rank}", b"address of %d" % peer.rank)

    def connect(self, peer: Member) -> None:
        self.expected_by(peer)
        self.exchange.connect(peer)

    def calls(self) -> list[tuple[Any, ...]]:
        """Since the last time."""
        calls, self.buffer.calls = self.buffer.calls, []
        return calls


@pytest.fixture
def end(tmp_path: Path) -> End:
    return End(tmp_path, ME)


def test_both_sides_meet(end: End, tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    first = threads.submit(end.exchange.connect, PEER)
    assert end.buffer.connecting.wait(DEADLINE_S)
    assert not end.buffer.staged
    peer = End(tmp_path, PEER)
    peer.exchange.connect(ME)
    first.result(DEADLINE_S)
    assert end.buffer.staged == {PEER.rank: b"address of 1"}
    assert peer.buffer.staged == {ME.rank: b"address of 0"}
    assert end.exchange.live == {ME.rank}, "connected is not active"


def test_a_joiner_that_dies_while_it_is_connected_to_keeps_no_other_joiner_waiting(
    end: End, threads: ThreadPoolExecutor
) -> None:
    """The mask comes from the control loop, though the joiner was in no view."""
    dying = threads.submit(end.exchange.connect, PEER)
    assert end.buffer.connecting.wait(DEADLINE_S)
    other = threads.submit(end.connect, OTHER)
    end.exchange.mask(PEER)
    with pytest.raises(PeerGone):
        dying.result(DEADLINE_S)
    other.result(DEADLINE_S)
    assert end.calls() == [("connect", PEER.rank), ("connect", OTHER.rank)]


def test_a_mask_in_the_middle_of_an_update_is_not_lost(end: End) -> None:
    """The control loop masks while the connecting thread is between reading and writing whom it wants."""

    class Interrupted(dict[int, int]):
        def get(self, rank: int, default: Any = None) -> Any:
            known = super().get(rank, default)
            end.exchange.mask(PEER)
            return known

    end.exchange._wanted = Interrupted()
    with pytest.raises(PeerGone):
        end.exchange.connect(PEER)
    assert end.calls() == []


def test_the_next_incarnation_ends_the_wait_for_the_one_before(end: End, threads: ThreadPoolExecutor) -> None:
    before = threads.submit(end.exchange.connect, PEER)
    assert end.buffer.connecting.wait(DEADLINE_S)
    end.connect(Member(PEER.rank, PEER.incarnation + 1))
    with pytest.raises(PeerGone):
        before.result(DEADLINE_S)


def test_whoever_died_before_is_not_waited_for(end: End) -> None:
    end.exchange.mask(PEER)
    with pytest.raises(PeerGone):
        end.connect(PEER)
    assert end.calls() == []
    end.connect(Member(PEER.rank, PEER.incarnation + 1))
    assert end.calls() == [("connect", PEER.rank)]


def test_an_older_incarnation_is_not_connected_again(end: End) -> None:
    end.connect(PEER)
    assert end.calls() == [("connect", PEER.rank)]
    for incarnation in range(PEER.incarnation + 1):
        end.exchange.connect(Member(PEER.rank, incarnation))
    end.exchange.connect(ME)
    assert end.calls() == []


def test_a_newer_incarnation_takes_the_place_of_the_older(end: End) -> None:
    end.connect(PEER)
    end.connect(Member(PEER.rank, PEER.incarnation + 1))
    assert end.calls() == [("connect", PEER.rank), ("disconnect", PEER.rank), ("connect", PEER.rank)]


def test_only_who_is_live_is_masked_on_the_device(end: End) -> None:
    end.connect(PEER)
    end.exchange.mask(Member(PEER.rank, PEER.incarnation - 1))
    end.exchange.mask(OTHER)
    assert end.calls() == [("connect", PEER.rank)]
    end.exchange.activate(PEER)
    assert end.exchange.live == {ME.rank, PEER.rank}
    for _ in range(2):
        end.exchange.mask(PEER)
    assert end.calls() == [("unmask", PEER.rank), ("mask", PEER.rank)]
    assert end.exchange.live == {ME.rank}


def test_whoever_is_masked_is_not_activated_any_more(end: End) -> None:
    end.connect(PEER)
    end.exchange.mask(PEER)
    end.exchange.activate(PEER)
    assert end.calls() == [("connect", PEER.rank)]
    assert end.exchange.live == {ME.rank}
    end.connect(Member(PEER.rank, PEER.incarnation + 1))
    end.exchange.activate(Member(PEER.rank, PEER.incarnation + 1))
    assert end.calls()[-1] == ("unmask", PEER.rank)


def test_what_was_connected_is_taken_in_at_the_next_boundary_alone(end: End) -> None:
    """Otherwise the first mask in mid-step does it, and waits for the device."""
    end.connect(PEER)
    end.connect(OTHER)
    end.exchange.activate(PEER)
    end.calls()
    end.exchange.begin_step(1)
    assert end.calls() == [("mask", OTHER.rank)], "a mask as it is already"
    end.exchange.begin_step(2)
    assert end.calls() == []


def test_an_activation_has_taken_in_what_was_connected(end: End) -> None:
    end.connect(PEER)
    end.exchange.activate(PEER)
    end.calls()
    end.exchange.begin_step(1)
    assert end.calls() == []


def test_a_step_is_begun_without_waiting_and_then_met_by_all_who_take_part(tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    barrier = SimpleNamespace(
        say=lambda step: calls.append(("say", step)),
        say_work=lambda step, work: calls.append(("say work", step, work)),
        work_of=lambda rank, step: {PEER.rank: Work(64, 5)}[rank],
        wait_for=lambda step, ranks: calls.append(("wait for", step, set(ranks()))),
    )
    end = End(tmp_path, ME, barrier)
    end.exchange.begin_step(6)
    end.exchange.meet(Work(0, 0))
    assert calls == [], "alone"
    end.connect(PEER)
    end.exchange.activate(PEER)
    end.exchange.begin_step(7)
    assert calls == [("say", 7)]
    end.exchange.mask(PEER)
    end.exchange.meet(Work(9, 2))
    told = [("say work", 7, Work(9, 2)), ("wait for", 7, {ME.rank})]
    assert calls[1:] == told, "whoever is masked is not waited for"
    end.exchange.end_step()
    assert end.exchange.work() == Work(9, 2), "nor asked what it did"


def test_what_all_ranks_did_in_a_step_is_known_when_it_has_ended(tmp_path: Path) -> None:
    mine, other = (StepBarrier(tmp_path, 2, member.rank) for member in (ME, PEER))
    end = End(tmp_path, ME, mine)
    assert end.exchange.work() == Work(0, 0)
    end.connect(PEER)
    end.exchange.activate(PEER)
    for step, own, others in ((7, Work(64, 1), Work(0, 5)), (8, Work(0, 2), Work(128, 0))):
        end.exchange.begin_step(step)
        other.say_work(step, others)
        other.say(step)
        end.exchange.meet(own)
        end.exchange.end_step()
        other.say_work(step + 1, Work(999, 999))  # it is quick, and has begun the next
        assert end.exchange.work() == Work(max(own[0], others[0]), own[1] + others[1])
