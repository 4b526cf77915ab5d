"""Row operations whose result for a row does not depend on the other rows.

A step's token rows are padded to whole tiles. A matrix product picks its kernel, hence its order of summation, by
shape: every product therefore runs on tiles of exactly `ROWS` rows, whatever the batch. tests/engine/test_invariance.py
holds the libraries underneath to it.
"""

from __future__ import annotations

import torch

ROWS = 8
"""Rows of a tile. Divides the exchange's tile. More would waste work: a rank decodes a handful of sequences."""


NARROW = 12
"""HAZARD: with fewer columns, products of MKL on AMD processors give a row other bits in another place of its tile."""


def padded(rows: int) -> int:
    """`rows` rounded up to whole tiles."""
    return -(-rows // ROWS) * ROWS


def widened(x: torch.Tensor) -> torch.Tensor:
    """`x` with zeros behind its last dimension, so that it may be the right side of a product."""
    missing = NARROW - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing > 0 else x


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [R, in] @ weight [in, out], R a multiple of `ROWS`."""
    rows, width = x.shape[0], weight.shape[1]
    if width < NARROW:
        return linear(x, widened(weight))[:, :width]
    if rows == ROWS:
        return torch.mm(x, weight)
    y = x.new_empty(rows, width)
    for start in range(0, rows, ROWS):
        torch.mm(x[start : start + ROWS], weight, out=y[start : start + ROWS])
    return y


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) over the last dimension. `functional.rms_norm` takes twice as many operations."""

    def __init__(self, eps: float, device: torch.device) -> None:
        self._eps = torch.tensor(eps, device=device)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [..., D], `weight` broadcasts to it."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(weight)


def rotary_angles(head_dim: int, theta: float, max_len: int) -> torch.Tensor:
    """[max_len, head_dim / 2] float32: position times frequency."""
    # Angles grow to thousands, so a rounding here is a visible angle there: this is the order that the
    # checkpoint's own training code rounds in.
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    return torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies


class Rope:
    """Rotary position embeddings, the rotate-half form: pairs are (i, i + D/2)."""

    def __init__(self, head_dim: int, theta: float, max_len: int, device: torch.device) -> None:
        angles = rotary_angles(head_dim, theta, max_len)
        self._half = head_dim // 2
        self.cosines = torch.cat((angles.cos(), angles.cos()), dim=-1).to(device)
        self.sines = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(device)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines for positions [T]: two [T, 1, D]. Once a step, for all layers."""
        cosines, sines = (table.index_select(0, positions) for table in (self.cosines, self.sines))
        return cosines.unsqueeze(1), sines.unsqueeze(1)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [T, heads, D], cos and sin from `at`."""
        return torch.addcmul(x * cos, torch.roll(x, self._half, -1), sin)
