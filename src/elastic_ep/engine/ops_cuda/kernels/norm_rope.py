"""RMSNorm with the residual added; and what follows the qkv product: q/k norm, rotary embedding, KV cache write.

Both fuse what vLLM and SGLang fuse (fused_add_rms_norm; rope with set_kv_buffer), the q/k norm by head included. The
rotary embedding may be of a part of a head.
"""

from __future__ import annotations

import torch
import triton.language as tl

from elastic_ep.kernel import jit, power_of_2

_HEADS = 8
"""Heads of one program."""


@jit
def _add_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    total: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * H
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    value = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the norm is that of the sum as the next layer will read it
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / H + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + columns, (value * scale * gain).to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual in x's dtype, and that sum in the residual's dtype. Both [T, H].

    x and `residual` [T, H], contiguous; `weight` [H]. Without a residual the sum is x itself.
    """
    tokens, hidden = x.shape
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(residual)
    if tokens:
        block = power_of_2(hidden)
        _add_norm_kernel[(tokens,)](
            x,
            total if residual is None else residual,
            weight,
            normed,
            total,
            eps,
            H=hidden,
            BLOCK=block,
            ADD=residual is not None,
            num_warps=min(max(block // 512, 1), 8),
            enable_fp_fusion=False,
        )
    return normed, total


@jit
def _norm_rope_kernel(
    qkv: tl.tensor,
    norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    stride: tl.tensor,
    eps: tl.tensor,
    clip: tl.tensor,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    # A lane has two numbers of a head. The first ROTATED / 2 lanes have the pairs that are rotated.
    HALF: tl.constexpr = D // 2
    ROTATES: tl.constexpr = ROTATED // 2
    if INTERLEAVED:
        one = 2 * lane
        other = one + 1
    elif ROTATED == D:
        one = lane
        other = lane + HALF
    else:
        one = tl.where(lane < ROTATES, lane, 2 * lane)
        other = tl.where(lane < ROTATES, lane + ROTATES, 2 * lane + 1)
    inside = (head < HQ + 2 * HK) & (lane < HALF)
    source = qkv + token * stride + head * D
    low = tl.load(source + one, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + other, mask=inside, other=0.0).to(tl.float32)

    no_value = inside & (head < HQ + HK)
    rotates = no_value & (lane < ROTATES)
    position = tl.load(positions + token).to(tl.int64)
    angle = position * ROTATES + lane
    real = lane < ROTATES
    cosine = tl.load(cos + angle, mask=real, other=0.0)
    sine = tl.load(sin + angle, mask=real, other=0.0)
    first, second = low, high
    if NORM:
        scale = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / D + eps)[:, None]
        gain = norm + head * D
        first = low * scale * tl.load(gain + one, mask=no_value, other=0.0).to(tl.float32)
        second = high * scale * tl.load(gain + other, mask=no_value, other=0.0).to(tl.float32)
    if CLIP:
        first = tl.minimum(tl.maximum(first, -clip), clip)
        second = tl.minimum(tl.maximum(second, -clip), clip)
        low = tl.minimum(tl.maximum(low, -clip), clip)
        high = tl.minimum(tl.maximum(high, -clip), clip)
    if ROTATED < D:
        low = tl.where(no_value, first, low)
        high = tl.where(no_value, second, high)
    low = tl.where(rotates, first * cosine - second * sine, low)
    high = tl.where(rotates, second * cosine + first * sine, high)

    kind = q.dtype.element_ty
    is_query = inside & (head < HQ)
    target = q + (token * HQ + head) * D
    tl.store(target + one, low.to(kind), mask=is_query)
    tl.store(target + other, high.to(kind), mask=is_query)

    slot = tl.load(slots + token).to(tl.int64)
    kept = inside & (slot + 0 * lane >= 0)
    page = slot // PAGE
    within = slot % PAGE
    kind = keys.dtype.element_ty
    target = keys + ((page * HK + head - HQ) * PAGE + within) * D
    is_key = kept & (head >= HQ) & (head < HQ + HK)
    tl.store(target + one, low.to(kind), mask=is_key)
    tl.store(target + other, high.to(kind), mask=is_key)
    target = values + ((page * HK + head - HQ - HK) * PAGE + within) * D
    is_value = kept & (head >= HQ + HK)
    tl.store(target + one, low.to(kind), mask=is_value)
    tl.store(target + other, high.to(kind), mask=is_value)


def norm_rope_write(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    eps: float,
    clip: float | None = None,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """Queries [T, Hq, D], normed and rotated, in qkv's dtype. Writes keys (normed, rotated) and values to the cache.

    `qkv` [T, (Hq + 2 Hk) D], rows of any stride: queries, keys, values. `qk_norm` [Hq + Hk, D], None for no norm; after
    it all three are clamped to plus and minus `clip`, if given. `cos` and `sin` [positions, R/2] float32, contiguous: the
    first R numbers of a head are rotated, in pairs (i, i + R/2), or (2i, 2i + 1) if `interleaved`, and stay in place.
    `positions` [T], an integer type, each within the tables (padding too). `keys` and `values` [pages, Hk, page size, D],
    contiguous. `slot_mapping` [T] int64: page * page size + place in
    the page, or -1 to write nothing.
    """
    tokens = qkv.shape[0]
    _, kv_heads, page, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    if tokens:
        groups = -(-(heads + 2 * kv_heads) // _HEADS)
        _norm_rope_kernel[(tokens, groups)](
            qkv,
            cos if qk_norm is None else qk_norm,
            cos,
            sin,
            positions,
            slot_mapping,
            q,
            keys,
            values,
            qkv.stride(0),
            eps,
            0.0 if clip is None else clip,
            HQ=heads,
            HK=kv_heads,
            D=dim,
            PAGE=page,
            BLOCK=power_of_2(dim // 2),
            HEADS=_HEADS,
            ROTATED=2 * cos.shape[1],
            INTERLEAVED=interleaved,
            NORM=qk_norm is not None,
            CLIP=clip is not None,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return q
