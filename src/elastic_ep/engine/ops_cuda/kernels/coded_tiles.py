"""One tile of the experts' products where weights are codes [out, in] and scales: see expert_ffn.py and expert_tiles.py.

A step of the sum over k has one length, whatever the tiles are: what it comes to is multiplied by its scale, in
float32, or its codes have been. Codes of four bits lie two in a byte, an even k below an odd one: they meet even and
odd columns of the rows, one product after the other.
"""

from __future__ import annotations

import triton.language as tl

from elastic_ep.engine.ops_cuda.kernels.row_codes import scale_of
from elastic_ep.kernel import dot, jit, to_float8

FP8 = tl.constexpr(1)
"""Codes in float8 become numbers as rows are, which is exact."""
FP8_ROWS = tl.constexpr(2)
"""Rows are codes as well (row_codes.py), and a step is a group of theirs."""
MXFP4 = tl.constexpr(3)
INT4 = tl.constexpr(4)

_MX_BLOCK = tl.constexpr(32)


@jit
def _load(at: tl.tensor, real: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    return tl.load(at, mask=real, other=0.0) if MASKED else tl.load(at)


@jit
def _e2m1(codes: tl.tensor, scales: tl.tensor) -> tl.tensor:
    """float32 of codes of four bits. Their bits, as a float32's, are a number that is 2 ** 126 times smaller."""
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * scales


@jit
def _e8m0(exponents: tl.tensor, N: tl.constexpr, K: tl.constexpr) -> tl.tensor:
    """The scales [N, K / 2] of pairs of columns, of exponents [N, K / 32] uint8."""
    BLOCKS: tl.constexpr = K // _MX_BLOCK
    bits = tl.maximum(exponents.to(tl.int32) << 23, 1 << 22)  # the lowest is no exponent of a float32
    scales = bits.to(tl.float32, bitcast=True)
    spread = tl.broadcast_to(scales[:, :, None], [N, BLOCKS, _MX_BLOCK // 2])
    return tl.reshape(spread, [N, K // 2])


@jit
def _add_float8(
    total: tl.tensor,
    values: tl.tensor,
    value_scales: tl.tensor,
    w_at: tl.tensor,
    scale_at: tl.tensor,
    real: tl.tensor,
    real_n: tl.tensor,
    N: tl.constexpr,
    R: tl.constexpr,
    MASKED: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    FORM: tl.constexpr,
) -> tl.tensor:
    """`total` [N, R] and what a step's codes [N, K] add to it; `values` [R, K]."""
    codes = _load(w_at, real, MASKED)
    scale = tl.load(scale_at) if ONE_SCALE else _load(scale_at, real_n, MASKED)[:, None]
    if FORM == FP8_ROWS:
        part = dot(codes, tl.trans(values), tl.zeros([N, R], tl.float32))
        return total + part * (scale * value_scales[None, :])
    part = dot(codes.to(values.dtype), tl.trans(values), tl.zeros([N, R], tl.float32))
    return total + part * scale


@jit
def _add_mxfp4(
    total: tl.tensor,
    even: tl.tensor,
    odd: tl.tensor,
    w_at: tl.tensor,
    scale_at: tl.tensor,
    real: tl.tensor,
    real_scale: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    codes = _load(w_at, real, MASKED).to(tl.int32)
    scales = _e8m0(_load(scale_at, real_scale, MASKED), N, K)
    total = dot(_e2m1(codes & 15, scales).to(even.dtype), tl.trans(even), total)
    return dot(_e2m1(codes >> 4, scales).to(even.dtype), tl.trans(odd), total)


@jit
def _add_int4(
    total: tl.tensor,
    even: tl.tensor,
    odd: tl.tensor,
    w_at: tl.tensor,
    scale_at: tl.tensor,
    zero_at: tl.tensor,
    shift: tl.tensor,
    real: tl.tensor,
    real_n: tl.tensor,
    N: tl.constexpr,
    R: tl.constexpr,
    ZEROS: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    codes = _load(w_at, real, MASKED).to(tl.int32)
    scale = _load(scale_at, real_n, MASKED)
    zero = 8
    if ZEROS:
        zero = ((_load(zero_at, real_n, MASKED) >> shift) & 15)[:, None]
    low = ((codes & 15) - zero).to(tl.float32).to(even.dtype)
    high = ((codes >> 4) - zero).to(tl.float32).to(even.dtype)
    part = dot(low, tl.trans(even), tl.zeros([N, R], tl.float32))
    return total + dot(high, tl.trans(odd), part) * scale[:, None]


@jit
def coded_tile(
    x: tl.tensor,
    x_scales: tl.tensor,
    rows: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIR: tl.constexpr,
    ALTERNATING: tl.constexpr,
    FORM: tl.constexpr,
    ZEROS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Two tiles [N, R] of the `rows` [R] of x [.., STRIDE]: of a PAIR of matrices, gate and up, or twice of one.

    w [.., WIDTH bytes], scales and zeros point to their slot's. Of a pair the second lies below the first, or their
    rows alternate.
    """
    BYTE: tl.constexpr = 1 if FORM < MXFP4 else 2  # codes in one
    BLOCKS: tl.constexpr = (IN + SCALE_COLUMNS - 1) // SCALE_COLUMNS
    STEP: tl.constexpr = 2 if ALTERNATING else 1
    SECOND: tl.constexpr = 1 if ALTERNATING else OUT
    SECOND_SCALE: tl.constexpr = 1 if ALTERNATING else (OUT + SCALE_ROWS - 1) // SCALE_ROWS
    SECOND_ZERO: tl.constexpr = (OUT + 7) // 8
    MASKED: tl.constexpr = IN % K != 0 or OUT % N != 0
    ONE_SCALE: tl.constexpr = SCALE_ROWS % N == 0 and OUT % N == 0
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    k = tl.arange(0, K)
    byte = tl.arange(0, K // BYTE)
    real_row = row < left
    real_n = n < OUT
    x_at = x + rows[:, None] * STRIDE + k[None, :]
    w_at = w + (n * STEP)[:, None] * WIDTH + byte[None, :]
    block = tl.arange(0, K // _MX_BLOCK)
    scale_at = scales + (column if ONE_SCALE else n) // SCALE_ROWS * BLOCKS
    mx_scale_at = scales + (n * STEP)[:, None] * BLOCKS + block[None, :]
    zero_at = zeros + n // 8 * BLOCKS
    shift = n % 8 * 4
    first = tl.zeros([N, R], tl.float32)
    second = tl.zeros([N, R], tl.float32)
    for start in range(0, IN, K):
        if IN % K == 0:
            values = tl.load(x_at, mask=real_row[:, None], other=0.0)
        else:
            values = tl.load(x_at, mask=real_row[:, None] & (k < IN - start)[None, :], other=0.0)
        real = real_n[:, None] & (byte * BYTE < IN - start)[None, :]
        at = start // SCALE_COLUMNS
        if FORM < MXFP4:
            value_scales = tl.zeros([R], tl.float32)
            if FORM == FP8_ROWS:
                value_scales = tl.load(
                    x_scales + rows * (STRIDE // 4) + (IN + 3) // 4 + start // K, mask=real_row, other=0.0
                )
            first = _add_float8(
                first, values, value_scales, w_at, scale_at + at, real, real_n, N, R, MASKED, ONE_SCALE, FORM
            )
            if PAIR:
                second = _add_float8(
                    second, values, value_scales, w_at + SECOND * WIDTH, scale_at + SECOND_SCALE * BLOCKS + at,
                    real, real_n, N, R, MASKED, ONE_SCALE, FORM,
                )  # fmt: skip
        else:
            even, odd = tl.split(tl.reshape(values, [R, K // 2, 2]))
            if FORM == MXFP4:
                real_scale = real_n[:, None] & (block * _MX_BLOCK < IN - start)[None, :]
                here = mx_scale_at + start // _MX_BLOCK
                first = _add_mxfp4(first, even, odd, w_at, here, real, real_scale, N, K, MASKED)
                if PAIR:
                    here += SECOND_SCALE * BLOCKS
                    second = _add_mxfp4(
                        second, even, odd, w_at + SECOND * WIDTH, here, real, real_scale, N, K, MASKED
                    )
            else:
                first = _add_int4(
                    first,
                    even,
                    odd,
                    w_at,
                    scale_at + at,
                    zero_at + at,
                    shift,
                    real,
                    real_n,
                    N,
                    R,
                    ZEROS,
                    MASKED,
                )
                if PAIR:
                    second = _add_int4(
                        second, even, odd, w_at + SECOND * WIDTH, scale_at + SECOND_SCALE * BLOCKS + at,
                        zero_at + SECOND_ZERO * BLOCKS + at, shift, real, real_n, N, R, ZEROS, MASKED,
                    )  # fmt: skip
        x_at += K
        w_at += K // BYTE
    return first, second


@jit
def store_row_codes(
    y: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    value: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """The codes of value [N, R] transposed, one group of the first `left` rows, and their scales (row_codes.py)."""
    n = column + tl.arange(0, N)
    real_row = tl.arange(0, R) < left
    value = tl.where((n < OUT)[:, None], value, 0.0)
    scale = scale_of(tl.max(tl.abs(value), axis=0))
    code = to_float8(tl.math.div_rn(value, tl.broadcast_to(scale[None, :], value.shape)))
    at = y + rows[:, None] * STRIDE + n[None, :]
    tl.store(at, tl.trans(code), mask=real_row[:, None] & (n < OUT)[None, :])
    tl.store(scales + rows * (STRIDE // 4) + FIRST + column // N, scale, mask=real_row)
