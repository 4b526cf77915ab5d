"""How codes of four bits lie on a GPU: as its kernels take them in, so that two of them become numbers with few steps.

A row is cut into blocks of 32 columns, and a block is four words of 32 bits. A tensor core wants of each thread, for
16 columns, two neighbours and the two that lie eight further; so word t has the columns 16 c + 8 b + 2 t + a, for a, b
and c of 0 and 1. Its lower half has those with a = 0 and its upper half those with a = 1, each four codes, numbered
2 c + b: a shift and a mask bring one of each to where a pair of bfloat16 has its bits.

Blocks, and scales, lie by column first, then by row: neighbouring rows of a tile are read together. Rows of gate and up
that alternate lie one below the other. Nothing but the places of bits is changed.
"""

from __future__ import annotations

import torch

from elastic_ep.models.formats import MX_BLOCK, ROW_GROUP, Format, Fp8, Int4, Mxfp4

MX_PLACES = ((15, 6), (12, 3), (13, 0), (14, 9))
"""In half a word, of each of its four codes: where the sign is, and where the lowest of the other three bits is. The
first has its bits where a bfloat16 has them; the second gets there by one shift; the others by two."""
INT_PLACES = ((3, 0), (7, 4), (11, 8), (15, 12))
"""The same of integers: the highest bit, and the other three."""
MX_LARGEST = 128
"""Exponents above it, a factor of two, are refused: no bfloat16 is what their codes are multiplied by."""
_ROWS = 2048
"""At a time: what is made on the way is eight times as large as the codes."""


def is_arranged(format: Format) -> bool:
    return isinstance(format, Int4 | Mxfp4)


def arranged(format: Format, role: str, given: torch.Tensor, *, alternating: bool = False) -> torch.Tensor:
    """`given` [out, ...] of one matrix, or of gate and up that alternate; of the same shape and type.

    Raises ValueError for codes whose rows are no multiple of `MX_BLOCK` long, and for exponents above `MX_LARGEST`.
    """
    if not is_arranged(format) or role == "zeros":
        return given
    both = [given[::2], given[1::2]] if alternating else [given]
    if role == "codes":
        places = MX_PLACES if isinstance(format, Mxfp4) else INT_PLACES
        words = [torch.cat([_words(rows, places) for rows in one.split(_ROWS)], dim=1) for one in both]
        return torch.cat([one.flatten() for one in words]).view(given.dtype).view(given.shape)
    if isinstance(format, Mxfp4) and not given.is_meta and int(given.max()) > MX_LARGEST:
        raise ValueError(f"MXFP4 scales above 2 ** {MX_LARGEST - 127} are not computed on a GPU")
    return torch.cat([one.t().reshape(-1) for one in both]).view(given.shape)


def dense_scales(format: Fp8, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Of FP8 whose scales span a multiple of `ROW_GROUP` columns: [groups, out], one for each group of a row."""
    out, inner = shape
    groups = -(-inner // ROW_GROUP)
    wide = scales.float().repeat_interleave(format.columns // ROW_GROUP or groups, dim=1)[:, :groups]
    return wide.repeat_interleave(format.rows or out, dim=0)[:out].t()


def _words(rows: torch.Tensor, places: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """[in / 32, rows, 4] int32 of codes that lie two in a byte, an even column below an odd one."""
    data = rows.contiguous().view(torch.uint8)
    if data.shape[1] % (MX_BLOCK // 2):
        raise ValueError(f"rows of {2 * data.shape[1]} codes: a multiple of {MX_BLOCK} expected")
    codes = torch.stack((data & 15, data >> 4), dim=-1).view(len(data), -1, 4, 4, 2).int()
    words = torch.zeros(*codes.shape[:2], 4, dtype=torch.int32, device=rows.device)
    for index, (sign, rest) in enumerate(places):
        for half in range(2):
            here = codes[:, :, index, :, half]
            words |= ((here >> 3) << (sign + 16 * half)) | ((here & 7) << (rest + 16 * half))
    return words.transpose(0, 1)
