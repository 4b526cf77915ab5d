"""Experts of random codes, in any format, as kernels take them; and what their matrices are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elastic_ep.engine.ops_cuda.kernels.expert_ffn import Scaled
from elastic_ep.models.formats import Format, Mxfp4, Need
from elastic_ep.models.spec import Stacked
from elastic_ep.weights.bank import DTYPES
from elastic_ep.weights.dequantise import dequantised

Shape = tuple[int, int]
"""[out, in]"""


def scaled(
    format: Format,
    pieces: Sequence[Shape],
    slots: int,
    device: torch.device,
    *,
    alternating: bool = False,
) -> Scaled:
    """Of `slots` slots, matrices of which each has such `pieces`: one below the other, or row by row."""
    roles = zip(*(_needs(format, piece) for piece in pieces), strict=True)
    made = {needs[0].role: _stacked(needs, slots, device, alternating) for needs in roles}
    return Scaled(made["codes"], made["scales"], format, made.get("zeros"), alternating)


def matrix(of: Scaled, slot: int, pieces: Sequence[Shape]) -> torch.Tensor:
    """[in, out] float64, the pieces side by side."""
    sides: list[torch.Tensor] = []
    names = ("codes", "scales", "zeros")
    for index, shape in enumerate(pieces):
        parts = {}
        for name, whole in zip(names, (of.codes, of.scales, of.zeros), strict=True):
            if whole is not None:
                rows = whole[slot].view(torch.uint8)
                own = rows[index :: len(pieces)] if of.alternating else rows.chunk(len(pieces))[index]
                parts[name] = own.contiguous().view(whole.dtype)
        sides.append(dequantised(of.format, parts, shape).t().double())
    return torch.cat(sides, dim=1)


def _needs(format: Format, shape: Shape) -> tuple[Need, ...]:
    return format.needs("m", shape, Stacked("m", (1, *shape)) if format == Mxfp4() else None)


def _stacked(needs: Sequence[Need], slots: int, device: torch.device, alternating: bool) -> torch.Tensor:
    made = [_random(need, slots, device).view(torch.uint8) for need in needs]  # float8 knows no cat
    whole = torch.stack(made, dim=2).flatten(1, 2) if alternating else torch.cat(made, dim=1)
    return whole.view(DTYPES[needs[0].held])


def _random(need: Need, slots: int, device: torch.device) -> torch.Tensor:
    shape, dtype = (slots, *need.shape), DTYPES[need.held]
    if need.held == "F32":
        return (torch.rand(shape, device=device) + 0.5) / 64
    if need.role == "scales":
        return torch.randint(118, 126, shape, dtype=dtype, device=device)
    if dtype == torch.float8_e4m3fn:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)
    wide = *shape[:-1], shape[-1] * dtype.itemsize
    return torch.randint(256, wide, dtype=torch.uint8, device=device).view(dtype)
