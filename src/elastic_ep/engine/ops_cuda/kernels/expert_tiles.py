"""One tile of the experts' products: weights on the left, token rows on the right, so [columns, rows].

The sum over k goes in steps of a tile's depth from the first to the last; see expert_ffn.py for why that matters.
"""

from __future__ import annotations

import triton.language as tl

from elastic_ep.engine.ops_cuda.kernels.launch import dot, jit


@jit
def store_tile(
    y: tl.tensor,
    value: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    OUT: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """y[:left, column:] = value [N, R] transposed; y points to its first row."""
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    value = tl.trans(value.to(y.dtype.element_ty))
    tl.store(y + row[:, None] * OUT + n[None, :], value, mask=(row < left)[:, None] & (n < OUT)[None, :])


@jit
def _swiglu(gated: tl.tensor, up: tl.tensor) -> tl.tensor:
    return gated / (1.0 + tl.exp(-gated)) * up


@jit
def gate_up_tile(
    x: tl.tensor,
    w: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """silu(gate) * up of one tile [N, R]; x points to its first row, w to its slot."""
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    k = tl.arange(0, K)
    real_row = (row < left)[:, None]
    real_n = (n < INNER)[None, :]
    x_at = x + row[:, None] * H + k[None, :]
    w_at = w + k[:, None] * (2 * INNER) + n[None, :]
    gated = tl.zeros([N, R], tl.float32)
    up = tl.zeros([N, R], tl.float32)
    for start in range(0, H, K):
        if H % K == 0:
            rows = tl.load(x_at, mask=real_row, other=0.0)
        else:
            rows = tl.load(x_at, mask=real_row & (k < H - start)[None, :], other=0.0)
        if H % K == 0 and INNER % N == 0:
            left_weights = tl.load(w_at)
            right_weights = tl.load(w_at + INNER)
        else:
            real = real_n & (k < H - start)[:, None]
            left_weights = tl.load(w_at, mask=real, other=0.0)
            right_weights = tl.load(w_at + INNER, mask=real, other=0.0)
        gated = dot(tl.trans(left_weights), tl.trans(rows), gated)
        up = dot(tl.trans(right_weights), tl.trans(rows), up)
        x_at += K
        w_at += K * (2 * INNER)
    return _swiglu(gated, up)


@jit
def down_tile(
    x: tl.tensor,
    w: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """x @ w of one tile [N, R]; x points to its first row, w to its slot."""
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    k = tl.arange(0, K)
    real_row = (row < left)[:, None]
    real_n = (n < H)[None, :]
    x_at = x + row[:, None] * INNER + k[None, :]
    w_at = w + k[:, None] * H + n[None, :]
    total = tl.zeros([N, R], tl.float32)
    for start in range(0, INNER, K):
        if INNER % K == 0:
            rows = tl.load(x_at, mask=real_row, other=0.0)
        else:
            rows = tl.load(x_at, mask=real_row & (k < INNER - start)[None, :], other=0.0)
        if INNER % K == 0 and H % N == 0:
            weights = tl.load(w_at)
        else:
            weights = tl.load(w_at, mask=real_n & (k < INNER - start)[:, None], other=0.0)
        total = dot(tl.trans(weights), tl.trans(rows), total)
        x_at += K
        w_at += K * H
    return total
