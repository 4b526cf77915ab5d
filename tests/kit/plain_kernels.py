"""What the kernels compute, in plain torch: the same signatures, any device, in the dtype of the inputs.

Given float64 they are the exact answer that the tests measure the kernels against. Nothing here is fast.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from elastic_ep.models.spec import SOFTMAX_GATE, Clamped, Gate, GroupScores, Scores, Window


def gate(
    logits: torch.Tensor,
    physical_of: torch.Tensor,
    top_k: int,
    *,
    renormalise: bool,
    num_tokens: torch.Tensor | None = None,
    kind: Gate = SOFTMAX_GATE,
    correction: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `gate.gate`; the weights come in the dtype of `logits`."""
    real = len(logits) if num_tokens is None else int(num_tokens.item())
    scores = torch.sigmoid(logits) if kind.scores is Scores.SIGMOID else torch.softmax(logits, dim=-1)
    ranked = scores if correction is None else scores + correction
    if kind.groups > 1:
        two = kind.group_scores is GroupScores.TWO_HIGHEST
        grouped = ranked.unflatten(-1, (kind.groups, -1))
        totals = grouped.topk(2 if two else 1, dim=-1).values.sum(dim=-1)
        left = totals.sort(dim=-1, descending=True, stable=True).indices[:, kind.top_groups :]
        ranked = grouped.index_put(
            (torch.arange(len(left), device=left.device)[:, None], left),
            torch.tensor(-torch.inf if two else 0.0, dtype=grouped.dtype, device=left.device),
        ).flatten(1)
    logical = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, logical)
    if kind.scores is Scores.SOFTMAX_OF_CHOSEN:
        weights = torch.softmax(logits.gather(1, logical), dim=-1)
    elif renormalise:
        weights /= (weights.sum(dim=-1, keepdim=True) + kind.added_to_sum).clamp(min=kind.least_sum)
    weights *= kind.factor
    physical = physical_of[logical]
    physical[real:] = -1
    weights[real:] = 0
    return physical, weights


def expert_ffn(
    packed: torch.Tensor,
    counts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    activation: Clamped | None = None,
    *,
    rows_too: bool = False,
) -> torch.Tensor:
    """See `expert_ffn.expert_ffn`; rows beyond the counts are zero. `rows_too`: they become codes before each product."""
    coded = coded_rows if rows_too else torch.Tensor.clone
    y = torch.zeros_like(packed)
    for slot, count in enumerate(counts.tolist()):
        both = coded(packed[slot, :count]) @ gate_up[slot]
        if biases is not None:
            both = both + biases[0][slot]
        y[slot, :count] = coded(activated(both, activation)) @ down[slot]
        if biases is not None:
            y[slot, :count] += biases[1][slot]
    return y


def coded_rows(x: torch.Tensor) -> torch.Tensor:
    """See `row_codes.py`: what the codes of rows come to, in the dtype of `x`."""
    made = []
    for group in x.float().split(128, dim=-1):
        scale = group.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
        made.append((group / scale).to(torch.float8_e4m3fn).double() * scale)
    return torch.cat(made, dim=-1).to(x.dtype)


def activated(both: torch.Tensor, activation: Clamped | None) -> torch.Tensor:
    """Of gate and up side by side."""
    gated, up = both.chunk(2, dim=-1)
    if activation is None:
        return functional.silu(gated) * up
    gated = gated.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return gated * torch.sigmoid(activation.alpha * gated) * (up + 1)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `norm_rope.add_rms_norm`."""
    total = x if residual is None else x + residual
    normed = total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps) * weight
    return normed, total


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
    """See `norm_rope.norm_rope_write`."""
    _, kv_heads, page, dim = keys.shape
    rows = qkv.view(len(qkv), -1, dim)
    heads = rows.shape[1] - 2 * kv_heads
    qk, v = rows[:, : heads + kv_heads], rows[:, heads + kv_heads :]
    if qk_norm is not None:
        qk = qk * torch.rsqrt(qk.square().mean(dim=-1, keepdim=True) + eps) * qk_norm
    if clip is not None:
        qk, v = qk.clamp(-clip, clip), v.clamp(-clip, clip)
    rotated, rest = qk.split([2 * cos.shape[1], dim - 2 * cos.shape[1]], dim=-1)
    low, high = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    c, s = cos[positions].unsqueeze(1).to(qk), sin[positions].unsqueeze(1).to(qk)
    turned = low * c - high * s, high * c + low * s
    pairs = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    qk = torch.cat((pairs, rest), dim=-1)
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            keys[slot // page, :, slot % page] = qk[token, heads:]
            values[slot // page, :, slot % page] = v[token]
    return qk[:, :heads].contiguous()


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    window: Window | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `prefill_attention.prefill_attention`; rows that belong to no sequence are zero."""
    _, kv_heads, page, dim = keys.shape
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    for row, length in enumerate(context_lens.tolist()):
        first, end = bounds[row], bounds[row + 1]
        if first == end:
            continue
        pages = block_tables[row, : -(-length // page)].long()
        k, v = (
            cache[pages].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :length] for cache in (keys, values)
        )
        mine = q[first:end].view(end - first, kv_heads, -1, dim)
        scores = torch.einsum("thgd,hkd->hgtk", mine, k) * dim**-0.5
        position = torch.arange(length - (end - first), length, device=q.device)
        key = torch.arange(length, device=q.device)
        hidden = key > position[:, None]
        if window is not None:
            chunks = key // window.size < position[:, None] // window.size
            hidden |= chunks if window.chunked else key <= position[:, None] - window.size
        scores = scores.masked_fill(hidden, -float("inf"))
        if sinks is not None:
            sunk = sinks.to(q).view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sunk), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :length]
        out[first:end] = torch.einsum("hgtk,hkd->thgd", weights, v).reshape(end - first, -1, dim)
    return out


def by_head(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See `by_head.by_head`."""
    made = torch.einsum("rhi,hio->rho", x, w)
    return made if out is None else out.copy_(made)


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
    """See `latent_write.latent_write`."""
    rank, page = len(norm), latents.shape[1]
    latent, key = made[:, :rank], made[:, None, rank:]
    normed = latent * torch.rsqrt(latent.square().mean(dim=-1, keepdim=True) + eps) * norm
    c, s = cos[positions].unsqueeze(1).to(made), sin[positions].unsqueeze(1).to(made)

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        pairs = low * c - high * s, high * c + low * s
        return torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)

    seen[..., rank:] = turned(q)
    whole = torch.cat((normed, turned(key)[:, 0]), dim=-1)
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            latents[slot // page, slot % page] = whole[token]


def latent_attention(
    q: torch.Tensor,
    latents: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    rank: int,
    scale: float,
) -> torch.Tensor:
    """See `latent_attention.latent_prefill`; rows that belong to no sequence are zero."""
    keys = latents.unsqueeze(1)
    wide = q * (scale * q.shape[-1] ** 0.5)
    return paged_attention(wide, keys, keys, block_tables, cu_seqlens, context_lens)[..., :rank].contiguous()
