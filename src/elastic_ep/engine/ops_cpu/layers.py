"""Row operations whose result for a row does not depend on the other rows.

A step's token rows are padded to whole tiles. A matrix product picks its kernel, hence its order of summation, by
shape: every product therefore runs on tiles of exactly `ROWS` rows, whatever the batch. tests/engine/test_invariance.py
holds the libraries underneath to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from elastic_ep.engine.rotary import rotary_table
from elastic_ep.models.spec import Rotary

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


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [R, in] @ weight [in, out] + bias [out], R a multiple of `ROWS`."""
    y = _product(x, weight)
    return y if bias is None else y + bias


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows, width = x.shape[0], weight.shape[1]
    if width < NARROW:
        return _product(x, widened(weight))[:, :width]
    if rows == ROWS:
        return torch.mm(x, weight)
    y = x.new_empty(rows, width)
    for start in range(0, rows, ROWS):
        torch.mm(x[start : start + ROWS], weight, out=y[start : start + ROWS])
    return y


def by_head(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x [R, heads, in] @ weights [heads, in, out], a matrix for each head: [R, heads, out]. R a multiple of `ROWS`."""
    rows, heads, _ = x.shape
    width = weights.shape[2]
    if width < NARROW:
        return by_head(x, widened(weights))[..., :width]
    tiles = x.view(-1, ROWS, heads, x.shape[2]).transpose(1, 2)
    return (
        torch.stack([torch.bmm(tile, weights) for tile in tiles]).transpose(1, 2).reshape(rows, heads, width)
    )


_VECTORS = 32
"""Elements that torch computes at a time, on any processor."""


def by_element(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function` of each element.

    HAZARD: of a row of elements in memory torch computes those at its end, which fill no vector, with other
    instructions; of exponentials their bits differ. So all elements are one row, and its end is nobody's.
    """
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % _VECTORS))
    return function(flat)[: x.numel()].view(x.shape)


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) over the last dimension. `functional.rms_norm` takes twice as many operations."""

    def __init__(self, eps: float, device: torch.device) -> None:
        self._eps = torch.tensor(eps, device=device)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """x [..., D], `weight`, if there is one, broadcasts to it."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        normed = x * scale
        return normed if weight is None else normed.mul_(weight)


class LayerNorm:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""

    def __init__(self, eps: float) -> None:
        self._eps = eps

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, self._eps)


class Rope:
    """Rotary position embeddings. Interleaved pairs come out as halves, of queries and keys alike."""

    def __init__(self, rotary: Rotary, max_len: int, device: torch.device) -> None:
        cosines, sines = rotary_table(rotary, max_len)
        self._dim = rotary.dim
        self._half = rotary.dim // 2
        self._interleaved = rotary.interleaved
        self.cosines = torch.cat((cosines, cosines), dim=-1).to(device)
        self.sines = torch.cat((-sines, sines), dim=-1).to(device)

    def at(self, positions: torch.Tensor) -> Rotation:
        """Cosines and signed sines for positions [T]: two [T, 1, dim]. Once a step, for all layers."""
        cosines, sines = (table.index_select(0, positions) for table in (self.cosines, self.sines))
        return cosines.unsqueeze(1), sines.unsqueeze(1)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [T, heads, D], cos and sin from `at`."""
        rest = x[..., self._dim :]
        if rest.shape[-1]:
            return torch.cat((self.rotate(x[..., : self._dim], cos, sin), rest), dim=-1)
        if self._interleaved:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return torch.addcmul(x * cos, torch.roll(x, self._half, -1), sin)


Rotation = tuple[torch.Tensor, torch.Tensor]
