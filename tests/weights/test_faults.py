"""Sources that die or stop. What a pull leaves behind then must never reach memory that matters."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
import torch

from elastic_ep.weights.transfer import PullFailed, Read, TransferPlane
from tests.kit.one_pull import pull_expert
from tests.weights.source import BLOCK_BYTES, LONG_S, Source, source, weights_of

DEADLINE_S = 0.5
GENEROUS_S = 3.0
"""How late a deadline may be noticed on a busy machine: far less than the library's own minute."""


def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.0005)


def stop_midway(plane: TransferPlane, peer: Source) -> Read:
    """A read of the whole block, whose source stopped when some of it had arrived and some had not."""
    for _ in range(10):
        read = plane.read(peer.address.session, [(peer.block.address, BLOCK_BYTES)])
        lane = read._lane
        until(lambda: len(lane.buffer) >= BLOCK_BYTES and int(lane.buffer[0]) == peer.block_value)  # noqa: B023  # called before the next
        peer.signal(signal.SIGSTOP)
        if not read._ended.wait(0.2) and int(lane.buffer[-1]) != peer.block_value:
            return read
        peer.signal(signal.SIGCONT)
        read.release()
        peer.next_block()
    raise AssertionError("the source was always faster")


def test_a_source_killed_before(plane: TransferPlane) -> None:
    mine = weights_of(1)
    before = mine.checksum(0, 0)
    with source() as known, source() as unknown:
        pull_expert(plane, mine, known.address, 0, 0, 1, None, LONG_S)
        for peer in (known, unknown):
            peer.signal(signal.SIGKILL)
            with pytest.raises(PullFailed, match=r"gone|does not answer"):
                pull_expert(plane, mine, peer.address, 0, 0, 0, None, LONG_S)
    assert mine.checksum(0, 0) == before


def test_a_source_killed_in_the_middle(plane: TransferPlane) -> None:
    with source() as peer, stop_midway(plane, peer) as read:
        began, lane = time.monotonic(), read._lane
        buffer = lane.buffer.data_ptr()
        peer.signal(signal.SIGKILL)
        with pytest.raises(PullFailed, match="gone"):
            read.wait(LONG_S)
        assert time.monotonic() - began < GENEROUS_S
        assert lane.buffer.data_ptr() != buffer, "what may still come must not find another read's bytes"
        assert [kept.data_ptr() for kept in lane._quarantine][-1] == buffer, "nor memory of somebody else"


def test_the_deadline_holds_against_a_stopped_source_that_was_never_spoken_to(plane: TransferPlane) -> None:
    mine, theirs = weights_of(1), weights_of(0)
    before = mine.checksum(0, 0)
    with source() as stopped, source() as alive:
        stopped.signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(PullFailed, match=f"within {DEADLINE_S:g} s"):
            pull_expert(plane, mine, stopped.address, 0, 0, 0, None, DEADLINE_S)
        assert time.monotonic() - began < DEADLINE_S + GENEROUS_S
        assert mine.checksum(0, 0) == before
        # The library is still stuck with the one, and serves the other.
        pull_expert(plane, mine, alive.address, 0, 0, 0, theirs.checksum(0, 0), GENEROUS_S)


def test_a_read_past_its_deadline_never_reaches_the_target(plane: TransferPlane) -> None:
    target = torch.zeros(BLOCK_BYTES, dtype=torch.uint8)
    with source() as peer:
        pull_expert(plane, weights_of(1), peer.address, 0, 0, 0, None, LONG_S)
        peer.signal(signal.SIGSTOP)
        lanes = plane.lanes
        with pytest.raises(PullFailed, match="within"):
            plane.pull(peer.address.session, peer.block.address, target.data_ptr(), BLOCK_BYTES, DEADLINE_S)
        abandoned = plane.lanes - len(plane._idle)
        peer.signal(signal.SIGCONT)
        until(lambda: plane.lanes - len(plane._idle) < abandoned)  # it has arrived, in the lane's own buffer
        assert not target.any()
        plane.pull(peer.address.session, peer.block.address, target.data_ptr(), BLOCK_BYTES, LONG_S)
        assert target.eq(peer.block_value).all()
        assert plane.lanes == lanes, "the lane is in use again"
