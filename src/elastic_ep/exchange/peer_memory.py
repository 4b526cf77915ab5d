"""The exchange through each other's device memory: all ranks on one host, by NVLink, PCIe or on one GPU.

HAZARD: under MPS a killed rank's memory must stay until its kernels have ended (see mooncake.py and
host/device_files.py). What was mapped of a dead rank is unmapped at the end of a step, when no kernel can be using it.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

import torch

from elastic_ep.exchange.base import ExchangeShape, Format, Received
from elastic_ep.exchange.device import BufferExchange
from elastic_ep.exchange.device_block import Block
from elastic_ep.exchange.peer_kernels import Ends, Layout
from elastic_ep.exchange.store import IncarnationStore


def block_bytes(shape: ExchangeShape) -> int:
    """Device memory that a rank's block takes."""
    return _layout(shape).size


def _layout(shape: ExchangeShape) -> Layout:
    return Layout(shape.slots_per_rank, shape.num_ranks, shape.max_tokens, shape.hidden)


class PeerBuffer:
    """One rank's block, and where those of its peers are mapped. The names are those of Mooncake's buffer."""

    def __init__(
        self, shape: ExchangeShape, rank: int, store: IncarnationStore, connect_timeout: timedelta
    ) -> None:
        layout = _layout(shape)
        self._rank = rank
        self._store = store
        self._connect_timeout = connect_timeout
        self._block = Block(layout.size)
        self._handle = self._block.handle() if layout.ranks > 1 else b""
        places = (layout.slots, layout.ranks)
        rows = (layout.slots, layout.ranks * layout.tokens, layout.hidden)
        self.rows = self._block.tensor(0, rows, torch.bfloat16)
        self.ends = Ends(
            layout,
            rank,
            shape.top_k,
            shape.operations_per_step // 2,
            self.rows,
            self._block.tensor(layout.words_at, places, torch.int64),
            self._block.tensor(layout.ready_at, (layout.ranks,), torch.int64),
        )
        self._mapped: dict[int, int] = {}
        self._unused: list[int] = []
        torch.cuda.synchronize()

    def end_step(self) -> None:
        """The device has nothing to do: what was mapped of members that are gone may go."""
        while self._unused:
            self._block.unmap(self._unused.pop())

    def connect_ranks(self, ranks: Collection[int], activate: bool) -> None:
        (rank,) = ranks
        self._store.set(f"PEER_MEMORY/{self._rank}/{rank}", self._handle)
        key = f"PEER_MEMORY/{rank}/{self._rank}"
        self._store.wait([key], self._connect_timeout)
        (handle,) = self._store.multi_get([key])
        self._store.delete_key(key)
        self._mapped[rank] = self._block.map(handle)

    def disconnect_ranks(self, ranks: Collection[int]) -> None:
        self._unused += [self._mapped.pop(rank) for rank in ranks]

    def update_mask_buffer(self, rank: int, masked: bool) -> None:
        if masked:
            self.ends.mask(rank)
        else:
            self.ends.admit(rank, self._mapped[rank] - self._block.address)

    def query_mask_buffer(self, masks: torch.Tensor) -> None:
        masks.copy_(self.ends.masks)

    def destroy(self) -> None:
        self._unused += self._mapped.values()
        self._mapped.clear()
        self.end_step()
        self._block.close()


class PeerMemoryExchange(BufferExchange[PeerBuffer]):
    """A slot's rows come in parts, one a rank. Its results are best left where they came in `Received.packed`."""

    def _open(self, timeout_ms: int, connect_timeout_ms: int) -> PeerBuffer:
        parts = self.shape.num_ranks
        self.format = Format(
            self._device, torch.bfloat16, torch.int32, tile=None, ordered=False, zero_tail=False, parts=parts
        )
        self._limit_ns = timeout_ms * 1_000_000
        self._operation = 0
        """Of the step: a dispatch and the combine that belongs to it are one."""
        self._chosen: torch.Tensor | None = None
        timeout = timedelta(milliseconds=connect_timeout_ms)
        return PeerBuffer(self.shape, self.member.rank, self._store, timeout)

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self._open_buffer.ends.begin_step(step)

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        buffer = self._open_buffer
        self._chosen = physical_experts.contiguous()
        buffer.ends.send(x.contiguous(), self._chosen, self._operation)
        return Received(buffer.rows, buffer.ends.arrive(self._operation, self._limit_ns))

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        buffer, chosen, operation = self._open_buffer, self._chosen, self._operation
        if chosen is None:
            raise RuntimeError("dispatch and combine must alternate")
        self._chosen = None
        self._operation = (operation + 1) % buffer.ends.operations
        if y.data_ptr() != buffer.rows.data_ptr():
            buffer.rows.copy_(y)
        buffer.ends.say_ready(operation)
        return buffer.ends.fetch(chosen, weights.contiguous(), operation, self._limit_ns)

    def end_step(self) -> frozenset[int]:
        lost = super().end_step()
        for (
            rank
        ) in self.suspects:  # a kernel has given up waiting: so it stays until the rank is admitted again
            self._open_buffer.ends.mask(rank)
        self._open_buffer.end_step()
        return lost
