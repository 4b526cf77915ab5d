"""Matrix products whose bits for a row do not depend on the batch.

cuBLAS picks its kernel, hence its order of summation, by shape: so every product runs on tiles of the same number of
rows, as engine/ops_cpu/layers.py does on the CPU. A decode's product reads its weights once and little else, whether
it has one row or a tile of them.
"""

from __future__ import annotations

import torch

TILE_ROWS = 64
"""The most rows for which a product's time is still that of reading the weights, on the GPUs that this is for."""


def linear(x: torch.Tensor, weight: torch.Tensor, tile: int) -> torch.Tensor:
    """x [R, in] @ weight [in, out] in their dtype, R a multiple of `tile`."""
    if x.shape[0] == tile:
        return torch.mm(x, weight)
    y = x.new_empty(x.shape[0], weight.shape[1])
    for start in range(0, x.shape[0], tile):
        torch.mm(x[start : start + tile], weight, out=y[start : start + tile])
    return y


def wide_linear(x: torch.Tensor, weight: torch.Tensor, tile: int) -> torch.Tensor:
    """Like `linear`, but the float32 sums come as they are: what is compared afterwards is not rounded before."""
    if x.dtype == torch.float32:
        return linear(x, weight, tile)
    rows = [_wide(x[start : start + tile], weight) for start in range(0, x.shape[0], tile)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _wide(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        return torch.mm(x, weight, out_dtype=torch.float32)
    return torch.mm(x.float(), weight.float())
