"""Connecting, masking and admitting through peers' memory without a GPU: blocks are on the host, no kernel is run.

What the kernels do is in tests/engine/kernels/test_peer_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elastic_ep.exchange import device, peer_memory
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.device_block import DriverError
from elastic_ep.exchange.peer_memory import PeerMemoryExchange
from elastic_ep.wire.messages import Member
from tests.kit.file_store import FileStore

SHAPE = ExchangeShape(num_ranks=2, max_tokens=4, hidden=8, top_k=2, slots_per_rank=2, operations_per_step=4)
ME, PEER, NEXT = Member(0, 0), Member(1, 2), Member(1, 3)
DEADLINE_S = 10.0


class Block:
    """Its handle is its address."""

    broken = 0
    """So many mappings fail."""

    def __init__(self, size: int) -> None:
        self._bytes = torch.zeros(size, dtype=torch.uint8)
        self.address = self._bytes.data_ptr()
        self.unmapped: list[int] = []

    def handle(self) -> bytes:
        return str(self.address).encode()

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._bytes[offset : offset + size].view(dtype).view(shape)

    def map(self, handle: bytes) -> int:
        if Block.broken:
            Block.broken -= 1
            raise DriverError("cannot map")
        return int(handle)

    def unmap(self, address: int) -> None:
        self.unmapped.append(address)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        current_device=lambda: 0,
        device=lambda device: nullcontext(),
        Event=lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
        synchronize=lambda *_: None,
    )
    fake = SimpleNamespace(
        cuda=cuda,
        device=torch.device,
        int32=torch.int32,
        int64=torch.int64,
        bfloat16=torch.bfloat16,
        zeros=lambda size, **_: torch.zeros(size),
    )
    monkeypatch.setattr(device, "torch", fake)
    monkeypatch.setattr(peer_memory, "torch", fake)
    monkeypatch.setattr(peer_memory, "Block", Block)
    monkeypatch.setattr(Block, "broken", 0)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def end(directory: Path, member: Member) -> PeerMemoryExchange:
    return PeerMemoryExchange(
        SHAPE, member, FileStore(directory), timeout_ms=20_000, connect_timeout_ms=int(1000 * DEADLINE_S)
    )


def connect(one: PeerMemoryExchange, other: PeerMemoryExchange, threads: ThreadPoolExecutor) -> None:
    both = [threads.submit(one.connect, other.member), threads.submit(other.connect, one.member)]
    for future in both:
        future.result(DEADLINE_S)


def step(exchange: PeerMemoryExchange, number: int) -> frozenset[int]:
    exchange.begin_step(number)
    return exchange.end_step()


def test_who_is_admitted_is_known_to_kernels_from_the_next_step_on(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    mine, theirs = end(tmp_path, ME), end(tmp_path, PEER)
    connect(mine, theirs, threads)
    assert not list(tmp_path.iterdir()), "what was said is taken away"
    step(mine, 0)
    assert mine._ends.masks.tolist() == [0, 1]
    mine.activate(PEER)
    step(mine, 1)
    assert mine._ends.masks.tolist() == [0, 0]
    assert mine._ends._peers.tolist() == [0, theirs._block.address - mine._block.address]
    assert mine._ends._base.tolist() == [2 * 2]


def test_a_mask_is_told_at_once_and_stays(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    mine, theirs = end(tmp_path, ME), end(tmp_path, PEER)
    connect(mine, theirs, threads)
    mine.activate(PEER)
    mine.begin_step(0)
    mine.mask(PEER)
    assert mine._ends._told_masks.tolist() == [0, 1]
    assert mine.end_step() == {1}
    assert step(mine, 1) == frozenset()
    assert mine._ends.masks.tolist() == [0, 1]


def test_whom_a_kernel_gave_up_stays_masked_and_is_a_suspect(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    mine, theirs = end(tmp_path, ME), end(tmp_path, PEER)
    connect(mine, theirs, threads)
    mine.activate(PEER)
    mine.begin_step(0)
    mine._ends.masks[1] = 1
    assert mine.end_step() == {1}
    mine.begin_step(1)
    assert mine._ends.masks.tolist() == [0, 1]
    assert mine.end_step() == mine.suspects == {1}


def test_the_memory_of_one_that_is_gone_is_unmapped_between_steps_alone(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    mine, theirs = end(tmp_path, ME), end(tmp_path, PEER)
    block: Any = mine._block
    connect(mine, theirs, threads)
    mine.activate(PEER)
    mine.begin_step(0)
    mine.mask(PEER)
    connect(mine, end(tmp_path, NEXT), threads)
    assert block.unmapped == []
    mine.end_step()
    assert block.unmapped == [theirs._block.address]


def test_a_handle_that_could_not_be_used_is_there_for_the_next_try(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    """The peer, once connected, leaves none again."""
    mine, theirs = end(tmp_path, ME), end(tmp_path, PEER)
    waiting = threads.submit(theirs.connect, ME)
    Block.broken = 1
    outcomes = []
    for _ in range(2):
        try:
            mine.connect(PEER)
            outcomes.append("connected")
        except DriverError:
            outcomes.append("failed")
        except TimeoutError:
            outcomes.append("no handle")
    try:
        waiting.result(DEADLINE_S)
    except DriverError:  # the one that failed was theirs
        theirs.connect(ME)
    assert outcomes in (["failed", "connected"], ["connected", "connected"])


def test_what_there_is_no_room_for_is_refused(tmp_path: Path) -> None:
    mine = end(tmp_path, ME)
    with pytest.raises(ValueError, match="5 tokens, but there is room for 4"):
        mine.dispatch(torch.zeros(5, 8), torch.zeros(5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="rows"):
        mine.dispatch(torch.zeros(4, 9), torch.zeros(4, 2, dtype=torch.int64))
