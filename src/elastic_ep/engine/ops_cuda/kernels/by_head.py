"""A product for each head, whose bits for a row do not depend on the batch: what latent attention's queries and results
go through. The inner dimension is short, so one sum goes over it from first to last, as over a piece in dense.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elastic_ep.kernel import dot, jit


@jit
def _by_head_kernel(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    w_head: tl.tensor,
    w_stride: tl.tensor,
    y_row: tl.tensor,
    y_head: tl.tensor,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TURNED: tl.constexpr,
) -> None:
    row = tl.program_id(0) * R + tl.arange(0, R)
    n = tl.program_id(1) * N + tl.arange(0, N)
    head = tl.program_id(2).to(tl.int64)
    at = row.to(tl.int64)[:, None]
    real_row = (row < rows)[:, None]
    x += head * x_head
    w += head * w_head
    total = tl.zeros([N, R], tl.float32)
    for start in range(0, IN, K):
        k = start + tl.arange(0, K)
        here = (k < IN)[None, :]
        some = tl.load(x + at * x_row + k[None, :], mask=real_row & here, other=0.0)
        if TURNED:
            weights = tl.load(
                w + n[:, None] * w_stride + k[None, :], mask=(n < OUT)[:, None] & here, other=0.0
            )
        else:
            real = (k < IN)[:, None] & (n < OUT)[None, :]
            weights = tl.trans(tl.load(w + k[:, None] * w_stride + n[None, :], mask=real, other=0.0))
        total = dot(weights, tl.trans(some), total)
    target = y + head * y_head + at * y_row + n[None, :]
    tl.store(target, tl.trans(total).to(y.dtype.element_ty), mask=real_row & (n < OUT)[None, :])


def by_head(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [R, heads, in] @ w [heads, in, out], a matrix for each head: [R, heads, out], into `out` if given.

    The numbers of a head of x and `out` lie side by side; of w those of a row do, or those of a column.
    """
    rows, heads, inner = x.shape
    width = w.shape[2]
    y = x.new_empty(rows, heads, width) if out is None else out
    if not rows:
        return y
    turned = w.stride(2) != 1
    few = rows <= 16
    tile = (16, 64, 64) if few or x.dtype == torch.float32 else (64, 128, 64)
    _by_head_kernel[(triton.cdiv(rows, tile[0]), triton.cdiv(width, tile[1]), heads)](
        x,
        w,
        y,
        rows,
        x.stride(0),
        x.stride(1),
        w.stride(0),
        w.stride(2) if turned else w.stride(1),
        y.stride(0),
        y.stride(1),
        IN=inner,
        OUT=width,
        R=tile[0],
        N=tile[1],
        K=tile[2],
        TURNED=turned,
        num_warps=4,
        num_stages=3 if x.dtype == torch.bfloat16 else 1,
        enable_fp_fusion=False,
    )
    return y
