"""One tile of the experts' products where weights are codes [out, in] and scales: see expert_ffn.py and expert_tiles.py.

A step of the sum over k has one length, whatever the tiles are: what it comes to is multiplied by its scale, in
float32, or its codes have been. Codes of four bits lie as weights/arranged.py says: each thread makes of its words what
a tensor core wants of it, in registers. That takes about two instructions a number, so it costs less than reading
bfloat16 would; the compiler finds the layouts backwards from the product.
"""

from __future__ import annotations

import triton.language as tl

from elastic_ep.engine.ops_cuda.kernels.row_codes import scale_of
from elastic_ep.kernel import INTERPRETED, dot, jit, to_float8

FP8 = tl.constexpr(1)
"""Codes in float8 become numbers as rows are, which is exact."""
FP8_ROWS = tl.constexpr(2)
"""Rows are codes as well (row_codes.py), and a step is a group of theirs."""
MXFP4 = tl.constexpr(3)
INT4 = tl.constexpr(4)

_BLOCK = tl.constexpr(32)


@jit
def _load(at: tl.tensor, real: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    return tl.load(at, mask=real, other=0.0) if MASKED else tl.load(at)


@jit
def _two(words: tl.tensor, by: tl.tensor, SCALED: tl.constexpr) -> tl.tensor:
    """Two bfloat16 of each word, its lower half's and its upper half's: multiplied by those of `by`, or less those."""
    if INTERPRETED:
        low, high = _widened(words)
        by_low, by_high = _widened(by)
        if SCALED:
            return (low * by_low).to(tl.bfloat16), (high * by_high).to(tl.bfloat16)
        return (low - by_low).to(tl.bfloat16), (high - by_high).to(tl.bfloat16)
    if SCALED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 two; mul.rn.bf16x2 two, $2, $3; mov.b32 {$0, $1}, two; }",
            "=h,=h,r,r", [words, by], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        "{ .reg .b32 two; sub.rn.bf16x2 two, $2, $3; mov.b32 {$0, $1}, two; }",
        "=h,=h,r,r", [words, by], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
    )  # fmt: skip


@jit
def _widened(words: tl.tensor) -> tl.tensor:
    """float32 of the two bfloat16 in each word."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -0x10000).to(tl.float32, bitcast=True)


@jit
def _mx_halves(words: tl.tensor, CODE: tl.constexpr) -> tl.tensor:
    """Two codes of a word where bfloat16 have their bits: numbers that are 2 ** 126 times smaller."""
    SIGNS: tl.constexpr = -0x7FFF8000  # 0x80008000
    OTHERS: tl.constexpr = 0x01C001C0
    if CODE == 0:
        return words & (SIGNS | OTHERS)
    if CODE == 1:
        return (words << 3) & (SIGNS | OTHERS)
    if CODE == 2:
        return ((words << 2) & SIGNS) | ((words << 6) & OTHERS)
    return ((words << 1) & SIGNS) | ((words >> 3) & OTHERS)


@jit
def _half_bytes(
    words: tl.tensor, by: tl.tensor, N: tl.constexpr, K: tl.constexpr, SCALED: tl.constexpr
) -> tl.tensor:
    """bfloat16 [N, K] of words [N, K / 8] as weights/arranged.py has them; `by` [N, K / 32], of which each block's
    numbers are multiples in e2m1, or that are taken from its integers, which then are 128 larger."""
    words = tl.reshape(words, [N, K // _BLOCK, 4])
    by = tl.broadcast_to(by[:, :, None], [N, K // _BLOCK, 4])
    if SCALED:
        a, b = _two(_mx_halves(words, 0), by, True)
        c, d = _two(_mx_halves(words, 1), by, True)
        e, f = _two(_mx_halves(words, 2), by, True)
        g, h = _two(_mx_halves(words, 3), by, True)
    else:
        a, b = _two((words & 0xF000F) | 0x43004300, by, False)
        c, d = _two(((words >> 4) & 0xF000F) | 0x43004300, by, False)
        e, f = _two(((words >> 8) & 0xF000F) | 0x43004300, by, False)
        g, h = _two(((words >> 12) & 0xF000F) | 0x43004300, by, False)
    made = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
    # [N, blocks, word, half, code's lower bit, its higher one]
    return tl.reshape(tl.permute(made, (0, 1, 5, 4, 2, 3)), [N, K])


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
    values: tl.tensor,
    w_at: tl.tensor,
    exponents: tl.tensor,
    real: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """`exponents` [K / 32, N]. A scale times 2 ** 126, as two bfloat16 of a word."""
    words = _load(w_at, real, MASKED)
    scales = tl.trans((exponents.to(tl.int32) + 126) * 0x00800080)
    weights = _half_bytes(words, scales, N, K, True).to(values.dtype)
    return dot(weights, tl.trans(values), total)


@jit
def _exponents(at: tl.tensor, real_n: tl.tensor, left: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """[K / 32, N] of a step with `left` columns to come, if there is one."""
    block = tl.arange(0, K // _BLOCK)
    return tl.load(at, mask=real_n[None, :] & (block * _BLOCK < left)[:, None], other=0)


@jit
def _add_int4(
    total: tl.tensor,
    values: tl.tensor,
    w_at: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    real: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """`scale` and `zero` [N]."""
    words = _load(w_at, real, MASKED)
    zeros = tl.broadcast_to((zero * 0x00010001 + 0x43004300)[:, None], [N, K // _BLOCK])
    weights = _half_bytes(words, zeros, N, K, False).to(values.dtype)
    part = dot(weights, tl.trans(values), tl.zeros([N, R], tl.float32))
    return total + part * scale[:, None]


@jit
def _int4_scales(
    scales: tl.tensor,
    zeros: tl.tensor,
    n: tl.tensor,
    block: tl.tensor,
    real: tl.tensor,
    OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    ZEROS: tl.constexpr,
) -> tl.tensor:
    """Of the rows n of a matrix, for the group `block`: scale and zero point."""
    scale = tl.load(scales + block * OUT + n, mask=real, other=0.0)
    if ZEROS:
        packed = tl.load(zeros + n // 8 * BLOCKS + block, mask=real, other=0)
        return scale, (packed >> (n % 8 * 4)) & 15
    return scale, tl.full(n.shape, 8, tl.int32)


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
    FORM: tl.constexpr,
    ZEROS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Two tiles [N, R] of the `rows` [R] of x [.., STRIDE]: of a PAIR of matrices, gate and up, or twice of one.

    w [.., WIDTH], scales and zeros point to their slot's. Of a pair the second lies below the first.
    """
    BLOCKS: tl.constexpr = (IN + SCALE_COLUMNS - 1) // SCALE_COLUMNS
    CODES: tl.constexpr = 1 if FORM < MXFP4 else 8  # of an element of w
    STEP: tl.constexpr = K // CODES
    MASKED: tl.constexpr = IN % K != 0 or OUT % N != 0
    ONE_SCALE: tl.constexpr = SCALE_ROWS % N == 0 and OUT % N == 0
    # From the first of a pair to the second.
    MORE: tl.constexpr = OUT * WIDTH
    MORE_SCALES: tl.constexpr = (OUT + SCALE_ROWS - 1) // SCALE_ROWS * BLOCKS
    MORE_ZEROS: tl.constexpr = (OUT + 7) // 8 * BLOCKS
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    k = tl.arange(0, K)
    step = tl.arange(0, STEP)
    real_row = row < left
    real_n = n < OUT
    x_at = x + rows[:, None] * STRIDE + k[None, :]
    if FORM < MXFP4:
        w_at = w + n[:, None] * WIDTH + step[None, :]
    else:
        w_at = w + (step // 4 * OUT * 4 + step % 4)[None, :] + n[:, None] * 4
    scale_at = scales + (column if ONE_SCALE else n) // SCALE_ROWS * BLOCKS
    block = tl.arange(0, K // _BLOCK)
    mx_scale_at = scales + block[:, None] * OUT + n[None, :]
    first = tl.zeros([N, R], tl.float32)
    second = tl.zeros([N, R], tl.float32)
    scale, zero = tl.zeros([N], tl.float32), tl.zeros([N], tl.int32)
    scale_2, zero_2 = scale, zero
    # Scales of four bits are read a step ahead.
    if FORM == INT4:
        scale, zero = _int4_scales(scales, zeros, n, 0, real_n, OUT, BLOCKS, ZEROS)
        if PAIR:
            scale_2, zero_2 = _int4_scales(
                scales + MORE_SCALES, zeros + MORE_ZEROS, n, 0, real_n, OUT, BLOCKS, ZEROS
            )
    if FORM == MXFP4:
        scale = _exponents(mx_scale_at, real_n, IN, K)
        scale_2 = scale
        if PAIR:
            scale_2 = _exponents(mx_scale_at + MORE_SCALES, real_n, IN, K)
    for start in range(0, IN, K):
        if IN % K == 0:
            values = tl.load(x_at, mask=real_row[:, None], other=0.0)
        else:
            values = tl.load(x_at, mask=real_row[:, None] & (k < IN - start)[None, :], other=0.0)
        # Codes of a load are there or not all together.
        at_code = step * CODES if FORM < MXFP4 else step // 4 * _BLOCK
        real = real_n[:, None] & (at_code < IN - start)[None, :]
        if FORM < MXFP4:
            at = start // SCALE_COLUMNS
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
                    second, values, value_scales, w_at + MORE, scale_at + MORE_SCALES + at,
                    real, real_n, N, R, MASKED, ONE_SCALE, FORM,
                )  # fmt: skip
        elif FORM == MXFP4:
            mx_scale_at += K // _BLOCK * OUT
            next = _exponents(mx_scale_at, real_n, IN - start - K, K)
            first = _add_mxfp4(first, values, w_at, scale, real, N, K, MASKED)
            scale = next
            if PAIR:
                next = _exponents(mx_scale_at + MORE_SCALES, real_n, IN - start - K, K)
                second = _add_mxfp4(second, values, w_at + MORE, scale_2, real, N, K, MASKED)
                scale_2 = next
        else:
            at = (start + K) // SCALE_COLUMNS
            more = real_n & (start + K + tl.zeros([N], tl.int32) < IN)
            next, next_zero = _int4_scales(scales, zeros, n, at, more, OUT, BLOCKS, ZEROS)
            first = _add_int4(first, values, w_at, scale, zero, real, N, K, R, MASKED)
            scale, zero = next, next_zero
            if PAIR:
                next, next_zero = _int4_scales(
                    scales + MORE_SCALES, zeros + MORE_ZEROS, n, at, more, OUT, BLOCKS, ZEROS
                )
                second = _add_int4(second, values, w_at + MORE, scale_2, zero_2, real, N, K, R, MASKED)
                scale_2, zero_2 = next, next_zero
        x_at += K
        w_at += STEP if FORM < MXFP4 else STEP * OUT
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
