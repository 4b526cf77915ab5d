"""What tune_kernels.py measures its candidates on: inputs, the exact answer, and what must be moved or multiplied."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tests.kit import plain_kernels

from bench.kit.kernel_timing import BF16, DIM, EXPERTS, HEADS, HIDDEN, INNER, KV_HEADS, TOP_K, Cache
from bench.kit.tune_candidates import DECODE_WIDTH, Config, Decode
from elastic_ep.engine.ops_cuda.kernels.decode_attention import decode_attention
from elastic_ep.engine.ops_cuda.kernels.expert_ffn import expert_ffn
from elastic_ep.engine.ops_cuda.kernels.expert_plan import Plan
from elastic_ep.engine.ops_cuda.kernels.paged_attention import Cut

L2_BYTES = 60e6
MOST_ERROR = 4e-3
"""Of the norm: what tests/engine/kernels/errors.py allows bfloat16."""


class Case(Protocol):
    name: str
    group: str
    """Of cases that want one answer: decode, few or many."""
    slots: int
    moved: float
    """Bytes."""
    flops: float

    def run(self, config: Config) -> torch.Tensor: ...

    def errors(self, config: Config) -> tuple[float, bool]:
        """Of the result, beside the exact one; and whether its bits are those of the first that had to agree."""
        ...


class DecodeCase:
    """`sequences` at a time; where they are few, each call takes others, so that none finds its keys in the cache."""

    group = "decode"
    slots = 0
    flops = 0.0

    def __init__(self, sequences: int, context: int) -> None:
        self.name = f"decode {sequences} x {context}"
        self.moved = 4.0 * sequences * context * KV_HEADS * DIM
        self._size = sequences
        batches = min(16, -(-int(2 * L2_BYTES) // int(self.moved)))
        self._cache = Cache(sequences * batches, context, max(context, DECODE_WIDTH))
        self._q = torch.randn(sequences * batches, HEADS, DIM, dtype=BF16)
        self._turn = itertools.cycle(range(0, sequences * batches, sequences))
        self._exact: torch.Tensor | None = None
        self._bits: dict[Cut, torch.Tensor] = {}

    def run(self, config: Config) -> torch.Tensor:
        return self._attend(config, next(self._turn))

    def _attend(self, config: Config, first: int) -> torch.Tensor:
        assert isinstance(config, Decode)
        cache, rows = self._cache, slice(first, first + self._size)
        return decode_attention(
            self._q[rows],
            cache.keys,
            cache.values,
            cache.tables[rows],
            cache.lengths[
                : self._size
            ],  # all are equal, and a pointer as aligned as the first needs no other kernel
            cut=config.cut,
            plan=config.plan,
        )

    def errors(self, config: Config) -> tuple[float, bool]:
        assert isinstance(config, Decode)
        got = self._attend(config, 0)
        error = _relative(got, self._answer())
        return error, torch.equal(got, self._bits.setdefault(config.cut, got))

    def _answer(self) -> torch.Tensor:
        if self._exact is None:
            cache, size = self._cache, self._size
            bounds = torch.arange(size + 1, dtype=torch.int32)
            q, keys, values = (x.double() for x in (self._q[:size], cache.keys, cache.values))
            self._exact = plain_kernels.paged_attention(
                q, keys, values, cache.tables[:size], bounds, cache.lengths[:size]
            )
        return self._exact


@dataclass(frozen=True, slots=True)
class Weights:
    """[S, H, 2 I] and [S, I, H]."""

    gate_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def random(cls, slots: int) -> Weights:
        shapes = (slots, HIDDEN, 2 * INNER), (slots, INNER, HIDDEN)
        return cls(*(torch.randn(shape, dtype=BF16).div_(shape[1] ** 0.5) for shape in shapes))


class ExpertCase:
    """`counts` [S] rows."""

    def __init__(self, name: str, group: str, weights: Weights, counts: torch.Tensor) -> None:
        self.name, self.group, self.slots = name, group, len(counts)
        self._weights, self._counts = weights, counts.to(torch.int32)
        capacity = max(16, -(-int(counts.max()) // 16) * 16)
        self._packed = torch.randn(len(counts), capacity, HIDDEN, dtype=BF16)
        self.flops = 6.0 * HIDDEN * INNER * int(counts.sum())
        self.moved = 6.0 * HIDDEN * INNER * int((counts > 0).sum())
        self._real = torch.arange(capacity) < counts[:, None]
        self._some = counts.argsort(descending=True)[: min(4, int((counts > 0).sum()))]
        self._exact: torch.Tensor | None = None
        self._bits: torch.Tensor | None = None

    def run(self, config: Config) -> torch.Tensor:
        assert isinstance(config, Plan)
        weights = self._weights
        return expert_ffn(self._packed, self._counts, weights.gate_up, weights.down, plan=config)

    def errors(self, config: Config) -> tuple[float, bool]:
        """The error of the fullest slots; the bits of all."""
        y = self.run(config)
        some = self._some
        error = _relative(y[some][self._real[some]], self._answer())
        bits = y[self._real]
        if self._bits is None:
            self._bits = bits
        return error, torch.equal(bits, self._bits)

    def _answer(self) -> torch.Tensor:
        if self._exact is None:
            some, weights = self._some, self._weights
            x, gate_up, down = (x[some].double() for x in (self._packed, weights.gate_up, weights.down))
            exact = plain_kernels.expert_ffn(x, self._counts[some], gate_up, down)
            self._exact = exact[self._real[some]]
        return self._exact


def _relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def expert_cases(slots: int, rows: tuple[int, ...], tokens: int) -> list[Case]:
    """`rows` in every slot, one token's in all, and what `tokens` routed ones leave, if any."""
    weights = Weights.random(slots)
    cases: list[Case] = [
        ExpertCase(f"experts {slots} slots x {n} rows", "few", weights, torch.full((slots,), n)) for n in rows
    ]
    one = torch.zeros(slots, dtype=torch.int64)
    one[torch.randperm(slots)[:TOP_K]] = 1
    cases.append(ExpertCase(f"experts {slots} slots, one token", "few", weights, one))
    if tokens:
        chosen = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)[:slots]
        cases.append(ExpertCase(f"experts {slots} slots, {tokens} tokens", "many", weights, counts))
    return cases


def compile_on_nothing(config: Config, slots: int) -> None:
    """A call without a row: it compiles what a call with rows needs, as long as both are given the same types."""
    empty: dict[str, Any] = {"dtype": BF16}
    if isinstance(config, Decode):
        cache = Cache(1, 16, DECODE_WIDTH)
        cache.lengths.zero_()
        q = torch.empty(1, HEADS, DIM, **empty)
        decode_attention(
            q, cache.keys, cache.values, cache.tables, cache.lengths, cut=config.cut, plan=config.plan
        )
        return
    weights = torch.empty(slots, HIDDEN, 2 * INNER, **empty), torch.empty(slots, INNER, HIDDEN, **empty)
    counts = torch.zeros(slots, dtype=torch.int32)
    expert_ffn(torch.empty(slots, 16, HIDDEN, **empty), counts, *weights, plan=config)
