"""Experts in bfloat16, FP8, MXFP4 and INT4 on a GPU, in one run: what a layer of them takes, and of what it must read.
Dense products in bfloat16 and FP8 too.

A layer is what a rank has of one: `slots` experts of DeepSeek-V3's or gpt-oss's size. `rows` is how many rows it has to
compute in all, each of an expert drawn at random. "read" is the weights, codes and scales of the experts that have
rows over the time, as a share of what a copy reads and writes a second here; "peak" the products as a share of a
bfloat16 product's speed, which those in FP8 may pass. Calls are timed as kernels.py does it, experts in turns.

"before" is the time in the results that lie in the repository. `--tune` tries tiles for codes and notes the fastest
few of each product, for expert_plan.py, and whether they give the same bits: two minutes more.

    python -m bench.coded_experts [--tune] [--out bench/results/coded_experts.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tests.kit.bound import tied
from tests.kit.coded_experts import scaled

from bench.kit.command_line import command_line
from bench.kit.kernel_timing import BF16, Call, measure_limits, times, write
from elastic_ep.engine.ops_cuda.kernels.dense import dense
from elastic_ep.engine.ops_cuda.kernels.dense_codes import DenseCodes, dense_codes
from elastic_ep.engine.ops_cuda.kernels.expert_ffn import Scaled, expert_ffn
from elastic_ep.engine.ops_cuda.kernels.expert_plan import Plan, Tiles, plan_for
from elastic_ep.models.formats import Format, Fp8, Int4, Mxfp4

Row = dict[str, Any]
Weights = torch.Tensor | Scaled
ROWS = (1, 16, 64, 256, 2048)
SHAPES = {"DeepSeek-V3": (7168, 2048, 32), "gpt-oss": (2880, 2880, 32)}
"""Hidden size, width of an expert, slots."""
FORMATS: dict[str, Format | None] = {
    "bf16": None,
    "fp8": Fp8(128, 128, "weight_scale_inv"),
    "fp8 weights alone": Fp8(128, 128, "weight_scale_inv", weights_alone=True),
    "mxfp4": Mxfp4(),
    "int4": Int4(128, zero_points=False),
}
DENSE = ((7168, 2112), (1536, 24576), (16384, 7168), (7168, 4096), (2048, 7168))
"""In and out of DeepSeek-V3's products by every rank: of attention, and of a shared expert."""
TUNED = (("DeepSeek-V3", "fp8"), ("gpt-oss", "mxfp4"), ("DeepSeek-V3", "int4"))
WHICH = ("gate_up", "down")
NOTED = Path(__file__).parent / "results" / "coded_experts.json"
FEW_ROWS, MANY_ROWS = 256, 256
"""Of all experts together: tiles of few rows are tried up to so many, tiles of many from so many on."""


def main() -> None:
    options = _options()
    _compile_all(options.tune)
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    limits = measure_limits(options.rounds)
    options.before = _noted()
    dense_rows = [row for size in DENSE for row in _dense(*size, limits["copy_tb_s"], options.rounds)]
    rows = [row for shape in SHAPES for row in _shape(shape, limits, options)]
    result = {"gpu": torch.cuda.get_device_name(), "limits": limits, "rows": rows, "dense": dense_rows}
    write(options.out, result)


def _options() -> argparse.Namespace:
    parser = command_line(__doc__, "coded_experts")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--formats", nargs="*", default=[*FORMATS], choices=[*FORMATS])
    parser.add_argument("--tune", action="store_true")
    return parser.parse_args()


def _shape(shape: str, limits: dict[str, float], options: argparse.Namespace) -> Iterator[Row]:
    hidden, inner, slots = SHAPES[shape]
    weights = {name: _weights(FORMATS[name], hidden, inner, slots) for name in options.formats}
    for rows in ROWS:
        counts = torch.bincount(torch.randint(slots, (rows,)), minlength=slots).to(torch.int32)
        packed = torch.randn(slots, -(-int(counts.max()) // 16) * 16, hidden, dtype=BF16)
        sides = {name: _call(packed, counts, *both) for name, both in weights.items()}
        taken = times(sides, options.rounds)
        hit = int((counts > 0).sum())
        for name, both in weights.items():
            read = sum(_bytes(one) for one in both) * hit / slots
            row: Row = {"shape": shape, "rows": rows, "format": name, "us": round(taken[name], 2)}
            row["before"] = options.before.get((shape, rows, name))
            row["read"] = round(read / taken[name] / 1e6 / limits["copy_tb_s"], 3)
            row["peak"] = round(rows * 6 * hidden * inner / taken[name] / 1e6 / limits["bf16_tflops"], 3)
            if "bf16" in taken:
                row["of bf16's time"] = round(taken[name] / taken["bf16"], 3)
            gate_up, down = both
            if (
                options.tune
                and (shape, name) in TUNED
                and isinstance(gate_up, Scaled)
                and isinstance(down, Scaled)
            ):
                row["plans"] = _tuned(packed, counts, gate_up, down)
            print(row, flush=True)
            yield row


def _dense(inner: int, out: int, copy_tb_s: float, rounds: int) -> Iterator[Row]:
    """Microseconds of bfloat16, and of FP8 with what makes codes of the rows."""
    codes = torch.randn(out, inner, dtype=BF16).to(torch.float8_e4m3fn)
    coded = DenseCodes(codes, torch.rand(-(-inner // 128), out) / 64)
    plain = torch.randn(inner, out, dtype=BF16)
    for rows in ROWS:
        x = torch.randn(rows, inner, dtype=BF16)
        taken = times({"bf16": partial(dense, x, plain), "fp8": partial(dense_codes, x, coded)}, rounds)
        row: Row = {
            "in": inner,
            "out": out,
            "rows": rows,
            **{name: round(us, 2) for name, us in taken.items()},
        }
        row["read"] = round(codes.nbytes / taken["fp8"] / 1e6 / copy_tb_s, 3)
        row["of bf16's time"] = round(taken["fp8"] / taken["bf16"], 3)
        print(row, flush=True)
        yield row


def _noted() -> dict[tuple[str, int, str], float]:
    rows = json.loads(NOTED.read_text())["rows"]
    return {(row["shape"], row["rows"], row["format"]): row["us"] for row in rows}


def _weights(format: Format | None, hidden: int, inner: int, slots: int) -> tuple[Weights, Weights]:
    if format is None:
        gate_up = torch.randn(slots, hidden, 2 * inner, dtype=BF16) / hidden**0.5
        return gate_up, torch.randn(slots, inner, hidden, dtype=BF16) / inner**0.5
    device = torch.device("cuda")
    gate_up = scaled(format, [(inner, hidden)] * 2, slots, device)
    return gate_up, scaled(format, [(hidden, inner)], slots, device)


def _bytes(weights: Weights) -> int:
    return (
        weights.nbytes if isinstance(weights, torch.Tensor) else weights.codes.nbytes + weights.scales.nbytes
    )


def _call(
    packed: torch.Tensor, counts: torch.Tensor, gate_up: Weights, down: Weights, plan: Plan | None = None
) -> Call:
    expected = max(1, int(counts.sum()) // len(counts))
    out = torch.empty_like(packed)
    return lambda: expert_ffn(packed, counts, gate_up, down, expected_rows=expected, plan=plan, out=out)


def _tuned(packed: torch.Tensor, counts: torch.Tensor, gate_up: Scaled, down: Scaled) -> list[Row]:
    """The fastest tiles of each product, the other's left as they are."""
    found: list[Row] = []
    wanted = _call(packed, counts, gate_up, down)()
    rows = int(counts.sum())
    for which in WHICH:
        kinds = [*(_few(gate_up) if rows <= FEW_ROWS else ()), *(_many() if rows >= MANY_ROWS else ())]
        plans = _plans(gate_up, which, kinds, (1, 2, 3, 4))
        sides = {str(place): _call(packed, counts, gate_up, down, plan) for place, plan in enumerate(plans)}
        taken = times(sides, 4, repeat=4)
        for place in sorted(range(len(plans)), key=lambda one: taken[str(one)])[:4]:
            same = torch.equal(_received(sides[str(place)](), counts), _received(wanted, counts))
            tiles = asdict(getattr(plans[place], which))
            found.append({"product": which, "us": round(taken[str(place)], 2), "same": same, **tiles})
    return found


def _received(y: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return y[torch.arange(y.shape[1]) < counts[:, None]]


def _few(weights: Scaled) -> list[Tiles]:
    """For experts with few rows each, which is where reading weights is what takes time."""
    sizes = [(64, 4), (128, 4), (128, 8)]
    made = [
        Tiles(16, 16, columns, 128, warps, stages, 1)
        for (columns, warps), stages in product(sizes, (3, 4, 6))
    ]
    if weights.format == Mxfp4():  # the one format whose steps may be longer
        made += [
            Tiles(16, 16, columns, 256, warps, stages, 1)
            for (columns, warps), stages in product(sizes, (2, 3))
        ]
    return made


def _many() -> list[Tiles]:
    sizes = [(64, 4), (128, 4), (128, 8)]
    rows = [(64, 16), (64, 64), (128, 64)]
    return [
        Tiles(most, few, columns, 128, warps, stages, 1)
        for (most, few), (columns, warps), stages in product(rows, sizes, (3, 4))
        if most * columns // warps <= 2048
    ]


def _plans(weights: Scaled, which: str, kinds: list[Tiles], programs: tuple[int, ...]) -> list[Plan]:
    """Those to try: one product's tiles changed."""
    now = weights.plan(1, BF16)
    kept = [one for one in kinds if weights.cut(one, down=which == "down") == one]  # others are one of these
    return [replace(now, **{which: replace(one, per_processor=count)}) for one in kept for count in programs]


def _compile_all(tune: bool) -> None:
    """With as many processes as there are processors, into Triton's cache."""
    workers = max(1, min(14, (os.cpu_count() or 1) - 2))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, tied, (torch.set_default_device, "cuda")) as pool:
        for shape, name in product(SHAPES, FORMATS):
            weights, _ = _blank(FORMATS[name], 128, 128, 1, "meta")
            of = weights.plan if isinstance(weights, Scaled) else plan_for
            plans = [of(expected, BF16) for expected in (1, 1000)]
            if tune and (shape, name) in TUNED and isinstance(weights, Scaled):
                kinds = [*_few(weights), *_many()]
                plans += [plan for which in WHICH for plan in _plans(weights, which, kinds, (1,))]
            for plan in dict.fromkeys(plans):
                pool.submit(_compile, shape, name, plan)


def _compile(shape: str, name: str, plan: Plan) -> None:
    hidden, inner, slots = SHAPES[shape]
    packed = torch.empty(slots, 16, hidden, dtype=BF16)
    counts = torch.zeros(slots, dtype=torch.int32)
    _call(packed, counts, *_blank(FORMATS[name], hidden, inner, slots, "cuda"), plan)()


def _blank(
    format: Format | None, hidden: int, inner: int, slots: int, device: str
) -> tuple[Weights, Weights]:
    """Undefined ones."""
    if format is None:
        gate_up = torch.empty(slots, hidden, 2 * inner, dtype=BF16, device=device)
        return gate_up, torch.empty(slots, inner, hidden, dtype=BF16, device=device)

    def made(pieces: list[tuple[int, int]]) -> Scaled:
        shapes = scaled(format, pieces, slots, torch.device("meta"))
        codes, scales = (torch.empty_like(one, device=device) for one in (shapes.codes, shapes.scales))
        return replace(shapes, codes=codes, scales=scales)

    return made([(inner, hidden)] * 2), made([(hidden, inner)])


if __name__ == "__main__":
    main()
