"""Row operations whose result for a row does not depend on the other rows.

A step's token rows are padded to whole tiles. A matrix product picks its kernel, hence its order of summation, by
shape: every product therefore runs on tiles of exactly `TILE` rows, whatever the batch.
"""

from __future__ import annotations

import torch

from elastic_ep.exchange.base import TILE


def padded(rows: int) -> int:
    """`rows` rounded up to whole tiles."""
    return -(-rows // TILE) * TILE


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [R, in] @ weight [in, out], R a multiple of `TILE`."""
    rows = x.shape[0]
    if rows == TILE:
        return torch.mm(x, weight)
    y = x.new_empty(rows, weight.shape[1])
    for start in range(0, rows, TILE):
        torch.mm(x[start : start + TILE], weight, out=y[start : start + TILE])
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; `weight` broadcasts.

    From the vector norm, which is one pass over x: torch's own rms_norm costs twice as much on small rows.
    """
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, scale).mul_(weight)


class Rope:
    """Rotary position embeddings, the rotate-half form: pairs are (i, i + D/2)."""

    def __init__(self, head_dim: int, theta: float, max_len: int, device: torch.device) -> None:
        # Angles grow to thousands, so a rounding here is a visible angle there: this is the order that the
        # checkpoint's own training code rounds in.
        frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        angles = torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies
        self._half = head_dim // 2
        self._cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(device)
        self._sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(device)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines for positions [T]: two [T, 1, D]. Once a step, for all layers."""
        return self._cos.index_select(0, positions).unsqueeze(1), self._sin.index_select(
            0, positions
        ).unsqueeze(1)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [T, heads, D], cos and sin from `at`."""
        return torch.addcmul(x * cos, torch.roll(x, self._half, -1), sin)
