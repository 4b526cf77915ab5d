"""One captured graph serves every step: what changes is device memory at the addresses it knows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from elastic_ep.engine.ops_cuda.kernels.decode_attention import decode_attention
from elastic_ep.engine.ops_cuda.kernels.expert_ffn import expert_ffn
from elastic_ep.engine.ops_cuda.kernels.gate import gate
from elastic_ep.engine.ops_cuda.kernels.norm_rope import norm_rope_write
from elastic_ep.engine.ops_cuda.kernels.prefill_attention import prefill_attention
from tests.engine.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no graphs")

Tensors = tuple[torch.Tensor, ...]


def replays_like_direct(call: Callable[[], Tensors], change: Callable[[], None]) -> None:
    """Captures `call`, lets `change` write to its inputs, and compares the replay with a direct call."""
    call()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for _ in range(2):
        change()
        graph.replay()
        for got, expected in zip(outputs, call(), strict=True):
            assert torch.equal(got, expected)


def test_gate(device: torch.device) -> None:
    logits, physical_of = torch.randn(8, 64, device=device), torch.arange(64, device=device)
    real = torch.tensor([8], device=device)

    def change() -> None:
        logits.normal_()
        physical_of.copy_(torch.randperm(64, device=device))
        real.sub_(3)

    replays_like_direct(lambda: gate(logits, physical_of, 4, renormalise=True, num_tokens=real), change)


def test_expert_ffn(device: torch.device) -> None:
    packed = torch.randn(4, 64, 128, device=device).bfloat16()
    gate_up, down = (torch.randn(4, *s, device=device).bfloat16() for s in ((128, 192), (96, 128)))
    counts = torch.tensor([1, 0, 3, 16], dtype=torch.int32, device=device)
    rows = torch.arange(64, device=device)

    def call() -> Tensors:
        y = expert_ffn(packed, counts, gate_up, down, expected_rows=1)
        return (y.masked_fill((rows >= counts[:, None])[..., None], 0),)

    def change() -> None:
        counts.copy_(torch.randint(0, 65, (4,), device=device))

    replays_like_direct(call, change)


def test_attention(device: torch.device) -> None:
    keys, values = (torch.randn(40, 2, 16, 64, device=device).bfloat16() for _ in range(2))
    q = torch.randn(3, 8, 64, device=device).bfloat16()
    tables = torch.arange(36, dtype=torch.int32, device=device).view(3, 12)
    lengths = torch.tensor([1, 100, 50], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 1, 2, 3], dtype=torch.int32, device=device)
    qkv, norm = (
        torch.randn(3, 12 * 64, device=device).bfloat16(),
        torch.ones(10, 64, device=device).bfloat16(),
    )
    cos, sin = (torch.rand(200, 32, device=device) for _ in range(2))
    slots = torch.tensor([5, -1, 500], device=device)

    def call() -> Tensors:
        rotated = norm_rope_write(qkv, norm, cos, sin, lengths, slots, keys, values, 1e-6)
        decoded = decode_attention(q, keys, values, tables, lengths)
        return rotated, decoded, prefill_attention(q, keys, values, tables, bounds, lengths)

    def change() -> None:
        lengths.copy_(torch.randint(1, 190, (3,), device=device))
        tables.copy_(torch.randperm(36, device=device).view(3, 12))
        slots.add_(1)

    replays_like_direct(call, change)
