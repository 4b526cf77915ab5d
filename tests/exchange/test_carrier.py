"""Two hosts and what lies between them: cut links, silence, strangers, bytes that come too late."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.exchange.base import ExchangeShape, Work
from elastic_ep.exchange.carried import Carried
from elastic_ep.exchange.mirror import HEADER, BadFrame, Incoming, Mirror
from elastic_ep.exchange.shm import ShmExchange
from elastic_ep.exchange.step_barrier import NOT_BEGUN, StepBarrier, StepLines
from elastic_ep.exchange.windows import Windows
from elastic_ep.host.carrier import Carrier, CarrierConfig
from elastic_ep.wire.messages import Member
from tests.exchange.carriers import KEY, CarrierPair
from tests.exchange.cut_link import CutLink
from tests.exchange.group import Group, Routing, random_batch, reference, results, until

SHAPE = ExchangeShape(num_ranks=4, max_tokens=6, hidden=8, top_k=2, slots_per_rank=2, operations_per_step=4)
HOSTS = (0, 0, 1, 1)
NOTHING: frozenset[int] = frozenset()


class Linked:
    """A hub whose two hosts reach each other by a link that can be cut."""

    def __init__(self) -> None:
        self.link = CutLink()
        self.pair = CarrierPair(SHAPE, HOSTS, self.link.address, silence_s=0.4)
        self.link.target = self.pair.carriers[0].address

    def end(self, member: Member) -> ShmExchange:
        return ShmExchange(self.pair.fds[HOSTS[member.rank]], SHAPE, member)

    def close(self) -> None:
        self.link.close()
        self.pair.close()


def members() -> list[Member]:
    return [Member(rank, 1) for rank in range(SHAPE.num_ranks)]


def step_exactly(group: Group, step: int) -> None:
    layers = {rank: [random_batch(SHAPE, 5, 10 * step + rank)] * 2 for rank in range(SHAPE.num_ranks)}
    for rank, result in results(group.step(step, layers, Routing.plain(SHAPE))).items():
        assert result.lost == NOTHING
        for output, batch in zip(result.outputs, layers[rank], strict=True):
            assert torch.equal(output, reference(batch))


@pytest.mark.parametrize("how", ["cut", "fall_silent"])
def test_a_link_that_breaks_in_mid_step_costs_time_alone(how: str) -> None:
    hub = Linked()
    with Group(hub, members()) as group:
        step_exactly(group, 0)
        for step in range(1, 4 if how == "fall_silent" else 9):
            passed = hub.link.passed
            breaker = threading.Thread(target=getattr(hub.link, how))
            breaker.start()
            step_exactly(group, step)
            breaker.join()
            until(lambda passed=passed: hub.link.passed > passed)  # type: ignore[misc]  # defaults bind now
        assert hub.pair.carriers[0].counts.refused == 0


def test_a_host_that_is_gone_is_masked_and_waited_for_no_longer() -> None:
    hub = Linked()
    with Group(hub, members()) as group:
        step_exactly(group, 0)
        hub.pair.carriers[1].close()
        layers = {rank: [random_batch(SHAPE, 5, rank)] * 2 for rank in (0, 1)}
        waiting = group.step(1, layers, Routing.plain(SHAPE))
        until(lambda: all(group.ranks[rank].exchange.waiting_for in (2, 3) for rank in (0, 1)))
        for rank in (0, 1):
            for gone in (2, 3):
                group.ranks[rank].exchange.mask(Member(gone, 1))
        for result in results(waiting).values():
            assert result.lost == {2, 3}


def test_a_carrier_that_is_replaced_goes_on_where_the_other_stopped() -> None:
    hub = Linked()
    with Group(hub, members()) as group:
        step_exactly(group, 0)
        for incarnation, host in ((2, 1), (2, 0)):
            hub.pair.carriers[host].close()
            hub.pair.start(host, incarnation)
            hub.link.target = hub.pair.carriers[0].address
            hub.pair.carriers[1].reach(0, hub.link.address)
            step_exactly(group, incarnation - host)


def test_who_is_connected_is_told() -> None:
    pair = CarrierPair(SHAPE, HOSTS)
    with pair.links:
        assert pair.links.wait_for(
            lambda: all(pair.carriers[host].links == (1 - host,) for host in (0, 1)), 10
        )
        pair.carriers[0].fence(1, 1)
        assert pair.links.wait_for(lambda: pair.carriers[0].links == (), 10)
    pair.close()


# Strangers


@pytest.fixture
def carrier() -> Iterator[Carrier]:
    pair = CarrierPair(SHAPE, HOSTS)
    yield pair.carriers[0]
    pair.close()


def dial(carrier: Carrier, hosts: tuple[int, ...] = HOSTS, key: bytes = KEY, incarnation: int = 1) -> Carrier:
    fd = Windows.create(SHAPE, carried=True)
    other = Carrier(CarrierConfig(hosts, 1, incarnation, key), Mirror(fd, SHAPE, hosts, 1))
    os.close(fd)
    other.reach(0, carrier.address)
    return other


def test_another_key_and_other_hosts_are_refused_and_counted(carrier: Carrier) -> None:
    until(lambda: carrier.connected(1))
    for other in (dial(carrier, key=b"guessed"), dial(carrier, hosts=(0, 1, 0, 1))):
        before = carrier.counts.refused
        until(lambda before=before: carrier.counts.refused > before)  # type: ignore[misc]  # defaults bind now
        other.close()
    assert carrier.connected(1), "the real one is not disturbed"


def test_who_speaks_something_else_is_refused(carrier: Carrier) -> None:
    with socket.create_connection(carrier.address) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + bytes(64))
        until(lambda: carrier.counts.refused == 1)


def test_a_host_that_was_given_up_comes_back_as_another_incarnation_only(carrier: Carrier) -> None:
    until(lambda: carrier.connected(1))
    carrier.fence(1, 1)
    assert not carrier.connected(1)
    until(lambda: carrier.counts.refused > 0)  # it goes on dialling
    assert not carrier.connected(1)
    other = dial(carrier, incarnation=2)
    until(lambda: carrier.connected(1))
    other.close()


# Frames


class Hosts:
    """Windows of two hosts, and no carrier: frames are made and applied by hand."""

    def __init__(self) -> None:
        self.fds = [Windows.create(SHAPE, carried=True) for _ in range(2)]
        self.mirrors = [Mirror(fd, SHAPE, HOSTS, host) for host, fd in enumerate(self.fds)]
        self.outgoing = self.mirrors[0].towards(1)
        self.incoming = self.mirrors[1].from_host(0)
        self.ends = {rank: self.end(Member(rank, 1)) for rank in range(4)}

    def end(self, member: Member) -> ShmExchange:
        return ShmExchange(self.fds[HOSTS[member.rank]], SHAPE, member)

    def post(self, rank: int, seed: int = 0, step: int = 0) -> bytes:
        """The frame of a dispatch of `rank`, which knows nobody and so waits for nobody."""
        batch = random_batch(SHAPE, 5, seed)
        self.ends[rank].begin_step(step)
        self.ends[rank].dispatch(batch.x, batch.experts)
        *_, frame = self.outgoing.frames()
        return frame

    def apply(self, frame: bytes) -> None:
        head = frame[: HEADER.size]
        header = self.incoming.header(head)
        body = frame[HEADER.size :]
        if len(body) != self.incoming.body_bytes(header):
            raise BadFrame(
                "another length"
            )  # a stream has no end of a frame: what follows would be taken for the next
        self.incoming.apply(head, header, body)

    def contents(self) -> bytes:
        return os.pread(self.fds[1], Windows.layout(SHAPE).total, 0)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    yield made
    made.close()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_frame_that_is_damaged_anywhere_is_none(data: st.DataObject) -> None:
    hosts = Hosts()
    frame = bytearray(hosts.post(0))
    before = hosts.contents()
    if data.draw(st.booleans()):
        at = data.draw(st.one_of(st.integers(0, HEADER.size - 1), st.integers(0, len(frame) - 1)))
        frame[at] ^= data.draw(st.integers(1, 255))
    else:
        del frame[data.draw(st.integers(HEADER.size, len(frame) - 1)) :]
    with pytest.raises(BadFrame):
        hosts.apply(bytes(frame))
    assert hosts.contents() == before
    hosts.close()


def test_what_comes_twice_or_too_late_is_dropped(hosts: Hosts) -> None:
    first = hosts.post(0)
    hosts.apply(first)
    second = hosts.post(0, seed=1, step=1)
    hosts.apply(second)
    before = hosts.contents()
    for late in (second, first):
        hosts.apply(late)
    assert hosts.contents() == before
    assert hosts.incoming.dropped == 2


def test_a_rank_of_this_host_is_not_written_by_another(hosts: Hosts) -> None:
    frame = hosts.post(0)
    backwards = Incoming(hosts.mirrors[0], 1, Carried(hosts.fds[0], SHAPE))
    with pytest.raises(BadFrame, match="rank 0"):
        backwards.header(frame[: HEADER.size])


def owed(hosts: Hosts) -> bytes:
    """The frame in which rank 0 gives rank 2 its results."""
    everywhere = torch.tensor([[0, 1]]).repeat(3, 1)
    back = hosts.mirrors[1].towards(0)
    there = hosts.mirrors[0].from_host(1)
    for rank in (0, 2):
        hosts.ends[rank].activate(Member(2 - rank, 1))
    hosts.ends[2].begin_step(0)
    waiting = threading.Thread(target=lambda: hosts.ends[2].dispatch(torch.ones(3, 8), everywhere))
    waiting.start()
    until(lambda: hosts.mirrors[1].posted(2) == 1)
    (frame,) = back.frames()
    there.apply(frame[: HEADER.size], there.header(frame[: HEADER.size]), frame[HEADER.size :])
    hosts.ends[0].begin_step(0)
    received = hosts.ends[0].dispatch(torch.zeros(0, 8), torch.zeros(0, 2, dtype=torch.int64))
    (frame,) = hosts.outgoing.frames()
    hosts.apply(frame)
    waiting.join(10)
    assert not waiting.is_alive(), "rank 2 has heard of rank 0"
    hosts.ends[0].mask(Member(2, 1))  # so that it waits for nobody
    hosts.mirrors[0].parts.words[2, 2] = (
        2  # as far as the carrier knows there is a next one, which it does wait for
    )
    hosts.ends[0].combine(torch.full_like(received.packed, 7.0), torch.zeros(0, 2))
    (frame,) = hosts.outgoing.frames()
    return frame


def test_results_of_a_masked_incarnation_are_not_written_any_more(hosts: Hosts) -> None:
    frame = owed(hosts)
    boxes = hosts.mirrors[1].parts.boxes
    hosts.ends[2].mask(Member(0, 1))
    hosts.apply(frame)
    assert not boxes.any()
    assert hosts.mirrors[1].posted(0) == 2, "others may wait for it"


def test_results_are_written_for_whoever_has_not_masked_the_sender(hosts: Hosts) -> None:
    frame = owed(hosts)
    hosts.ends[3].mask(Member(0, 1))
    hosts.apply(frame)
    boxes = hosts.mirrors[1].parts.boxes
    assert np.unique(boxes[boxes.any(axis=1)]).tolist() == [7.0]
    assert boxes.any(axis=1).sum() == 6


def test_who_masks_waits_for_a_write_under_way_and_a_dead_writer_holds_nobody(hosts: Hosts) -> None:
    writer = os.open(f"/proc/self/fd/{hosts.fds[1]}", os.O_RDWR)
    held = Carried(writer, SHAPE)
    masked = threading.Event()

    def mask() -> None:
        hosts.ends[2].mask(Member(0, 1))
        masked.set()

    with held.held():
        thread = threading.Thread(target=mask)
        thread.start()
        until(lambda: held.is_masked(2, Member(0, 1)))
        assert not masked.is_set()
    thread.join(10)
    assert masked.is_set()
    os.close(writer)


def test_an_incarnation_does_not_answer_for_the_one_before(hosts: Hosts) -> None:
    batch = random_batch(SHAPE, 5, 0)
    hosts.ends[0].begin_step(0)
    hosts.ends[0].dispatch(batch.x, batch.experts)
    hosts.end(Member(0, 2))
    assert list(hosts.outgoing.frames()) == []
    assert hosts.mirrors[0].line(0)[0] == 0


def test_nobody_over_there_is_told_once_all_of_them_are_masked(hosts: Hosts) -> None:
    for rank in (2, 3):
        hosts.mirrors[0].parts.words[rank, 2] = 1
        hosts.ends[0].mask(Member(rank, 1))
    batch = random_batch(SHAPE, 5, 0)
    hosts.ends[0].begin_step(0)
    hosts.ends[0].dispatch(batch.x, batch.experts)
    assert list(hosts.outgoing.frames()) == []


# Step words


def test_step_words_reach_the_other_host(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    carriers = [
        Carrier(CarrierConfig(HOSTS, host, 1, KEY), steps=StepLines(folder, 4))
        for host, folder in enumerate(folders)
    ]
    carriers[1].reach(0, carriers[0].address)
    barriers = [StepBarrier(folders[HOSTS[rank]], 4, rank) for rank in range(4)]
    try:
        for step in (7, 8):
            for rank, barrier in enumerate(barriers):
                barrier.say_work(step, Work(rank, step))
                barrier.say(step)
            for barrier in barriers:
                until(lambda barrier=barrier, step=step: all(barrier.of(rank) == step for rank in range(4)))  # type: ignore[misc]
                assert [barrier.work_of(rank, step) for rank in range(4)] == [Work(n, step) for n in range(4)]
        StepBarrier(folders[1], 4, 3)  # the next incarnation
        until(lambda: barriers[0].of(3) == NOT_BEGUN)
    finally:
        for carrier in carriers:
            carrier.close()
