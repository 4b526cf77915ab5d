"""Attention over latents on one GPU: what share of the machine's copy bandwidth, and of its products, each size reaches.

Sizes are those of DeepSeek-V3, Kimi-K2 and DeepSeek-V2-Lite: 128, 64 and 16 heads over latents of 512 + 64 numbers in
bfloat16. "copy_share" counts the latents once. With 128 heads a token's products take about as long as reading its
latents, so beside it stands what they reach of a large product, "bf16_share". Each cut and plan is compared with plain
torch in float64 before it is timed. Limits and times are measured as in kernels.py.

Each is measured in a process of its own, since a plan can break the device for the process that launched it; they
compile side by side and take turns to measure, the usual cuts and plans first. Each row is printed and written as it
comes. `--tune` tries more plans of fewer sizes, within a minute.

    python -m bench.gpu_mla --out bench/results/gpu_mla.json
    TRITON_INTERPRET=1 python -m bench.gpu_mla --smoke --out /tmp/gpu_mla.json    # tries the script itself
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.kit import plain_kernels
from tests.kit.bound import run

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
Size = tuple[int, int, int, int]
"""Heads, sequences, context, new tokens of each sequence."""
USUAL: Choice = LATENT_CUT, None
OTHERS: tuple[Choice, ...] = ((Cut(512, 64), None), (Cut(2048, 64), None))
DECODES: tuple[Size, ...] = tuple((heads, 32, 4096, 1) for heads in (16, 64, 128))
PROMPTS: tuple[Size, ...] = ((128, 1, 4096, 4096), (16, 1, 4096, 4096))
MORE: tuple[Size, ...] = (
    *((128, sequences, context, 1) for sequences, context in ((1, 4096), (8, 4096), (128, 4096), (4, 32768))),
    *PROMPTS,
    (128, 1, 32768, 2048),
)
TUNED: tuple[tuple[Size, Choice], ...] = (
    *((size, (LATENT_CUT, LatentPlan(32, 8, 2))) for size in DECODES),
    *((size, (LATENT_CUT, LatentPlan(rows, 4, 2))) for size, rows in zip(DECODES, (16, 64, 64), strict=True)),
    *((DECODES[0], (cut, plan)) for cut, plan in OTHERS),
    (PROMPTS[0], USUAL),
)
"""HAZARD: plans of 16 rows and 1 stage break the device (docs/measured.md)."""
AT_ONCE = min(os.cpu_count() or 1, 16)
"""Processes."""
TUNED_WITHIN, WITHIN = 38.0, 400.0
"""Seconds until the last of them must have ended."""


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

    def measured(self, choice: Choice, rounds: int, lock: Path) -> tuple[float, float]:
        """Microseconds, with no other process at work, and the error; one run on the clock for 0 rounds."""
        begun = time.perf_counter()
        self.run(choice)
        once = (time.perf_counter() - begun) * 1e6
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            error = self.error(choice)
            assert error < MOST_ERROR * (1 if rounds else 2), error
            return times({"it": partial(self.run, choice)}, rounds)["it"] if rounds else once, error


class Bench:
    def __init__(self, out: Path, lock: Path, limits: dict[str, float], rounds: int) -> None:
        self._result: dict[str, Any] = {"torch": torch.__version__, "limits": limits, "rows": []}
        if torch.cuda.is_available():
            self._result["gpu"] = torch.cuda.get_device_name()
        self._out = out
        self._lock = lock
        self._limits = limits
        self._rounds = rounds

    def _add(self, name: str, us: float, moved: float, flops: float, **more: Any) -> None:
        row = {"name": name, "us": round(us, 2), **more}
        row["copy_share"] = round(moved / us / 1e6 / self._limits["copy_tb_s"], 3)
        row["bf16_share"] = round(flops / us / 1e6 / self._limits["bf16_tflops"], 3)
        print(row, flush=True)
        self._result["rows"].append(row)
        write(self._out, self._result)

    def _attention(self, size: Size, choice: Choice, measured: tuple[float, float]) -> None:
        us, error = measured
        heads, sequences, context, new = size
        pairs = sum(range(context - new + 1, context + 1)) * sequences
        flops = 2.0 * heads * pairs * (RANK + ROPE + RANK)
        self._add(_name(size, choice), us, sequences * context * (RANK + ROPE) * 2, flops, error=error)

    def attention(self, tried: Sequence[tuple[Size, Choice]], within: float) -> None:
        end = time.monotonic() + within
        with ThreadPoolExecutor(AT_ONCE) as pool:
            running = {pool.submit(self._elsewhere, *one, end): one for one in tried}
            for done in as_completed(running):
                said = done.result()
                if isinstance(said, str):
                    print(f"{_name(*running[done])}: {said}", flush=True)
                else:
                    self._attention(*running[done], said)

    def _elsewhere(self, size: Size, choice: Choice, end: float) -> tuple[float, float] | str:
        """What `Latents.measured` gives, or why nothing came."""
        cut, plan = choice
        one = json.dumps([size, astuple(cut), plan and astuple(plan)])
        command = [sys.executable, "-m", "bench.gpu_mla", "--one", one, "--lock", str(self._lock)]
        command += ["--rounds", str(self._rounds)]
        if time.monotonic() > end:
            return "not begun in time"
        try:
            ended = run(command, end - time.monotonic())
        except subprocess.TimeoutExpired:
            return "not ended in time"
        if ended.returncode:
            said = [
                line for line in ended.stderr.rpartition("Traceback")[2].splitlines()[1:] if line[:1].strip()
            ]
            return (said or [f"exit {ended.returncode}"])[0][:200]
        us, error = json.loads(ended.stdout.splitlines()[-1])
        return us, error

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
        sides: dict[str, Call] = {
            "to keys": lambda: by_head(queries[..., :NOPE], to_keys, seen[..., :RANK]),
            "to values": lambda: by_head(out, to_values),
        }
        for side, us in times(sides, self._rounds).items():
            self._add(f"{name}, {side}", us, moved, flops)


def _name(size: Size, choice: Choice) -> str:
    heads, sequences, context, new = size
    cut, plan = choice
    plan = plan or plan_of(heads if new == 1 else 64, BF16)
    kind = "decode" if new == 1 else f"prompt of {new}"
    said = f"split={cut.split} block={cut.block} rows={plan.rows} warps={plan.warps} stages={plan.stages}"
    return f"{kind}, {heads} heads, {sequences} x {context}, {said}"


def main() -> None:
    options = _options()
    torch.manual_seed(0)
    if options.one:
        size, cut, plan = json.loads(options.one)
        choice = Cut(*cut), plan and LatentPlan(*plan)
        if options.rounds:
            torch.set_default_device("cuda")
        print(json.dumps(Latents(*size).measured(choice, options.rounds, options.lock)))
        return
    with tempfile.NamedTemporaryFile() as file:
        lock = Path(file.name)
        if options.smoke:
            bench = Bench(options.out, lock, {"copy_tb_s": 1.0, "bf16_tflops": 1.0}, 0)
            small = (3, 2, 64, 1), (3, 1, 64, 3)
            bench.attention(
                [(size, choice) for size in small for choice in (USUAL, (LATENT_CUT, LatentPlan(32, 8, 2)))],
                WITHIN,
            )
            return
        torch.set_default_device("cuda")
        bench = Bench(options.out, lock, measure_limits(options.rounds), options.rounds)
        if options.tune:
            bench.attention([*((size, USUAL) for size in DECODES), *TUNED], TUNED_WITHIN)
            return
        for rows in (32, 2048):
            bench.by_head(128, rows)
        usual = [(size, USUAL) for size in (*DECODES, *MORE)]
        bench.attention(
            [*usual, *((size, other) for size in (*DECODES, *PROMPTS) for other in OTHERS)], WITHIN
        )


def _options() -> argparse.Namespace:
    parser = command_line(__doc__, "gpu_mla")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
