"""The compiler refuses things that the interpreter lets pass: every kernel is compiled for Hopper, GPU or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from elastic_ep.engine.ops_cuda.kernels import (
    decode_attention,
    dense,
    expert_ffn,
    gate,
    latent_attention,
    norm_rope,
    prefill_attention,
)
from elastic_ep.engine.ops_cuda.kernels.decode_attention import DecodePlan
from elastic_ep.engine.ops_cuda.kernels.expert_plan import Tiles, plan_for
from elastic_ep.engine.ops_cuda.kernels.paged_attention import CUT, Cut
from elastic_ep.exchange import peer_kernels
from elastic_ep.kernel import power_of_2
from tests.engine.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter's process")

SHARED_MEMORY = 227 * 1024
"""Bytes that a program may have on Hopper."""

_NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int = 3
) -> Any:
    """For a target that nobody needs to have; pointers are taken as aligned, as torch's are."""
    names = kernel.arg_names
    assert {*types, *constants} == set(names)
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types.get(name, "").startswith("*")
        },
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert result.metadata.shared <= SHARED_MEMORY
    return result


def uses_wgmma_alone(result: Any) -> bool:
    return "wgmma.mma_async" in result.asm["ptx"] and "mma.sync" not in result.asm["ptx"].replace("wgmma", "")


@pytest.mark.parametrize("kind", ["plain", "corrected, in groups"])
def test_gate(kind: str) -> None:
    types = {"logits": "*bf16", "physical_of": "*i64", "num_tokens": "*i32", "physical": "*i64"}
    types |= {"weights": "*fp32", "stride": "i32", "correction": "*fp32"}
    types |= dict.fromkeys(("added", "least", "factor"), "fp32")
    constants = {
        "E": 37,
        "K": 5,
        "BLOCK_E": 64,
        "BLOCK_K": 8,
        "RENORMALISE": True,
        "LIMITED": True,
    }
    constants |= dict.fromkeys(("SIGMOID", "CORRECTED", "TWO"), kind != "plain")
    constants |= {"GROUPS": 1, "TOP_GROUPS": 1}
    if kind != "plain":
        constants |= {"E": 256, "K": 8, "BLOCK_E": 256, "GROUPS": 8, "TOP_GROUPS": 4}
    compiled(gate._gate_kernel, types, constants, 1)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("rotated", "interleaved"), [(80, False), (40, False), (40, True)])
def test_norms(norm: bool, clip: bool, rotated: int, interleaved: bool) -> None:
    types = dict.fromkeys(("x", "residual", "weight", "normed", "total"), "*bf16") | {"eps": "fp32"}
    compiled(norm_rope._add_norm_kernel, types, {"H": 130, "BLOCK": 256, "ADD": True}, 4)
    types = dict.fromkeys(("qkv", "norm", "q", "keys", "values"), "*bf16")
    types |= {
        "cos": "*fp32",
        "sin": "*fp32",
        "positions": "*i64",
        "slots": "*i64",
        "stride": "i32",
        "eps": "fp32",
        "clip": "fp32",
    }
    constants: dict[str, Any] = {"HQ": 32, "HK": 4, "D": 80, "PAGE": 16, "BLOCK": 64, "HEADS": 8}
    constants |= {"NORM": norm, "CLIP": clip, "ROTATED": rotated, "INTERLEAVED": interleaved}
    compiled(norm_rope._norm_rope_kernel, types, constants, 4)


def compiled_experts(tiles: Tiles, dtype: torch.dtype, down: bool, parts: int) -> Any:
    types = dict.fromkeys(("x", "x_scales", "w", "scales", "y", "y_scales", "bias"), _NAMES[dtype])
    types |= {"alpha": "fp32", "limit": "fp32", "counts": "*i32", "part": "i32", "zeros": "*i32"}
    constants = {"H": 2048, "INNER": 768, "SLOTS": 40, "BLOCK_S": 64, "ROWS": tiles.rows, "FEW": tiles.few}
    constants |= {"X_STRIDE": 768 if down else 2048, "Y_STRIDE": 2048 if down else 768, "WIDTH": 0, "FORM": 0}
    constants |= {"N": tiles.columns, "K": tiles.depth, "DOWN": down, "PARTS": parts}
    constants |= {"BLOCK_P": power_of_2(parts), "SCALE_ROWS": 1, "SCALE_COLUMNS": 1}
    constants |= dict.fromkeys(("BIASED", "CLAMPED", "ZEROS"), False)
    return compiled(expert_ffn._experts_kernel, types, constants, tiles.warps, tiles.stages)


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rows", "parts"), [(torch.bfloat16, 1, 3), (torch.bfloat16, 1000, 1), (torch.float32, 1, 1)]
)
def test_expert_ffn(dtype: torch.dtype, rows: int, down: bool, parts: int) -> None:
    plan = plan_for(rows, dtype)
    result = compiled_experts(plan.down if down else plan.gate_up, dtype, down, parts)
    assert uses_wgmma_alone(result) or dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("cut", "plan"),
    [
        (None, DecodePlan()),
        (Cut(split=256, block=128), DecodePlan(stages=2)),
    ],
)
def test_decode_attention(dtype: torch.dtype, cut: Cut | None, plan: DecodePlan) -> None:
    cut = cut or CUT[dtype]
    types = dict.fromkeys(("q", "keys", "values", "out"), _NAMES[dtype])
    types |= dict.fromkeys(("tables", "bounds", "lengths", "ended"), "*i32") | {"sinks": _NAMES[dtype]}
    parts = dict.fromkeys(("parts", "tops", "totals"), "*fp32")
    numbers = {"scale": "fp32", "table_stride": "i32", "splits": "i32"}
    shape = {"HK": 4, "G": 8, "D": 64, "BLOCK_D": 64, "R": 16, "PAGE": 16}
    choices = {"SPLIT": cut.split, "BLOCK": cut.block, "WINDOW": 0}
    choices |= dict.fromkeys(("CHUNKED", "SINKS", "ONES"), False)
    kernel = decode_attention._decode_kernel
    result = compiled(kernel, types | parts | numbers, shape | choices, plan.warps, plan.stages)
    assert uses_wgmma_alone(result) or dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.bfloat16, 0), (torch.bfloat16, 128), (torch.float32, 0)]
)
def test_prefill_attention(dtype: torch.dtype, window: int) -> None:
    rows = prefill_attention._ROWS[dtype]
    types = dict.fromkeys(("q", "keys", "values", "out"), _NAMES[dtype])
    types |= dict.fromkeys(("tables", "bounds", "lengths"), "*i32") | {"sinks": _NAMES[dtype]}
    types |= {"scale": "fp32", "table_stride": "i32", "sequences": "i32"}
    constants = {"HK": 4, "G": 8, "D": 64, "BLOCK_D": 64, "R": rows, "TOKENS": rows // 8, "PAGE": 16}
    constants |= {"SPLIT": CUT[dtype].split, "BLOCK": CUT[dtype].block, "BLOCK_B": 32, "WINDOW": window}
    constants |= {"CHUNKED": False, "SINKS": window > 0}
    result = compiled(prefill_attention._prefill_kernel, types, constants, 8 if rows == 128 else 4, 3)
    assert uses_wgmma_alone(result) or dtype == torch.float32


@pytest.mark.parametrize("heads", [16, 64])
def test_latent_decode(heads: int) -> None:
    cut, plan = latent_attention.LATENT_CUT, latent_attention.plan_of(heads, torch.bfloat16)
    types = dict.fromkeys(("q", "latents", "out"), "*bf16")
    types |= dict.fromkeys(("tables", "lengths", "ended"), "*i32")
    types |= dict.fromkeys(("parts", "tops", "totals"), "*fp32")
    types |= {"scale": "fp32"} | dict.fromkeys(("table_stride", "sequences", "splits"), "i32")
    constants = {"HQ": heads, "G": heads, "KV": 512, "ROPE": 64, "BLOCK_KV": 512, "BLOCK_ROPE": 64}
    constants |= {"R": plan.rows, "PAGE": 16, "SPLIT": cut.split, "BLOCK": cut.block, "BLOCK_B": 32}
    kernel = latent_attention._latent_decode_kernel
    assert uses_wgmma_alone(compiled(kernel, types, constants | {"COLUMNS": 128}, plan.warps, plan.stages))


@pytest.mark.parametrize(("rows", "out"), [(16, 5120), (4096, 5120)])
def test_dense(rows: int, out: int) -> None:
    plan = dense.plan_of(rows, out, torch.bfloat16)
    types = {"x": "*bf16", "w": "*bf16", "y": "*fp32", "parts": "*fp32", "ended": "*i32", "rows": "i32"}
    constants = {"IN": 4096, "OUT": out, "R": plan.rows, "N": plan.columns, "K": plan.depth}
    constants |= {"PIECE": dense.PIECE, "PARTED": plan.parted}
    assert uses_wgmma_alone(compiled(dense._dense_kernel, types, constants, plan.warps, plan.stages))


@pytest.mark.parametrize("ranks", [1, 3])
def test_exchange_through_peers_memory(ranks: int) -> None:
    pointers = {"x": "*bf16", "rows": "*bf16", "y": "*bf16", "weights": "*fp32"}
    pointers |= dict.fromkeys(("places", "sent", "done", "counts"), "*i32")
    pointers |= dict.fromkeys(("chosen", "words", "peers", "base", "ready", "masks", "told"), "*i64")
    numbers = dict.fromkeys(("operation", "me", "tokens"), "i32") | {"limit_ns": "i64"}
    every = pointers | numbers
    constants = {"H": 2048, "K": 8, "SLOTS": 36, "RANKS": ranks, "PARTS": 36 * ranks, "BLOCK": 1024}
    constants |= {"BLOCK_H": 2048, "BLOCK_K": 8, "BLOCK_E": 128}
    kernels = peer_kernels._send_kernel, peer_kernels._arrive_kernel, peer_kernels._ready_kernel
    for kernel in (*kernels, peer_kernels._done_kernel, peer_kernels._fetch_kernel):
        names: list[str] = kernel.arg_names  # type: ignore[attr-defined]  # Triton's own
        known = {name: kind for name, kind in every.items() if name in names}
        result = compiled(kernel, known, {name: constants[name] for name in names if name in constants}, 4)
        if kernel in (peer_kernels._send_kernel, peer_kernels._fetch_kernel):
            assert ".v4.b32" in result.asm["ptx"], "rows go in pieces of 16 bytes"
