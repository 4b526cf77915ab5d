"""The GPU kernels beside torch, in one run: what share of the machine's own measured limits each reaches.

The limits are measured first: a copy of 2 GiB (bytes read and written) and a bfloat16 product of 8192 x 8192 matrices.
Every time is that of one call inside a CUDA graph of many, hence without launch overhead on either side; the medians
are of `--rounds` replays, the sides taking turns. transformers' own experts are among them where all experts are on one
rank. "bytes" counts what must be read once from memory: weights of the experts that have rows, or keys and values.
tune_kernels.py tries other tiles.

    python -m bench.kernels --out bench/results/kernels.json
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tests.kit import plain_kernels
from torch.nn import functional

from bench.kit.command_line import command_line
from bench.kit.kernel_timing import (
    BF16,
    DIM,
    EXPERTS,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    PAGE,
    TOP_K,
    Cache,
    Call,
    measure_limits,
    times,
    write,
)
from elastic_ep.engine.ops_cuda.kernels.decode_attention import decode_attention
from elastic_ep.engine.ops_cuda.kernels.expert_ffn import expert_ffn
from elastic_ep.engine.ops_cuda.kernels.expert_plan import Plan
from elastic_ep.engine.ops_cuda.kernels.gate import gate
from elastic_ep.engine.ops_cuda.kernels.norm_rope import add_rms_norm, norm_rope_write
from elastic_ep.engine.ops_cuda.kernels.prefill_attention import prefill_attention

Row = dict[str, Any]

EPS = 1e-6


def main() -> None:
    options = _options()
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    _check()
    limits = measure_limits(options.rounds)
    bench = _Bench(limits, options.rounds)
    for slots, tokens in (
        (32, 16),
        (32, 64),
        (32, 128),
        (128, 1),
        (128, 16),
        (128, 64),
        (32, 4096),
        (128, 4096),
    ):
        bench.expert_ffn(slots, tokens)
    for width in (4096, 16384):
        bench.decode(32, 4096, width)
    bench.prefill(4096)
    for tokens in (64, 4096):
        bench.gate(tokens)
        bench.norm(tokens)
        bench.norm_rope(tokens)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "limits": limits,
        "rows": bench.rows,
    }
    write(options.out, result)


def _options() -> argparse.Namespace:
    parser = command_line(__doc__, "kernels")
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args()


class _Layer:
    """The experts of `slots` slots and what `tokens` routed tokens leave for them."""

    def __init__(self, slots: int, tokens: int) -> None:
        self.gate_up = torch.randn(slots, HIDDEN, 2 * INNER, dtype=BF16) / HIDDEN**0.5
        self.down = torch.randn(slots, INNER, HIDDEN, dtype=BF16) / INNER**0.5
        chosen = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
        self.chosen = chosen
        self.counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)[:slots].to(torch.int32)
        self.rows = self.counts.tolist()
        capacity = max(16, -(-max(self.rows) // 16) * 16)
        self.packed = torch.randn(slots, capacity, HIDDEN, dtype=BF16)
        self.expected = max(1, tokens * TOP_K // EXPERTS)
        self.flops = sum(self.rows) * 6 * HIDDEN * INNER
        self.bytes = sum(row > 0 for row in self.rows) * 6 * HIDDEN * INNER

    def ours(self, plan: Plan | None = None) -> Call:
        return lambda: expert_ffn(
            self.packed, self.counts, self.gate_up, self.down, expected_rows=self.expected, plan=plan
        )

    def grouped(self, transposed: bool) -> Call:
        """torch's grouped product on rows packed without gaps, with weights in either order of memory."""
        x = torch.cat([rows[:n] for rows, n in zip(self.packed, self.rows, strict=True)])
        ends = self.counts.cumsum(0).to(torch.int32)
        gate_up, down = (
            w.transpose(1, 2).contiguous().transpose(1, 2) if transposed else w
            for w in (self.gate_up, self.down)
        )

        def call() -> torch.Tensor:
            gated, up = torch._grouped_mm(x, gate_up, offs=ends).chunk(2, dim=-1)
            return torch._grouped_mm(functional.silu(gated) * up, down, offs=ends)

        return call

    def transformers(self, implementation: str) -> Call:
        """transformers' experts, which also sort the tokens and mix the results; all experts must be here."""
        from transformers.models.qwen3_moe import modeling_qwen3_moe

        theirs: Any = modeling_qwen3_moe
        config = theirs.Qwen3MoeConfig(
            hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=TOP_K
        )
        config._experts_implementation = implementation
        experts = theirs.Qwen3MoeExperts(config).to(BF16)
        with torch.no_grad():
            experts.gate_up_proj.copy_(self.gate_up.transpose(1, 2))
            experts.down_proj.copy_(self.down.transpose(1, 2))
        x = torch.randn(len(self.chosen), HIDDEN, dtype=BF16)
        mixing = torch.rand(len(self.chosen), TOP_K, dtype=BF16).softmax(dim=-1)
        return lambda: experts(x, self.chosen, mixing)

    def loop(self) -> torch.Tensor:
        """One expert after the other, the counts known to the host."""
        y = torch.empty_like(self.packed)
        for slot, n in enumerate(self.rows):
            if n:
                gated, up = (self.packed[slot, :n] @ self.gate_up[slot]).chunk(2, dim=-1)
                y[slot, :n] = (functional.silu(gated) * up) @ self.down[slot]
        return y


class _Bench:
    def __init__(self, limits: dict[str, float], rounds: int) -> None:
        self.rows: list[Row] = []
        self._limits = limits
        self._rounds = rounds

    def _measure(self, name: str, sides: dict[str, Call], moved: float = 0, flops: float = 0) -> None:
        """Adds a row: microseconds of every side, and the share of the limits that the first reaches."""
        taken = times(sides, self._rounds)
        ours = next(iter(taken.values()))
        row: Row = {"name": name, **{f"{side}_us": round(time, 2) for side, time in taken.items()}}
        if moved:
            row["copy_share"] = round(moved / ours / 1e6 / self._limits["copy_tb_s"], 3)
        if flops:
            row["bf16_share"] = round(flops / ours / 1e6 / self._limits["bf16_tflops"], 3)
        self.rows.append(row)
        print(row, flush=True)

    def expert_ffn(self, slots: int, tokens: int) -> None:
        layer = _Layer(slots, tokens)
        sides: dict[str, Call] = {
            "ours": layer.ours(),
            "grouped_mm": layer.grouped(transposed=False),
            "grouped_mm_transposed": layer.grouped(transposed=True),
            "loop": layer.loop,
        }
        if slots == EXPERTS:
            sides["transformers_grouped_mm"] = layer.transformers("grouped_mm")
        if slots == EXPERTS and tokens == 1:  # it copies the weights of every pair of token and expert
            sides["transformers_batched_mm"] = layer.transformers("batched_mm")
        self._measure(f"expert_ffn slots={slots} tokens={tokens}", sides, layer.bytes, layer.flops)

    def decode(self, sequences: int, context: int, width: int) -> None:
        cache = Cache(sequences, context, width)
        q = torch.randn(sequences, HEADS, DIM, dtype=BF16)
        k, v = (torch.randn(sequences, KV_HEADS, context, DIM, dtype=BF16) for _ in range(2))

        sides: dict[str, Call] = {
            "ours": lambda: decode_attention(q, cache.keys, cache.values, cache.tables, cache.lengths)
        }
        sides["sdpa_contiguous"] = lambda: functional.scaled_dot_product_attention(
            q.unsqueeze(2), k, v, enable_gqa=True
        )
        moved = 2 * cache.keys.nbytes
        self._measure(f"decode batch={sequences} context={context} table={width}", sides, moved)

    def prefill(self, tokens: int) -> None:
        cache = Cache(1, tokens, tokens)
        q = torch.randn(tokens, HEADS, DIM, dtype=BF16)
        bounds = torch.tensor([0, tokens], dtype=torch.int32)
        k, v = (torch.randn(1, KV_HEADS, tokens, DIM, dtype=BF16) for _ in range(2))
        sides: dict[str, Call] = {
            "ours": lambda: prefill_attention(
                q, cache.keys, cache.values, cache.tables, bounds, cache.lengths
            ),
            "sdpa_contiguous": lambda: functional.scaled_dot_product_attention(
                q.transpose(0, 1).unsqueeze(0), k, v, is_causal=True, enable_gqa=True
            ),
        }
        self._measure(f"prefill tokens={tokens}", sides, flops=2 * tokens**2 * HEADS * DIM)

    def gate(self, tokens: int) -> None:
        logits, physical_of = torch.randn(tokens, EXPERTS, dtype=BF16), torch.randperm(EXPERTS)

        def torchs() -> tuple[torch.Tensor, torch.Tensor]:
            weights, logical = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(TOP_K)
            return physical_of[logical], weights / weights.sum(dim=-1, keepdim=True)

        sides: dict[str, Call] = {
            "ours": lambda: gate(logits, physical_of, TOP_K, renormalise=True),
            "torch": torchs,
        }
        self._measure(f"gate tokens={tokens}", sides)

    def norm(self, tokens: int) -> None:
        x, residual = (torch.randn(tokens, HIDDEN, dtype=BF16) for _ in range(2))
        weight = torch.rand(HIDDEN, dtype=BF16)
        sides: dict[str, Call] = {
            "ours": lambda: add_rms_norm(x, residual, weight, EPS),
            "torch": lambda: functional.rms_norm(x + residual, (HIDDEN,), weight, EPS),
        }
        self._measure(f"add_rms_norm tokens={tokens}", sides)

    def norm_rope(self, tokens: int) -> None:
        cache = Cache(1, 8192, 8192)
        qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * DIM, dtype=BF16)
        norm = torch.rand(HEADS + KV_HEADS, DIM, dtype=BF16)
        angles = torch.rand(8192, DIM // 2)
        cos, sin = angles.cos(), angles.sin()
        positions, slots = torch.arange(tokens), torch.randperm(8192)[:tokens]

        def torchs() -> None:
            rows = qkv.view(tokens, -1, DIM)
            qk = functional.rms_norm(rows[:, : HEADS + KV_HEADS], (DIM,), None, EPS) * norm
            low, high = qk.chunk(2, dim=-1)
            c, s = cos[positions].unsqueeze(1).to(BF16), sin[positions].unsqueeze(1).to(BF16)
            qk = torch.cat((low * c - high * s, high * c + low * s), dim=-1)
            page, place = slots // PAGE, slots % PAGE
            cache.keys[page, :, place] = qk[:, HEADS:]
            cache.values[page, :, place] = rows[:, HEADS + KV_HEADS :]

        sides: dict[str, Call] = {
            "ours": lambda: norm_rope_write(
                qkv, norm, cos, sin, positions, slots, cache.keys, cache.values, EPS
            ),
            "torch": torchs,
        }
        self._measure(f"norm_rope_write tokens={tokens}", sides)


def _check() -> None:
    """The kernels compute here what they should: a time of a wrong result is worth nothing."""
    layer = _Layer(4, 64)
    y = expert_ffn(layer.packed, layer.counts, layer.gate_up, layer.down)
    exact = plain_kernels.expert_ffn(
        layer.packed.double(), layer.counts, layer.gate_up.double(), layer.down.double()
    )
    mask = torch.arange(y.shape[1]) < layer.counts[:, None]
    error = float((y[mask].double() - exact[mask]).norm() / exact[mask].norm())
    assert error < 5e-3, error


if __name__ == "__main__":
    main()
