"""How the GPU benchmarks time kernels: calls in CUDA graphs, the machine's own limits, a paged cache of keys.

Shapes are Qwen3-30B-A3B's.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.kit.shapes import QWEN3_30B

from elastic_ep.config import PAGE_SIZE

Call = Callable[[], Any]

HIDDEN, INNER = QWEN3_30B.hidden_size, QWEN3_30B.moe_intermediate_size
EXPERTS, TOP_K = QWEN3_30B.num_experts, QWEN3_30B.num_experts_per_tok
HEADS, KV_HEADS, DIM = QWEN3_30B.num_attention_heads, QWEN3_30B.num_key_value_heads, QWEN3_30B.head_dim
PAGE = PAGE_SIZE
BF16 = torch.bfloat16


class Cache:
    """`sequences` of `context` tokens each, pages strewn, in block tables that have room for `width` tokens."""

    def __init__(self, sequences: int, context: int, width: int) -> None:
        pages = context // PAGE
        shape = sequences * pages, KV_HEADS, PAGE, DIM
        self.keys, self.values = (torch.randn(shape, dtype=BF16) for _ in range(2))
        owned = torch.randperm(sequences * pages, dtype=torch.int32).view(sequences, pages)
        self.tables = torch.zeros(sequences, width // PAGE, dtype=torch.int32)
        self.tables[:, :pages] = owned
        self.lengths = torch.full((sequences,), context, dtype=torch.int32)


def times(sides: dict[str, Call], rounds: int, repeat: int = 10) -> dict[str, float]:
    """Microseconds of one call of each side, by name; NaN for one that torch cannot do."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, call in sides.items():
        try:
            graphs[name] = _captured(call, repeat)
        except (RuntimeError, AttributeError, TypeError) as error:
            print(f"  {name}: {str(error).splitlines()[0]}")
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end) * 1000 / repeat)
    return {name: statistics.median(taken[name]) if name in taken else float("nan") for name in sides}


def _captured(call: Call, repeat: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    graph.replay()
    return graph


def measure_limits(rounds: int) -> dict[str, float]:
    source = torch.zeros(2**29, dtype=BF16)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=BF16) for _ in range(2))

    def copy() -> torch.Tensor:
        """By a kernel: in a graph, `copy_` goes over a copy engine, at two thirds of the speed."""
        return torch.neg(source, out=target)

    taken = times({"copy": copy, "product": lambda: a @ b}, rounds)
    limits = {"copy_tb_s": 2**31 / taken["copy"] / 1e6, "bf16_tflops": 2 * 8192**3 / taken["product"] / 1e6}
    print(f"copy {limits['copy_tb_s']:.2f} TB/s, bf16 product {limits['bf16_tflops']:.0f} TFLOP/s")
    return limits


def write(path: Path, result: dict[str, Any]) -> None:
    try:  # a machine that is there for its GPU may lack git, and what the service needs
        from tests.kit.served import write_result

        write_result(path, result)
    except (ImportError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
