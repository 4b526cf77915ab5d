"""A rank of `bench.gpu_moe_layer`: every side is one graph of many layers, replayed in lockstep with its peers."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.solo_exchange import SoloDeviceExchange
from elastic_ep.exchange.base import DeviceExchange, ExchangeShape, Received
from elastic_ep.exchange.file_store import FileStore
from elastic_ep.exchange.mooncake import MooncakeExchange
from elastic_ep.exchange.step_words import StepWords
from elastic_ep.messages import Member
from elastic_ep.model.kernels.expert_ffn import expert_ffn
from elastic_ep.model.moe import choose_copies
from elastic_ep.placement import launch_placement

BF16 = torch.bfloat16
SMALLEST_RECEIVE = 16
"""`max_tokens` at least: tokens that a rank may send in a step."""
_MEET_S = 60.0
_TIMEOUT_MS = 60_000
_LAUNCH_CYCLES = 400_000
Layer = Callable[[int], Any]
"""One layer, by the number of its weights."""


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


class Meeting:
    """All ranks at once, to within microseconds. Raises TimeoutError if one does not come."""

    def __init__(self, directory: Path, ranks: int, rank: int) -> None:
        self._words = StepWords(directory, ranks, rank)
        self._ranks = range(ranks)
        self._number = 0

    def __call__(self) -> None:
        self._number += 1
        self._words.say(self._number)
        limit = time.monotonic() + _MEET_S
        while any(self._words.of(rank) < self._number for rank in self._ranks):
            os.sched_yield()
            if time.monotonic() > limit:
                raise TimeoutError(f"a peer did not come to meeting {self._number}")


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
        copies = torch.tensor(choose_copies(placement, 0, range(case.ranks), rank), device=self.device)
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
        return MooncakeExchange(shape, Member(self.rank, 0), store, timeout_ms=_TIMEOUT_MS)

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


class Sides:
    """What is compared. Whatever torch needs to know of the counts on the host, it is told for nothing."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.received: list[Received] = []
        self.compact: list[torch.Tensor] = []
        self.index: list[torch.Tensor] = []
        self.ends: list[torch.Tensor] = []
        for layer in plane.weights:
            got = plane.raw_dispatch(layer)
            plane.raw_combine(got.packed, layer)
            packed, counts = got.packed.clone(), got.counts.to(torch.int32)
            rows = torch.arange(packed.shape[1], device=plane.device).expand(len(counts), -1)
            flat = packed.reshape(-1, packed.shape[2])
            index = (rows < counts[:, None]).flatten().nonzero().squeeze(1)
            self.received.append(Received(packed, counts))
            self.index.append(index)
            self.compact.append(flat[index])
            self.ends.append(counts.cumsum(0).to(torch.int32))
        capacity = self.received[0].packed.shape[1]
        self.full = torch.arange(1, plane.case.slots + 1, device=plane.device, dtype=torch.int32) * capacity
        # torch's grouped product prefers one or the other order in memory: it may choose.
        self.turned = [
            tuple(w[layer].transpose(1, 2).contiguous().transpose(1, 2) for w in (plane.gate_up, plane.down))
            for layer in plane.weights
        ]

    def all(self) -> dict[str, Layer]:
        return {
            "ours": self._ours,
            "raw_exchange": self._raw,
            "grouped": lambda layer: self._grouped(self.compact[layer], self.ends[layer], layer, False),
            "grouped_turned": lambda layer: self._grouped(self.compact[layer], self.ends[layer], layer, True),
            "ours_experts": lambda layer: self._experts(self.received[layer], layer),
            "raw_with_grouped": lambda layer: self._with_grouped(layer, False),
            "raw_with_grouped_turned": lambda layer: self._with_grouped(layer, True),
            "raw_with_grouped_padded": self._padded,
        }

    def _ours(self, layer: int) -> torch.Tensor:
        plane = self.plane
        received = plane.exchange.dispatch(plane.x, plane.chosen[layer])
        return plane.exchange.combine(self._experts(received, layer), plane.mixing[layer])

    def _experts(self, received: Received, layer: int) -> torch.Tensor:
        plane = self.plane
        return expert_ffn(
            received.packed,
            received.counts,
            plane.gate_up[layer],
            plane.down[layer],
            expected_rows=plane.expected,
        )

    def _raw(self, layer: int) -> torch.Tensor:
        return self.plane.raw_combine(self.plane.raw_dispatch(layer).packed, layer)

    def _grouped(self, x: torch.Tensor, ends: torch.Tensor, layer: int, turned: bool) -> torch.Tensor:
        plane = self.plane
        gate_up, down = self.turned[layer] if turned else (plane.gate_up[layer], plane.down[layer])
        gated, up = torch._grouped_mm(x, gate_up, offs=ends).chunk(2, dim=-1)
        return torch._grouped_mm(functional.silu(gated) * up, down, offs=ends)

    def _with_grouped(self, layer: int, turned: bool) -> torch.Tensor:
        """The rows gathered from the padded layout, and scattered back into it."""
        packed, index = self.plane.raw_dispatch(layer).packed, self.index[layer]
        flat = packed.view(-1, packed.shape[2])
        y = self._grouped(flat.index_select(0, index), self.ends[layer], layer, turned)
        return self.plane.raw_combine(torch.empty_like(flat).index_copy_(0, index, y).view_as(packed), layer)

    def _padded(self, layer: int) -> torch.Tensor:
        """Unused rows computed along."""
        packed = self.plane.raw_dispatch(layer).packed
        y = self._grouped(packed.view(-1, packed.shape[2]), self.full, layer, False)
        return self.plane.raw_combine(y.view_as(packed), layer)


class Replay:
    """`layers` layers of a side: a graph on a GPU, a loop on a processor. Microseconds of one layer when called."""

    def __init__(self, plane: Plane, body: Layer) -> None:
        self._case = plane.case
        self._body = body
        self._graph: torch.cuda.CUDAGraph | None = None
        for layer in plane.weights:
            body(layer)
        if plane.device.type != "cuda":
            return
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            self._graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            self._all()

    def _all(self) -> None:
        for layer in range(self._case.layers):
            self._body(layer % self._case.distinct)

    def __call__(self) -> float:
        if self._graph is None:
            began = time.perf_counter()
            self._all()
            return (time.perf_counter() - began) * 1e6 / self._case.layers
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # What a launch costs the host is in no side's time.
        torch.cuda._sleep(_LAUNCH_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000 / self._case.layers


@torch.inference_mode()
def measure(case: Case, rank: int, directory: Path) -> dict[str, Any]:
    """Every rank does the same here, operation for operation: the exchange counts them."""
    meet = Meeting(directory, case.ranks, rank)
    if case.device == "cuda":
        torch.cuda.set_device(0)
        torch.cuda.set_stream(torch.cuda.Stream(0))  # type: ignore[no-untyped-call]
    plane = Plane(case, rank, directory)
    blank = torch.zeros(case.slots, dtype=torch.int32, device=plane.device)
    capacity = case.ranks * case.max_tokens
    packed = torch.zeros(case.slots, capacity, case.hidden, dtype=BF16, device=plane.device)
    # Compiled before anybody waits for anybody.
    expert_ffn(packed, blank, plane.gate_up[0], plane.down[0], expected_rows=plane.expected)
    del packed
    meet()
    plane.connect()
    meet()
    sides = Sides(plane)
    bodies = sides.all()
    error = _difference(bodies["ours"](0), bodies["raw_with_grouped"](0))
    replays: dict[str, Replay] = {}
    for name, body in bodies.items():
        meet()
        replays[name] = Replay(plane, body)
    times: dict[str, list[float]] = {name: [] for name in replays}
    for round_ in range(case.rounds + 2):
        for name, replay in replays.items():
            meet()
            taken = replay()
            if round_ >= 2:
                times[name].append(taken)
    meet()
    plane.exchange.begin_step(0)
    lost = plane.exchange.end_step()
    if lost:
        raise RuntimeError(f"ranks {sorted(lost)} were masked meanwhile")
    counts = [int(received.counts.sum()) for received in sides.received]
    hit = [int((received.counts > 0).sum()) for received in sides.received]
    meet()
    return {"times": times, "rows": counts, "hit": hit, "difference": error}


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def run_rank(case: Case, rank: int, directory: Path) -> None:
    """Leaves `rank.json` or `rank.error` behind. In a process of its own, which it ends."""
    try:
        result = measure(case, rank, directory)
        (directory / f"{rank}.json").write_text(json.dumps(result))
        status = 0
    except BaseException as error:
        traceback.print_exc()
        (directory / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        status = 1
    os._exit(status)  # what a peer may still read stays until all have met
