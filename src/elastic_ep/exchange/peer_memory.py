"""The exchange through each other's device memory: all ranks on one host, by NVLink, PCIe or on one GPU.

HAZARD: under MPS a killed rank's memory must stay until its kernels have ended (see mooncake.py and
host/device_files.py). What was mapped of a dead rank is unmapped at the end of a step, when no kernel can be using it.
"""

from __future__ import annotations

from datetime import timedelta

import torch

from elastic_ep.exchange.base import ExchangeShape, Format, Received
from elastic_ep.exchange.device import BufferExchange
from elastic_ep.exchange.device_block import Block
from elastic_ep.exchange.peer_kernels import Ends, Layout


def block_bytes(shape: ExchangeShape) -> int:
    """Device memory that a rank's block takes."""
    return _layout(shape).size


def _layout(shape: ExchangeShape) -> Layout:
    return Layout(shape.slots_per_rank, shape.num_ranks, shape.max_tokens, shape.hidden)


class PeerMemoryExchange(BufferExchange):
    """A slot's rows come in parts, one a rank. Its results are best left where they came in `Received.packed`."""

    def _check(self, shape: ExchangeShape) -> None:
        """Any will do."""

    def _open(self, timeout_ms: int, connect_timeout_ms: int) -> None:
        layout = _layout(self.shape)
        self.format = Format(
            self._device,
            torch.bfloat16,
            torch.int32,
            tile=None,
            ordered=False,
            zero_tail=False,
            parts=layout.ranks,
        )
        self._limit_ns = timeout_ms * 1_000_000
        self._connect_timeout = timedelta(milliseconds=connect_timeout_ms)
        self._operation = 0
        """Of the step: a dispatch and the combine that belongs to it are one."""
        self._chosen: torch.Tensor | None = None
        self._mapped: dict[int, int] = {}
        self._unused: list[int] = []
        self._block = block = Block(layout.size)
        self._handle = block.handle() if layout.ranks > 1 else b""
        rows = (layout.slots, layout.ranks * layout.tokens, layout.hidden)
        self._rows = block.tensor(0, rows, torch.bfloat16)
        self._ends = Ends(
            layout,
            self.member.rank,
            self.shape.top_k,
            self.shape.operations_per_step // 2,
            self._rows,
            block.tensor(layout.words_at, (layout.slots, layout.ranks), torch.int64),
            block.tensor(layout.ready_at, (layout.ranks,), torch.int64),
        )
        torch.cuda.synchronize()

    def _connect(self, rank: int) -> None:
        """HAZARD: the peer, once connected, never leaves another handle, so it is taken away when it has served."""
        self._store.set(f"PEER_MEMORY/{self.member.rank}/{rank}", self._handle)
        key = f"PEER_MEMORY/{rank}/{self.member.rank}"
        self._store.wait([key], self._connect_timeout)
        (handle,) = self._store.multi_get([key])
        self._mapped[rank] = self._block.map(handle)
        self._store.delete_key(key)

    def _disconnect(self, rank: int) -> None:
        self._unused.append(self._mapped.pop(rank))

    def _admit(self, rank: int) -> None:
        self._ends.admit(rank, self._mapped[rank] - self._block.address)

    def _exclude(self, rank: int) -> None:
        self._ends.mask(rank)

    def _query(self, masks: torch.Tensor) -> None:
        masks.copy_(self._ends.masks)

    def _destroy(self) -> None:
        self._unused += self._mapped.values()
        self._mapped.clear()
        self._unmap()
        self._block.close()

    def _unmap(self) -> None:
        """While the device has nothing to do: what was mapped of members that are gone."""
        while self._unused:
            self._block.unmap(self._unused.pop())

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self._ends.begin_step(step)

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        self._chosen = physical_experts.contiguous()
        self._ends.send(x.contiguous(), self._chosen, self._operation)
        return Received(self._rows, self._ends.arrive(self._operation, self._limit_ns))

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ends, chosen, operation = self._ends, self._chosen, self._operation
        if chosen is None:
            raise RuntimeError("dispatch and combine must alternate")
        self._chosen = None
        self._operation = (operation + 1) % ends.operations
        if y.data_ptr() != self._rows.data_ptr():
            self._rows.copy_(y)
        ends.say_ready(operation)
        return ends.fetch(chosen, weights.contiguous(), operation, self._limit_ns)

    def end_step(self) -> frozenset[int]:
        lost = super().end_step()
        for rank in self.suspects:
            self._ends.mask(rank)  # what a kernel masked stays so until the rank is admitted again
        self._unmap()
        return lost
