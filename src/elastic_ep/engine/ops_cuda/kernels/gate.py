"""The gate in one pass: softmax, top-k, renormalise, logical to physical expert.

One program, of one warp, a row: all of its reductions stay within the warp. The idea of fusing the chain is that of
vLLM's and TensorRT-LLM's top-k-softmax kernels; the table of physical experts is EPLB's (DeepSeek).
"""

from __future__ import annotations

import torch
import triton.language as tl

from elastic_ep.kernel import jit, power_of_2
from elastic_ep.models.spec import SOFTMAX_GATE, Moe

MAX_EXPERTS = 256
MAX_TOP_K = 8
LARGE = tl.constexpr(1e30)


def has_gate(ffn: Moe) -> bool:
    """The kernel knows this gate."""
    return ffn.gate == SOFTMAX_GATE and ffn.experts <= MAX_EXPERTS and ffn.top_k <= MAX_TOP_K


@jit
def _gate_kernel(
    logits: tl.tensor,
    physical_of: tl.tensor,
    num_tokens: tl.tensor,
    physical: tl.tensor,
    weights: tl.tensor,
    stride: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    LIMITED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    lanes = tl.arange(0, BLOCK_K)
    exists = experts < E
    score = tl.load(logits + row * stride + experts, mask=exists, other=-LARGE).to(tl.float32)
    # A poisoned step may bring NaN or infinities: they too must pick experts that exist, and each once.
    score = tl.where(score > -LARGE, tl.where(score < LARGE, score, LARGE), -LARGE)
    score = tl.where(exists, tl.exp(score - tl.max(score, axis=0)), 0.0)
    score = tl.where(exists, score / tl.sum(score, axis=0), -1.0)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    weight = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(K):
        best, index = tl.max(score, axis=0, return_indices=True)
        chosen = tl.where(lanes == k, index, chosen)
        weight = tl.where(lanes == k, best, weight)
        score = tl.where(experts == index, -2.0, score)
    if RENORMALISE:
        weight = weight / tl.sum(weight, axis=0)
    used = lanes < K
    copy = tl.load(physical_of + chosen, mask=used, other=-1)
    real = used
    if LIMITED:
        real = used & (row + 0 * lanes < tl.load(num_tokens))
    tl.store(physical + row * K + lanes, tl.where(real, copy, -1), mask=used)
    tl.store(weights + row * K + lanes, tl.where(real, weight, 0.0), mask=used)


def gate(
    logits: torch.Tensor,
    physical_of: torch.Tensor,
    top_k: int,
    *,
    renormalise: bool,
    num_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Physical experts [T, K] int64 and their weights [T, K] float32, best first; of equals the lower logical one.

    `logits` [T, E], rows of any stride. `physical_of` [E] int64: the copy of each logical expert to send to, -1 for
    none: it comes out as -1 with its weight. `num_tokens` [1], int32 or int64: the rows from there on are padding and
    get -1 and 0.

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
            physical_of,
            physical_of if num_tokens is None else num_tokens,
            physical,
            weights,
            logits.stride(0),
            E=experts,
            K=top_k,
            BLOCK_E=power_of_2(experts),
            BLOCK_K=power_of_2(top_k),
            RENORMALISE=renormalise,
            LIMITED=num_tokens is not None,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return physical, weights
