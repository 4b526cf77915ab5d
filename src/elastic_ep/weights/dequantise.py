"""The numbers that a checkpoint's codes and scales come to: float32, the one place where that is computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from elastic_ep.models.formats import Format, Fp8, Int4, Mxfp4, Plain

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_INT4_ZERO = 8


def dequantised(format: Format, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """`parts` by the roles that the format gives them: `shape`, [out, in] where it is quantised."""
    match format:
        case Plain():
            return parts["values"]
        case Fp8():
            return parts["codes"].float() * _spread(parts["scales"], shape, format.rows, format.columns)
        case Int4():
            return _int4(format, parts, shape)
        case Mxfp4():
            return _mxfp4(parts["codes"], parts["scales"])
    raise ValueError(f"a format that is not known: {format}")


def _spread(scales: torch.Tensor, shape: tuple[int, ...], rows: int, columns: int) -> torch.Tensor:
    """A scale for each number: the last block of a row or column is as long as the matrix lets it."""
    wide = scales.repeat_interleave(columns or shape[1], dim=1)[:, : shape[1]]
    return wide.repeat_interleave(rows or shape[0], dim=0)[: shape[0]]


def _int4(format: Int4, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    codes = _nibbles(parts["codes"])[:, : shape[1]]
    scales = _spread(parts["scales"], shape, 1, format.group)
    if not format.zero_points:
        return (codes - _INT4_ZERO).float() * scales
    zeros = _nibbles(parts["zeros"].t()).t()[: shape[0]]
    return (codes - _spread(zeros, shape, 1, format.group)).float() * scales


def _mxfp4(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([*_E2M1, *(-one for one in _E2M1)], device=codes.device)
    # A number has half a byte, and each exponent is for 32 of them.
    numbers = table[_nibbles(codes).int()].view(*exponents.shape, -1)
    return (numbers * exponents.view(torch.float8_e8m0fnu).float().unsqueeze(-1)).flatten(1)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Half bytes of rows of integers, the lowest bits first: int8 from 0 to 15."""
    data = packed.reshape(-1).view(torch.uint8).view(len(packed), -1)
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1).to(torch.int8)
