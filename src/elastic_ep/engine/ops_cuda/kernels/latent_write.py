"""What latent attention keeps of a token: its normed latent and the rotated end of its key; and that end of its queries.

Fused as q/k norm, rotary embedding and KV cache write are in norm_rope.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elastic_ep.kernel import jit, power_of_2

_HEADS = 16
"""Heads of one program."""


@jit
def _turn(
    source: tl.tensor,
    target: tl.tensor,
    one: tl.tensor,
    other: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    mask: tl.tensor,
) -> None:
    low = tl.load(source + one, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + other, mask=mask, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target + one, (low * cosine - high * sine).to(kind), mask=mask)
    tl.store(target + other, (high * cosine + low * sine).to(kind), mask=mask)


@jit
def _latent_write_kernel(
    made: tl.tensor,
    norm: tl.tensor,
    q: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    latents: tl.tensor,
    seen: tl.tensor,
    made_row: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    eps: tl.tensor,
    HQ: tl.constexpr,
    KV: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = ROPE // 2
    lane = tl.arange(0, BLOCK)[None, :]
    if INTERLEAVED:
        one = 2 * lane
        other = one + 1
    else:
        one = lane
        other = lane + HALF
    inside = lane < HALF
    angle = tl.load(positions + token).to(tl.int64) * HALF + lane
    cosine = tl.load(cos + angle, mask=inside, other=0.0)
    sine = tl.load(sin + angle, mask=inside, other=0.0)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    target = seen + (token * HQ + head) * (KV + ROPE) + KV
    _turn(q + token * q_row + head * q_head, target, one, other, cosine, sine, inside & (head < HQ))
    slot = tl.load(slots + token).to(tl.int64)
    if (tl.program_id(1) == 0) & (slot >= 0):
        column = tl.arange(0, BLOCK_KV)
        there = column < KV
        source = made + token * made_row
        place = latents + slot * (KV + ROPE)
        value = tl.load(source + column, mask=there, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / KV + eps)
        gain = tl.load(norm + column, mask=there, other=0.0).to(tl.float32)
        tl.store(place + column, (value * scale * gain).to(latents.dtype.element_ty), mask=there)
        _turn(source + KV, place + KV, one, other, cosine, sine, inside)


def latent_write(
    made: torch.Tensor,
    norm: torch.Tensor,
    q: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    latents: torch.Tensor,
    seen: torch.Tensor,
    eps: float,
    *,
    interleaved: bool = False,
) -> None:
    """Of T tokens: `made` [T, rank + rope], rows of any stride, the first `rank` normed by `norm` [rank], the others
    rotated, goes to `latents` [pages, page size, rank + rope]; `q` [T, Hq, rope], rotated, to the ends of `seen`
    [T, Hq, rank + rope].

    `latents` and `seen` are contiguous, the numbers of a head of `q` lie side by side. The other arguments are those of
    `norm_rope_write`; all of a head of `q` is rotated.
    """
    tokens, heads, rope = q.shape
    rank = len(norm)
    if tokens:
        _latent_write_kernel[(tokens, triton.cdiv(heads, _HEADS))](
            made,
            norm,
            q,
            cos,
            sin,
            positions,
            slot_mapping,
            latents,
            seen,
            made.stride(0),
            q.stride(0),
            q.stride(1),
            eps,
            HQ=heads,
            KV=rank,
            ROPE=rope,
            BLOCK_KV=power_of_2(rank),
            BLOCK=power_of_2(rope // 2),
            HEADS=_HEADS,
            INTERLEAVED=interleaved,
            num_warps=4,
            enable_fp_fusion=False,
        )
