"""Experts of random codes, in any format, as kernels take them; and what their matrices are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elastic_ep.engine.ops_cuda.kernels.expert_ffn import Scaled
from elastic_ep.models.formats import Format, Mxfp4, Need
from elastic_ep.models.spec import Stacked
from elastic_ep.weights.arranged import INT_PLACES, MX_PLACES, arranged, is_arranged
from elastic_ep.weights.bank import DTYPES
from elastic_ep.weights.dequantise import dequantised

Shape = tuple[int, int]
"""[out, in]"""


def scaled(format: Format, pieces: Sequence[Shape], slots: int, device: torch.device) -> Scaled:
    """Of `slots` slots, matrices of which each has such `pieces`, one below the other."""
    roles = zip(*(_needs(format, piece) for piece in pieces), strict=True)
    made = {needs[0].role: _stacked(format, needs, slots, device) for needs in roles}
    return Scaled(made["codes"], made["scales"], format, made.get("zeros"))


def matrix(of: Scaled, slot: int, pieces: Sequence[Shape]) -> torch.Tensor:
    """[in, out] float64, the pieces side by side."""
    sides: list[torch.Tensor] = []
    names = ("codes", "scales", "zeros")
    for index, shape in enumerate(pieces):
        parts = {}
        for name, whole in zip(names, (of.codes, of.scales, of.zeros), strict=True):
            if whole is not None:
                own = whole[slot].view(torch.uint8).chunk(len(pieces))[index].contiguous().view(whole.dtype)
                parts[name] = as_stored(of.format, name, own)
        sides.append(dequantised(of.format, parts, shape).t().double())
    return torch.cat(sides, dim=1)


def as_stored(format: Format, role: str, of_one: torch.Tensor) -> torch.Tensor:
    """What became `of_one` when it was arranged."""
    if not is_arranged(format) or role == "zeros":
        return of_one
    if role == "scales":
        return of_one.view(of_one.shape[1], of_one.shape[0]).t().contiguous()
    words = of_one.view(torch.int32).view(-1, len(of_one), 4).transpose(0, 1).long()
    codes = torch.zeros(*words.shape[:2], 4, 4, 2, dtype=torch.uint8, device=of_one.device)
    for index, (sign, rest) in enumerate(MX_PLACES if format == Mxfp4() else INT_PLACES):
        for half in range(2):
            first, others = words >> (sign + 16 * half) & 1, words >> (rest + 16 * half) & 7
            codes[:, :, index, :, half] = (first * 8 + others).to(torch.uint8)
    pairs = codes.view(len(of_one), -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).view(of_one.dtype)


def _needs(format: Format, shape: Shape) -> tuple[Need, ...]:
    return format.needs("m", shape, Stacked("m", (1, *shape)) if format == Mxfp4() else None)


def _stacked(format: Format, needs: Sequence[Need], slots: int, device: torch.device) -> torch.Tensor:
    made = [_random(need, slots, device) for need in needs]
    for need, one in zip(needs, made, strict=True):
        if is_arranged(format) and device.type != "meta":
            for slot in one:
                slot.copy_(arranged(format, need.role, slot))
    whole = torch.cat([one.view(torch.uint8) for one in made], dim=1)  # float8 knows no cat
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
