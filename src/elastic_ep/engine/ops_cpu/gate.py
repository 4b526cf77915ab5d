"""Which experts a token goes to, and with what weights: plain torch, row by row."""

from __future__ import annotations

import torch

from elastic_ep.engine.ops_cpu.layers import by_element
from elastic_ep.models.spec import Gate, GroupScores, Moe, Scores

Chosen = tuple[torch.Tensor, torch.Tensor]
"""Weights and logical experts, [R, K] each."""


def choose(logits: torch.Tensor, ffn: Moe, correction: torch.Tensor | None) -> Chosen:
    """Of logits [R, E], bias included; `correction` [E] if the gate has one."""
    gate = ffn.gate
    match gate.scores:
        case Scores.SPARSE_MIXER:
            return _sparse_mixer(logits, gate.jitter)
        case Scores.SOFTMAX_OF_CHOSEN:
            highest, logical = torch.topk(logits, ffn.top_k, dim=-1)
            return torch.softmax(highest, dim=-1), logical
        case Scores.SIGMOID_OF_CHOSEN:
            highest, logical = torch.topk(logits, ffn.top_k, dim=-1)
            return by_element(torch.sigmoid, highest), logical
        case Scores.SOFTMAX:
            scores = torch.softmax(logits, dim=-1)
        case Scores.SIGMOID:
            scores = by_element(torch.sigmoid, logits)
    ranked = scores if correction is None else scores + correction
    if gate.groups > 1:
        ranked = _within_groups(ranked, gate)
    weights, logical = torch.topk(ranked, ffn.top_k, dim=-1)
    if ranked is not scores:
        weights = scores.gather(1, logical)
    if ffn.renormalise:
        weights /= weights.sum(dim=-1, keepdim=True).add_(gate.added_to_sum).clamp_(min=gate.least_sum)
    return weights * gate.factor if gate.factor != 1 else weights, logical


def weighed(rows: torch.Tensor, weights: torch.Tensor) -> Chosen:
    """Rows [T, H] times their weights [T, 1], and the weights that are left: ones."""
    return (rows * weights).to(rows.dtype), torch.ones_like(weights)


def _within_groups(ranked: torch.Tensor, gate: Gate) -> torch.Tensor:
    """The same, but for the groups that are not chosen from."""
    grouped = ranked.unflatten(-1, (gate.groups, -1))
    if gate.group_scores is GroupScores.HIGHEST:
        totals, outside = grouped.max(dim=-1).values, 0.0
    else:
        totals, outside = grouped.topk(2, dim=-1).values.sum(dim=-1), -torch.inf
    kept = torch.topk(totals, gate.top_groups, dim=-1).indices
    hidden = torch.ones_like(totals, dtype=torch.bool).scatter_(1, kept, False)
    left: torch.Tensor = grouped.masked_fill(hidden.unsqueeze(-1), outside)
    return left.flatten(1)


def _sparse_mixer(logits: torch.Tensor, jitter: float) -> Chosen:
    """The best, then the best of the others: each weighs its share among the logits that come near it."""
    weights, experts = [], []
    left = logits
    for _ in range(2):
        best, index = left.max(dim=-1, keepdim=True)
        size = logits.abs().maximum(best)
        near = left.masked_fill((best - logits) / size > 2 * jitter, -torch.inf)
        weights.append(torch.softmax(near, dim=-1).gather(1, index))
        experts.append(index)
        left = left.scatter(1, index, -torch.inf)
    return torch.cat(weights, dim=-1), torch.cat(experts, dim=-1)
