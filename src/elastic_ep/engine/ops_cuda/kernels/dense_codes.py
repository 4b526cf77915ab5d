"""Dense products of weights in FP8: rows become FP8 as well (row_codes.py), and each sum of 128 products has two scales.

Cut as in dense.py: pieces of the inner dimension, whose sums are added first to last, and programs that share a tile of
the output where there are few. A row's bits are its own there, and its codes are; so they are here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from elastic_ep.engine.ops_cuda.kernels.dense import PIECE, DensePlan
from elastic_ep.engine.ops_cuda.kernels.row_codes import blank_codes, code_one_row, first_scale
from elastic_ep.kernel import COUNTERS, counters, dot, jit, power_of_2
from elastic_ep.models.formats import ROW_GROUP


@dataclass(frozen=True, slots=True)
class DenseCodes:
    """A matrix: `codes` [out, in] float8, and `scales` [ceil(in / ROW_GROUP), out] float32, each of a group of a row."""

    codes: torch.Tensor
    scales: torch.Tensor


@jit
def _code_dense_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    code_one_row(x, codes, scales, tl.program_id(0).to(tl.int64), WIDTH, STRIDE, FIRST, GROUP, BLOCK_G)


@jit
def _coded_piece(
    x: tl.tensor,
    x_scales: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    first: tl.tensor,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PIECE: tl.constexpr,
) -> tl.tensor:
    """What k from `first` on adds to one tile [N, R]; x and x_scales point to the tile's first row."""
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    k = first + tl.arange(0, K)
    x_at = x + row[:, None] * STRIDE + k[None, :]
    w_at = w + n[:, None] * IN + k[None, :]
    x_scale_at = x_scales + row * (STRIDE // 4) + FIRST + first // K
    scale_at = scales + first // K * OUT + n
    real_row = row < left
    real_n = n < OUT
    # Scales are read a step ahead. A piece begins within the matrix.
    scale = tl.load(scale_at, mask=real_n, other=0.0)
    x_scale = tl.load(x_scale_at, mask=real_row, other=0.0)
    total = tl.zeros([N, R], tl.float32)
    for start in range(0, PIECE, K):
        if IN % PIECE == 0 and OUT % N == 0:
            rows = tl.load(x_at, mask=real_row[:, None], other=0.0)
            weights = tl.load(w_at)
        else:
            here = k < IN - start
            rows = tl.load(x_at, mask=real_row[:, None] & here[None, :], other=0.0)
            weights = tl.load(w_at, mask=real_n[:, None] & here[None, :], other=0.0)
        scale_at += OUT
        x_scale_at += 1
        more = first + start + K < IN
        next = tl.load(scale_at, mask=real_n & (more + tl.zeros([N], tl.int1)), other=0.0)
        x_next = tl.load(x_scale_at, mask=real_row & (more + tl.zeros([R], tl.int1)), other=0.0)
        part = dot(weights, tl.trans(rows), tl.zeros([N, R], tl.float32))
        total += part * (scale[:, None] * x_scale[None, :])
        scale, x_scale = next, x_next
        x_at += K
        w_at += K
    return total


@jit
def _dense_codes_kernel(
    x: tl.tensor,
    x_scales: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    y: tl.tensor,
    parts: tl.tensor,
    ended: tl.tensor,
    rows: tl.tensor,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PIECE: tl.constexpr,
    PARTED: tl.constexpr,
) -> None:
    PIECES: tl.constexpr = (IN + PIECE - 1) // PIECE
    first = tl.program_id(0) * R  # fastest: the programs at work at a time share weights
    column = tl.program_id(1) * N
    left = rows - first
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    at = (first + row).to(tl.int64)[:, None] * OUT + n[None, :]
    real = (row < left)[:, None] & (n < OUT)[None, :]
    x += first.to(tl.int64) * STRIDE
    x_scales += first.to(tl.int64) * (STRIDE // 4)
    if PARTED:
        piece = tl.program_id(2)
        value = _coded_piece(
            x, x_scales, w, scales, left, column, piece * PIECE, IN, OUT, STRIDE, FIRST, R, N, K, PIECE
        )
        size = rows * tl.full([], OUT, tl.int64)
        tl.store(parts + piece * size + at, tl.trans(value), mask=real)
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.debug_barrier()  # the stores of all threads come before the one that counts them
        if tl.atomic_add(ended + tile, 1) == PIECES - 1:
            total = tl.zeros([R, N], tl.float32)
            for index in tl.static_range(PIECES):
                total += tl.load(parts + index * size + at, mask=real, other=0.0)
            tl.store(y + at, total.to(y.dtype.element_ty), mask=real)
            tl.store(ended + tile, 0)
    else:
        total_t = tl.zeros([N, R], tl.float32)
        for index in range(PIECES):
            total_t += _coded_piece(
                x, x_scales, w, scales, left, column, index * PIECE, IN, OUT, STRIDE, FIRST, R, N, K, PIECE
            )
        tl.store(y + at, tl.trans(total_t.to(y.dtype.element_ty)), mask=real)


def plan_of_codes(rows: int, out: int) -> DensePlan:
    """As for bfloat16 (dense.py), in steps of `ROW_GROUP`."""
    if rows <= 16:
        return DensePlan(16, 64, ROW_GROUP, 4, 5, parted=True)
    if rows <= 256:
        return DensePlan(64, 64, ROW_GROUP, 4, 4, parted=rows <= 128)
    if rows <= 1024:
        return DensePlan(64, 128, ROW_GROUP, 4, 4, parted=False)
    return DensePlan(128, 128, ROW_GROUP, 8, 4, parted=False)


def dense_codes(x: torch.Tensor, w: DenseCodes, *, plan: DensePlan | None = None) -> torch.Tensor:
    """x [R, in] @ w: [R, out] of the dtype of x, which is contiguous.

    Raises ValueError for a `plan` whose steps are not `ROW_GROUP` long, or in which programs share more than `COUNTERS`
    tiles.
    """
    rows, inner = x.shape
    out = len(w.codes)
    y = x.new_empty(rows, out)
    if not rows:
        return y
    plan = plan or plan_of_codes(rows, out)
    if plan.depth != ROW_GROUP:
        raise ValueError(f"steps of {plan.depth}: {ROW_GROUP} expected")
    coded = blank_codes((rows,), inner, x.device)
    groups = triton.cdiv(inner, ROW_GROUP)
    _code_dense_kernel[(rows,)](
        x,
        coded.codes,
        coded.scales,
        WIDTH=inner,
        STRIDE=coded.bytes_a_row,
        FIRST=first_scale(inner),
        GROUP=ROW_GROUP,
        BLOCK_G=power_of_2(groups),
        num_warps=4 if inner <= 4096 else 8,
        enable_fp_fusion=False,
    )
    piece = min(PIECE, groups * ROW_GROUP)
    pieces = triton.cdiv(inner, piece)
    parted = plan.parted and pieces > 1
    grid = (triton.cdiv(rows, plan.rows), triton.cdiv(out, plan.columns), pieces if parted else 1)
    if parted and grid[0] * grid[1] > COUNTERS:
        raise ValueError(f"{grid[0] * grid[1]} tiles to share are more than {COUNTERS}")
    _dense_codes_kernel[grid](
        coded.codes,
        coded.scales,
        w.codes,
        w.scales,
        y,
        x.new_empty(pieces if parted else 0, rows, out, dtype=torch.float32),
        counters(x.device),
        rows,
        IN=inner,
        OUT=out,
        STRIDE=coded.bytes_a_row,
        FIRST=first_scale(inner),
        R=plan.rows,
        N=plan.columns,
        K=plan.depth,
        PIECE=piece,
        PARTED=parted,
        num_warps=plan.warps,
        num_stages=plan.stages,
        enable_fp_fusion=False,
    )
    return y
