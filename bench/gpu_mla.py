"""Attention over latents on one GPU: what share of the machine's copy bandwidth, and of its products, each size reaches.

Sizes are those of DeepSeek-V3, Kimi-K2 and DeepSeek-V2-Lite: 128, 64 and 16 heads over latents of 512 + 64 numbers in
bfloat16. "copy_share" counts the latents once. With 128 heads a token's products take about as long as reading its
latents, so beside it stands what they reach of a large product, "bf16_share". Each cut and plan is compared with plain
torch in float64 before it is timed. Limits and times are measured as in kernels.py.
`--tune` tries more plans, of decodes alone, within a minute.

    python -m bench.gpu_mla --out bench/results/gpu_mla.json
    TRITON_INTERPRET=1 python -m bench.gpu_mla --smoke --out /tmp/gpu_mla.json    # tries the script itself
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from tests.kit import plain_kernels

from bench.kit.command_line import command_line
from bench.kit.kernel_timing import BF16, PAGE, Call, measure_limits, times, write
from elastic_ep.engine.ops_cuda.kernels.by_head import by_head
from elastic_ep.engine.ops_cuda.kernels.latent_attention import (
    LATENT_CUT,
    LatentPlan,
    latent_decode,
    latent_prefill,
    plan_of,
)
from elastic_ep.engine.ops_cuda.kernels.paged_attention import Cut

RANK, ROPE, NOPE = 512, 64, 128
SAID = {"rank": RANK, "scale": (NOPE + ROPE) ** -0.5}
MOST_ERROR = 4e-3
"""Of the norm: what tests/engine/kernels/errors.py allows bfloat16."""
Choice = tuple[Cut, LatentPlan | None]
USUAL: Choice = LATENT_CUT, None
OTHERS: tuple[Choice, ...] = ((Cut(512, 64), None), (Cut(2048, 64), None))
TUNED: tuple[Choice, ...] = (
    *((Cut(1024, 64), LatentPlan(rows, warps, 2)) for rows in (16, 32, 64) for warps in (4, 8)),
    *((Cut(1024, 64), LatentPlan(rows, 8, stages)) for rows in (16, 64) for stages in (1, 3)),
    *((Cut(split, 64), LatentPlan(rows, 8, 2)) for split in (512, 2048) for rows in (16, 32)),
    *((Cut(1024, 32), LatentPlan(rows, 8, stages)) for rows in (16, 64) for stages in (2, 4)),
    (Cut(1024, 128), LatentPlan(16, 8, 1)),
)


class Latents:
    """`sequences` of `context` tokens each, pages strewn, and queries of the last `new` tokens of each."""

    def __init__(self, heads: int, sequences: int, context: int, new: int = 1) -> None:
        pages = sequences * context // PAGE
        self.cache = torch.randn(pages, PAGE, RANK + ROPE, dtype=BF16)
        self.tables = torch.randperm(pages, dtype=torch.int32).view(sequences, -1)
        self.lengths = torch.full((sequences,), context, dtype=torch.int32)
        self.bounds = torch.arange(sequences + 1, dtype=torch.int32) * new
        self.q = torch.randn(sequences * new, heads, RANK + ROPE, dtype=BF16)
        self.new = new
        pairs = sum(range(context - new + 1, context + 1)) * sequences
        self.flops = 2.0 * heads * pairs * (RANK + ROPE + RANK)

    def run(self, choice: Choice) -> torch.Tensor:
        cut, plan = choice
        if self.new == 1:
            return latent_decode(self.q, self.cache, self.tables, self.lengths, cut=cut, plan=plan, **SAID)
        places = self.tables, self.bounds, self.lengths
        return latent_prefill(self.q, self.cache, *places, cut=cut, plan=plan, **SAID)

    def error(self, choice: Choice) -> float:
        """Of the last token of the first sequence."""
        last = slice(self.new - 1, self.new)
        bounds = torch.tensor([0, 1])
        places = self.tables[:1], bounds, self.lengths[:1]
        exact = plain_kernels.latent_attention(self.q[last].double(), self.cache.double(), *places, **SAID)
        return float((self.run(choice)[last].double() - exact).norm() / exact.norm())


class Bench:
    def __init__(self, limits: dict[str, float], rounds: int, smoke: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self._limits = limits
        self._rounds = rounds
        self._smoke = smoke

    def _time(self, call: Call) -> float:
        """Microseconds."""
        if not self._smoke:
            return times({"it": call}, self._rounds)["it"]
        begun = time.perf_counter()
        call()
        return (time.perf_counter() - begun) * 1e6

    def _add(self, name: str, call: Call, moved: float, flops: float, **more: Any) -> None:
        us = self._time(call)
        row = {"name": name, "us": round(us, 2), **more}
        row["copy_share"] = round(moved / us / 1e6 / self._limits["copy_tb_s"], 3)
        row["bf16_share"] = round(flops / us / 1e6 / self._limits["bf16_tflops"], 3)
        self.rows.append(row)
        print(row, flush=True)

    def attention(
        self, heads: int, sequences: int, context: int, new: int = 1, others: tuple[Choice, ...] = ()
    ) -> None:
        latents = Latents(heads, sequences, context, new)
        kind = "decode" if new == 1 else f"prompt of {new}"
        for choice in (USUAL, *others):
            cut, given = choice
            plan = given or plan_of(heads if new == 1 else 64, BF16)
            said = f"split={cut.split} block={cut.block} rows={plan.rows} warps={plan.warps} stages={plan.stages}"
            try:
                error = latents.error(choice)
            except Exception as refused:  # more shared memory than there is
                print(f"{said}: {str(refused).splitlines()[0]}", flush=True)
                continue
            assert error < MOST_ERROR * (1 + self._smoke), (said, error)
            name = f"{kind}, {heads} heads, {sequences} x {context}, {said}"
            self._add(
                name,
                partial(latents.run, choice),
                latents.cache.nbytes,
                latents.flops,
                error=error,
            )

    def by_head(self, heads: int, rows: int) -> None:
        """Queries to what the latents see, and results back."""
        kv_b = torch.randn(heads, 2 * NOPE, RANK, dtype=BF16) / RANK**0.5
        queries = torch.randn(rows, heads, NOPE + ROPE, dtype=BF16)
        out = torch.randn(rows, heads, RANK, dtype=BF16)
        seen = torch.empty(rows, heads, RANK + ROPE, dtype=BF16)
        to_keys, to_values = kv_b[:, :NOPE], kv_b[:, NOPE:].transpose(1, 2)
        flops = 2.0 * rows * heads * NOPE * RANK
        moved = to_keys.numel() * 2.0
        name = f"by head, {heads} heads, {rows} rows"
        self._add(
            f"{name}, to keys", lambda: by_head(queries[..., :NOPE], to_keys, seen[..., :RANK]), moved, flops
        )
        self._add(f"{name}, to values", lambda: by_head(out, to_values), moved, flops)


def main() -> None:
    options = _options()
    torch.manual_seed(0)
    if options.smoke:
        bench = Bench({"copy_tb_s": 1.0, "bf16_tflops": 1.0}, 1, smoke=True)
        bench.attention(3, 2, 64)
        bench.attention(3, 1, 64, new=3)
        bench.by_head(2, 3)
        gpu = "none"
    else:
        torch.set_default_device("cuda")
        bench = Bench(measure_limits(options.rounds), options.rounds, smoke=False)
        for heads in (128, 64, 16):
            bench.attention(heads, 32, 4096, others=TUNED if options.tune else OTHERS)
        if options.tune:
            bench.attention(128, 1, 4096, 4096, others=OTHERS)
        else:
            _others(bench)
        gpu = torch.cuda.get_device_name()
    result = {"gpu": gpu, "torch": torch.__version__, "limits": bench._limits, "rows": bench.rows}
    write(options.out, result)


def _others(bench: Bench) -> None:
    for sequences, context in ((1, 4096), (8, 4096), (128, 4096), (4, 32768)):
        bench.attention(128, sequences, context)
    for heads, context, new in ((128, 4096, 4096), (128, 32768, 2048), (16, 4096, 4096)):
        bench.attention(heads, 1, context, new, others=OTHERS if context == new else ())
    for rows in (32, 2048):
        bench.by_head(128, rows)


def _options() -> argparse.Namespace:
    parser = command_line(__doc__, "gpu_mla")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
