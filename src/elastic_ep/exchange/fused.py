"""The exchange of ranks on one machine, performed in C++ (fused/exchange.h): a whole step needs no interpreter."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from elastic_ep.exchange.base import ExchangeShape, Received
from elastic_ep.exchange.pull import TILE
from elastic_ep.exchange.shm import ShmExchange
from elastic_ep.fused.library import ExchangeState, Fused
from elastic_ep.wire.messages import Member


class FusedExchange(ShmExchange):
    """`state` is what `Fused.forward` and its parts are given: they perform operations as `dispatch` and `combine` do.

    Raises ValueError when the file is not laid out for `shape`.
    """

    def __init__(self, fd: int, shape: ExchangeShape, member: Member, fused: Fused) -> None:
        super().__init__(fd, shape, member)
        self._fused = fused
        entries = shape.num_ranks * shape.max_tokens * shape.top_k
        self._missed = np.zeros(shape.num_ranks, np.uint8)
        self._kept: list[np.ndarray[Any, Any]] = [
            np.zeros(size, np.int64) for size in (2 * entries, entries, shape.slots_per_rank + 1)
        ]
        found, rows, firsts = self._kept
        self._firsts = firsts
        parts = {
            "words": np.frombuffer(self._words, np.int64),
            "experts": self._experts,
            "x": self._x,
            "boxes": self._boxes,
            "live": self._peers.live_array,
            "reachable": self._peers.reachable,
            "missed": self._missed,
            "found": found,
            "rows": rows,
            "firsts": firsts,
        }
        self.state = ExchangeState(
            ranks=shape.num_ranks,
            max_tokens=shape.max_tokens,
            hidden=shape.hidden,
            top_k=shape.top_k,
            slots=shape.slots_per_rank,
            me=member.rank,
            carried=self._carried is not None,
            **{name: part.ctypes.data for name, part in parts.items()},
        )
        self.at = ctypes.pointer(self.state)

    @property
    def waiting_for(self) -> int | None:
        return self._missing(self.state.number) if self.state.waits else None

    @property
    def operations(self) -> int:
        return int(self.state.operations)

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.state.number = self._number

    def end_step(self) -> frozenset[int]:
        self._number = self.state.number
        if self.state.astray:
            self._peers.miss(self._missed.nonzero()[0].tolist())
            self.state.astray = 0
            self._missed.fill(0)
        return super().end_step()

    def close(self) -> None:
        super().close()
        self.state.number = self._last

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        self._expect(combine=False)
        shape, tokens = self.shape, len(physical_experts)
        if tuple(physical_experts.shape[1:]) != (shape.top_k,) or tuple(x.shape) != (tokens, shape.hidden):
            raise ValueError(
                f"x {tuple(x.shape)}, experts {tuple(physical_experts.shape)}: do not fit {shape}"
            )
        if tokens > shape.max_tokens:
            raise ValueError(f"{tokens} tokens, but max_tokens is {shape.max_tokens}")
        x, chosen = _floats(x), physical_experts.to(torch.int32).contiguous()
        if not self._fused.dispatch(self.at, x.data_ptr(), chosen.data_ptr(), tokens):
            raise ValueError("a physical expert out of range")
        counts = np.diff(self._firsts)
        capacity = TILE * max(1, -(-int(counts.max()) // TILE))
        packed = torch.zeros(shape.slots_per_rank, capacity, shape.hidden)
        self._fused.fetch(self.at, packed.data_ptr(), capacity)
        return Received(packed, torch.from_numpy(counts))

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self._expect(combine=True)
        tokens, shape, capacity = self.state.tokens, self.shape, y.shape[1]
        if tuple(weights.shape) != (tokens, shape.top_k):
            raise ValueError(f"weights {tuple(weights.shape)}: expected {(tokens, shape.top_k)}")
        if y.shape[::2] != (shape.slots_per_rank, shape.hidden) or capacity < np.diff(self._firsts).max():
            raise ValueError(f"y {tuple(y.shape)} is not shaped like what dispatch gave")
        y, weights, out = _floats(y), _floats(weights), torch.empty(tokens, shape.hidden)
        self._fused.combine(self.at, y.data_ptr(), capacity, weights.data_ptr(), out.data_ptr())
        return out

    def _expect(self, *, combine: bool) -> None:
        if self.state.number == self._last:
            raise RuntimeError("more operations than operations_per_step, or no step begun")
        if self.state.number % 2 != combine:
            raise RuntimeError("dispatch and combine must alternate")


def _floats(rows: torch.Tensor) -> torch.Tensor:
    """As C++ reads them."""
    if rows.dtype is not torch.float32:
        raise ValueError(f"{rows.dtype}: float32 expected")
    return rows.contiguous()
