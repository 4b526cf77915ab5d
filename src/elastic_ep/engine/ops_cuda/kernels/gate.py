"""The gate in one pass: softmax or sigmoid, the best groups, top-k, renormalise, logical to physical expert.

What it computes is said by engine/ops_cpu/gate.py, which does so step by step. One program, of one warp, a row: all of
its reductions stay within the warp. The idea of fusing the chain is that of vLLM's and TensorRT-LLM's top-k-softmax
kernels; the table of physical experts is EPLB's (DeepSeek).
"""

from __future__ import annotations

import torch
import triton.language as tl

from elastic_ep.kernel import jit, power_of_2
from elastic_ep.models.spec import SOFTMAX_GATE, Gate, GroupScores, Moe, Scores

MAX_EXPERTS = 512
MAX_TOP_K = 8
LARGE = tl.constexpr(1e30)


def has_gate(ffn: Moe) -> bool:
    """The kernel knows this gate."""
    known = ffn.gate.scores in (Scores.SOFTMAX, Scores.SOFTMAX_OF_CHOSEN, Scores.SIGMOID)
    return known and ffn.experts <= MAX_EXPERTS and ffn.top_k <= MAX_TOP_K


@jit
def _gate_kernel(
    logits: tl.tensor,
    correction: tl.tensor,
    physical_of: tl.tensor,
    num_tokens: tl.tensor,
    physical: tl.tensor,
    weights: tl.tensor,
    stride: tl.tensor,
    added: tl.tensor,
    least: tl.tensor,
    factor: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    LIMITED: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TWO: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    lanes = tl.arange(0, BLOCK_K)
    exists = experts < E
    score = tl.load(logits + row * stride + experts, mask=exists, other=-LARGE).to(tl.float32)
    # A poisoned step may bring NaN or infinities: they too must pick experts that exist, and each once.
    score = tl.where(score > -LARGE, tl.where(score < LARGE, score, LARGE), -LARGE)
    if SIGMOID:
        small = tl.exp(-tl.abs(score))
        score = tl.where(score < 0, small, 1.0) / (1.0 + small)
    else:
        score = tl.where(exists, tl.exp(score - tl.max(score, axis=0)), 0.0)
        score = score / tl.sum(score, axis=0)
    ranked = score
    if CORRECTED:
        ranked += tl.load(correction + experts, mask=exists, other=0.0)
    ranked = tl.where(exists, ranked, -float("inf"))
    if GROUPS > 1:
        ranked = _within_groups(ranked, E, BLOCK_E, GROUPS, TOP_GROUPS, TWO)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    weight = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(K):
        best, index = tl.max(ranked, axis=0, return_indices=True)
        if CORRECTED or GROUPS > 1:
            best = tl.sum(tl.where(experts == index, score, 0.0), axis=0)
        chosen = tl.where(lanes == k, index, chosen)
        weight = tl.where(lanes == k, best, weight)
        ranked = tl.where(experts == index, -float("inf"), ranked)
    if RENORMALISE:
        weight = weight / tl.maximum(tl.sum(weight, axis=0) + added, least)
    weight *= factor
    used = lanes < K
    copy = tl.load(physical_of + chosen, mask=used, other=-1)
    real = used
    if LIMITED:
        real = used & (row + 0 * lanes < tl.load(num_tokens))
    tl.store(physical + row * K + lanes, tl.where(real, copy, -1), mask=used)
    tl.store(weights + row * K + lanes, tl.where(real, weight, 0.0), mask=used)


@jit
def _within_groups(
    ranked: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TWO: tl.constexpr,
) -> tl.tensor:
    """The same, but for the groups that are not chosen from: see `GroupScores`, of which `TWO` says which."""
    NOTHING: tl.constexpr = -float("inf")
    experts = tl.arange(0, BLOCK_E)
    group_of = experts // (E // GROUPS)
    groups = tl.arange(0, GROUPS)
    totals = tl.full([GROUPS], NOTHING, tl.float32)
    for group in tl.static_range(GROUPS):
        own = tl.where(group_of == group, ranked, NOTHING)
        total, index = tl.max(own, axis=0, return_indices=True)
        if TWO:
            total += tl.max(tl.where(experts == index, NOTHING, own), axis=0)
        totals = tl.where(groups == group, total, totals)
    left = tl.where(experts < E, NOTHING if TWO else 0.0, NOTHING)
    for _ in tl.static_range(TOP_GROUPS):
        _, index = tl.max(totals, axis=0, return_indices=True)
        left = tl.where(group_of == index, ranked, left)
        totals = tl.where(groups == index, NOTHING, totals)
    return left


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
    """Physical experts [T, K] int64 and their weights [T, K] float32, best first; of equals the lower logical one.

    `logits` [T, E], rows of any stride. `physical_of` [E] int64: the copy of each logical expert to send to, -1 for
    none: it comes out as -1 with its weight. `num_tokens` [1], int32 or int64: the rows from there on are padding and
    get -1 and 0. `kind` has softmax, of all or of the chosen, or sigmoid for scores; `correction` [E] float32, if it
    asks for one.

    Raises ValueError for more than `MAX_EXPERTS` experts or a `top_k` beyond `MAX_TOP_K` or the experts.
    """
    tokens, experts = logits.shape
    if experts > MAX_EXPERTS or not 0 < top_k <= min(MAX_TOP_K, experts):
        raise ValueError(f"no kernel for the top {top_k} of {experts} experts")
    physical = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        _gate_kernel[(tokens,)](
            logits,
            logits if correction is None else correction,
            physical_of,
            physical_of if num_tokens is None else num_tokens,
            physical,
            weights,
            logits.stride(0),
            kind.added_to_sum,
            kind.least_sum,
            kind.factor,
            E=experts,
            K=top_k,
            BLOCK_E=power_of_2(experts),
            BLOCK_K=power_of_2(top_k),
            # The softmax of the chosen is what all have of it, over their sum.
            RENORMALISE=renormalise or kind.scores is Scores.SOFTMAX_OF_CHOSEN,
            LIMITED=num_tokens is not None,
            SIGMOID=kind.scores is Scores.SIGMOID,
            CORRECTED=correction is not None,
            GROUPS=kind.groups,
            TOP_GROUPS=kind.top_groups,
            TWO=kind.group_scores is GroupScores.TWO_HIGHEST,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return physical, weights
