"""One tile of the experts' products: weights on the left, token rows on the right, so [columns, rows].

The sum over k goes in steps of a tile's depth from the first to the last; see expert_ffn.py for why that matters.
"""

from __future__ import annotations

import triton.language as tl

from elastic_ep.kernel import dot, jit


@jit
def store_tile(
    y: tl.tensor,
    rows: tl.tensor,
    value: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    OUT: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """y[rows, column:] = value [N, R] transposed, of the first `left` rows."""
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    value = tl.trans(value.to(y.dtype.element_ty))
    tl.store(y + rows[:, None] * OUT + n[None, :], value, mask=(row < left)[:, None] & (n < OUT)[None, :])


@jit
def activated(
    gated: tl.tensor, up: tl.tensor, alpha: tl.tensor, limit: tl.tensor, CLAMPED: tl.constexpr
) -> tl.tensor:
    """silu(gated) * up, or as models.spec.Clamped says."""
    if CLAMPED:
        gated = tl.minimum(gated, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return gated / (1.0 + tl.exp(-gated * alpha)) * (up + 1.0)
    return gated / (1.0 + tl.exp(-gated)) * up


@jit
def biased(
    value: tl.tensor, bias: tl.tensor, column: tl.tensor, OUT: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    """value [N, R] and the bias of its columns, of `OUT`."""
    n = column + tl.arange(0, N)
    return value + tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)[:, None]


@jit
def gate_up_tile(
    x: tl.tensor,
    rows: tl.tensor,
    w: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """Gate and up of one tile [N, R] of the `rows` [R] of x; w points to their slot."""
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    k = tl.arange(0, K)
    real_row = (row < left)[:, None]
    real_n = (n < INNER)[None, :]
    x_at = x + rows[:, None] * H + k[None, :]
    w_at = w + k[:, None] * (2 * INNER) + n[None, :]
    gated = tl.zeros([N, R], tl.float32)
    up = tl.zeros([N, R], tl.float32)
    for start in range(0, H, K):
        if H % K == 0:
            values = tl.load(x_at, mask=real_row, other=0.0)
        else:
            values = tl.load(x_at, mask=real_row & (k < H - start)[None, :], other=0.0)
        if H % K == 0 and INNER % N == 0:
            left_weights = tl.load(w_at)
            right_weights = tl.load(w_at + INNER)
        else:
            real = real_n & (k < H - start)[:, None]
            left_weights = tl.load(w_at, mask=real, other=0.0)
            right_weights = tl.load(w_at + INNER, mask=real, other=0.0)
        gated = dot(tl.trans(left_weights), tl.trans(values), gated)
        up = dot(tl.trans(right_weights), tl.trans(values), up)
        x_at += K
        w_at += K * (2 * INNER)
    return gated, up


@jit
def down_tile(
    x: tl.tensor,
    rows: tl.tensor,
    w: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """x @ w of one tile [N, R] of the `rows` [R] of x; w points to their slot."""
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    k = tl.arange(0, K)
    real_row = (row < left)[:, None]
    real_n = (n < H)[None, :]
    x_at = x + rows[:, None] * INNER + k[None, :]
    w_at = w + k[:, None] * H + n[None, :]
    total = tl.zeros([N, R], tl.float32)
    for start in range(0, INNER, K):
        if INNER % K == 0:
            values = tl.load(x_at, mask=real_row, other=0.0)
        else:
            values = tl.load(x_at, mask=real_row & (k < INNER - start)[None, :], other=0.0)
        if INNER % K == 0 and H % N == 0:
            weights = tl.load(w_at)
        else:
            weights = tl.load(w_at, mask=real_n & (k < INNER - start)[:, None], other=0.0)
        total = dot(tl.trans(weights), tl.trans(values), total)
        x_at += K
        w_at += K * H
    return total
