"""Dense products whose bits for a row do not depend on the batch, from one row to thousands.

cuBLAS picks its kernel, hence its order of summation, by shape. Here the inner dimension is cut into pieces of a fixed
length; the sum of a piece goes over k from the first to the last, and the pieces' sums are added first to last, each
rounded to float32. With few tiles of the output, which is a decode, programs share a tile: each computes a piece, and
the one that happens to end last adds them up (split-k with a fixed split; who adds does not show). With many tiles a
program computes all pieces of one. The products are transposed, as in expert_ffn.py, so every shape of tile gives a row
the same bits; tests/engine/kernels/ checks that on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from elastic_ep.kernel import COUNTERS, counters, dot, jit

PIECE = 1024
"""Of the inner dimension: a product's bits depend on it."""


@dataclass(frozen=True, slots=True)
class DensePlan:
    """How a product is cut into tiles. Speed depends on it, results do not."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    parted: bool
    """Programs share a tile's pieces."""


@jit
def _piece(
    x: tl.tensor,
    w: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    first: tl.tensor,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PIECE: tl.constexpr,
) -> tl.tensor:
    """Of x [R, IN] @ w [IN, OUT]: what k from `first` on adds to one tile [N, R]; x points to the tile's first row."""
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    k = first + tl.arange(0, K)
    x_at = x + row[:, None] * IN + k[None, :]
    w_at = w + k[:, None] * OUT + n[None, :]
    real_row = (row < left)[:, None]
    real_n = (n < OUT)[None, :]
    total = tl.zeros([N, R], tl.float32)
    for start in range(0, PIECE, K):
        if IN % PIECE == 0 and OUT % N == 0:
            rows = tl.load(x_at, mask=real_row, other=0.0)
            weights = tl.load(w_at)
        else:
            here = k < IN - start
            rows = tl.load(x_at, mask=real_row & here[None, :], other=0.0)
            weights = tl.load(w_at, mask=real_n & here[:, None], other=0.0)
        total = dot(tl.trans(weights), tl.trans(rows), total)
        x_at += K
        w_at += K * OUT
    return total


@jit
def _dense_kernel(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    parts: tl.tensor,
    ended: tl.tensor,
    rows: tl.tensor,
    IN: tl.constexpr,
    OUT: tl.constexpr,
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
    x += first.to(tl.int64) * IN
    if PARTED:
        piece = tl.program_id(2)
        value = _piece(x, w, left, column, piece * PIECE, IN, OUT, R, N, K, PIECE)
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
            total_t += _piece(x, w, left, column, index * PIECE, IN, OUT, R, N, K, PIECE)
        tl.store(y + at, tl.trans(total_t.to(y.dtype.element_ty)), mask=real)


_FLOAT32 = DensePlan(rows=16, columns=32, depth=32, warps=4, stages=2, parted=False)
_NARROW, _WIDE = 512, 16384
"""Outputs: of a gate and less, of a vocabulary and more."""
ROW_CLASSES = (16, 128, 256, 512, 1024)
"""Up to so many rows are cut alike, and all that are more."""


def plan_of(rows: int, out: int, dtype: torch.dtype) -> DensePlan:
    """The fastest of those tried on an H200, for Qwen3-30B-A3B's products."""
    if dtype == torch.float32:
        return _FLOAT32
    if out >= _WIDE:
        return DensePlan(16 if rows <= 16 else 64, 128, 64, 4, 4, parted=False)
    if rows <= 16:
        return DensePlan(16, 64, 128, 4, 4, parted=True)
    if out <= _NARROW:
        few = 32 if rows <= 512 else 64
        return DensePlan(few, 64, 128, 4, 4 if few == 32 else 3, parted=True)
    if rows <= 256:
        return DensePlan(64, 64, 128, 4, 3, parted=rows <= 128)
    if rows <= 1024:
        return DensePlan(64, 128, 64, 4, 4, parted=False)
    return DensePlan(128, 128, 64, 8, 4, parted=False)


def dense(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    into: torch.Tensor | None = None,
    plan: DensePlan | None = None,
) -> torch.Tensor:
    """x [R, in] @ w [in, out], both contiguous and of one dtype: [R, out] of `out_dtype`, that of x if not given, or in
    the contiguous tensor `into`, of whatever dtype it is.

    Raises ValueError for a `plan` in which programs share more than `COUNTERS` tiles.
    """
    rows, inner = x.shape
    out = w.shape[1]
    y = x.new_empty(rows, out, dtype=out_dtype or x.dtype) if into is None else into
    if not rows:
        return y
    plan = plan or plan_of(rows, out, x.dtype)
    # What is left of a piece past a short inner dimension would be zeros.
    piece = min(PIECE, triton.cdiv(inner, plan.depth) * plan.depth)
    pieces = triton.cdiv(inner, piece)
    parted = plan.parted and pieces > 1
    grid = (triton.cdiv(rows, plan.rows), triton.cdiv(out, plan.columns), pieces if parted else 1)
    if parted and grid[0] * grid[1] > COUNTERS:
        raise ValueError(f"{grid[0] * grid[1]} tiles to share are more than {COUNTERS}")
    parts = x.new_empty(pieces if parted else 0, rows, out, dtype=torch.float32)
    _dense_kernel[grid](
        x,
        w,
        y,
        parts,
        counters(x.device),
        rows,
        IN=inner,
        OUT=out,
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
