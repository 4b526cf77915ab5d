"""What a rank of `bench.gpu_moe_layer` has: exchange, experts, and tokens with their routing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.kit.file_store import FileStore
from tests.kit.solo_exchange import SoloDeviceExchange

from elastic_ep.engine.routing_table import Copies
from elastic_ep.exchange.base import DeviceExchange, ExchangeShape, Received
from elastic_ep.exchange.mooncake import MooncakeExchange
from elastic_ep.placement import launch_placement
from elastic_ep.timing import USUAL
from elastic_ep.wire.messages import Member

BF16 = torch.bfloat16
SMALLEST_RECEIVE = 16
"""`max_tokens` at least: tokens that a rank may send in a step."""
_TIMEOUT_MS = 60_000


@dataclass(frozen=True, slots=True)
class Case:
    tokens: int
    """Of each rank."""
    redundant: int
    """Experts with a second copy."""
    device: str
    ranks: int = 4
    layers: int = 24
    distinct: int = 4
    """Layers with weights and routing of their own; together they are far larger than any cache."""
    rounds: int = 40
    hidden: int = 2048
    inner: int = 768
    experts: int = 128
    top_k: int = 8

    @property
    def slots(self) -> int:
        return -(-(self.experts + self.redundant) // self.ranks)

    @property
    def max_tokens(self) -> int:
        return max(SMALLEST_RECEIVE, self.tokens)


class Plane:
    """Exchange, weights, tokens and routing. On a processor each rank keeps its tokens to itself."""

    def __init__(self, case: Case, rank: int, directory: Path) -> None:
        self.case, self.rank = case, rank
        self.device = torch.device(case.device)
        torch.manual_seed(rank)
        like: dict[str, Any] = {"device": self.device, "dtype": BF16}
        hidden, inner, slots = case.hidden, case.inner, case.slots
        self.x = torch.randn(case.tokens, hidden, **like)
        self.gate_up = [torch.randn(slots, hidden, 2 * inner, **like) / hidden**0.5 for _ in self.weights]
        self.down = [torch.randn(slots, inner, hidden, **like) / inner**0.5 for _ in self.weights]
        self.chosen, self.mixing = [], []
        placement = launch_placement(case.ranks, 1, case.experts, case.redundant)
        copies = torch.from_numpy(Copies(placement).choose(range(case.ranks), rank)[0]).to(self.device)
        for _ in self.weights:
            scores = torch.rand(case.tokens, case.experts, device=self.device).softmax(dim=-1)
            weights, logical = scores.topk(case.top_k)
            physical = copies[logical] if self.device.type == "cuda" else copies[logical] % slots
            self.chosen.append(physical.contiguous())
            self.mixing.append((weights / weights.sum(dim=-1, keepdim=True)).contiguous())
        self.expected = max(1, round(case.ranks * case.tokens * case.top_k / (case.ranks * slots)))
        self.exchange = self._exchange(directory)

    @property
    def weights(self) -> range:
        return range(self.case.distinct)

    def _exchange(self, directory: Path) -> DeviceExchange:
        case = self.case
        if self.device.type != "cuda":
            return SoloDeviceExchange(case.slots, self.device)
        shape = ExchangeShape(
            case.ranks,
            case.max_tokens,
            case.hidden,
            case.top_k,
            case.slots,
            operations_per_step=2 * case.layers,
        )
        store = FileStore(directory)
        return MooncakeExchange(
            shape, Member(self.rank, 0), store, timeout_ms=_TIMEOUT_MS, connect_timeout_ms=USUAL.store_get_ms
        )

    def connect(self) -> None:
        if self.device.type != "cuda":
            return
        others = [Member(rank, 0) for rank in range(self.case.ranks) if rank != self.rank]
        for member in others:
            self.exchange.connect(member)
        for member in others:
            self.exchange.activate(member)

    def raw_dispatch(self, layer: int) -> Received:
        """Mooncake's own call, nothing of this project's around it."""
        exchange, case = self.exchange, self.case
        if not isinstance(exchange, MooncakeExchange):
            return exchange.dispatch(self.x, self.chosen[layer])
        packed, counts, self._handle, _, _ = exchange._buffer.dispatch(
            self.x, self.chosen[layer], case.max_tokens, case.ranks * case.slots, use_fp8=False
        )
        return Received(packed, counts)

    def raw_combine(self, y: torch.Tensor, layer: int) -> torch.Tensor:
        exchange = self.exchange
        if not isinstance(exchange, MooncakeExchange):
            return exchange.combine(y, self.mixing[layer])
        combined: torch.Tensor
        combined, _, _ = exchange._buffer.combine(y, self.chosen[layer], self.mixing[layer], self._handle)
        return combined
