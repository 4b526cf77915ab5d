"""Rows in float8 (e4m3): each `ROW_GROUP` numbers of a row are codes, and share a scale in float32.

A scale is the largest of the numbers' sizes over 448, the largest code. So it is the row's own, and its codes do not
depend on what is computed beside it. This is how DeepSeek-V3 was trained, and what DeepGEMM and vLLM do.

A row lies in one place: its codes, then its scales. That is less than it has as numbers, so it may take their place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from elastic_ep.engine.ops_cuda.kernels.packed_rows import find_tile, rows_by_slot, rows_of
from elastic_ep.kernel import jit, power_of_2, processors, to_float8
from elastic_ep.models.formats import ROW_GROUP

_SCALE = 4
"""Bytes of one."""
_PROGRAMS = 8
"""For each multiprocessor."""


@dataclass(frozen=True, slots=True)
class RowCodes:
    """Of rows of `width` numbers: `codes` [..., bytes a row], and the same memory as `scales` [..., floats a row]."""

    codes: torch.Tensor
    scales: torch.Tensor
    width: int

    @property
    def bytes_a_row(self) -> int:
        return self.codes.shape[-1]


def first_scale(width: int) -> int:
    """Of a row, counted in scales from where its codes begin."""
    return -(-width // _SCALE)


def _within(memory: torch.Tensor, width: int) -> RowCodes:
    return RowCodes(memory.view(torch.float8_e4m3fn), memory.view(torch.float32), width)


def blank_codes(rows: tuple[int, ...], width: int, device: torch.device) -> RowCodes:
    """Undefined, for a kernel to fill."""
    size = (first_scale(width) + -(-width // ROW_GROUP)) * _SCALE
    return _within(torch.empty(*rows, -(-size // 16) * 16, dtype=torch.uint8, device=device), width)


@jit
def scale_of(largest: tl.tensor) -> tl.tensor:
    """Of numbers of which the largest is of that size."""
    return tl.math.div_rn(tl.maximum(largest, 1e-10), tl.full(largest.shape, 448.0, tl.float32))


@jit
def code_one_row(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """`row` of x [.., WIDTH] int64, to where `RowCodes` have it."""
    group = tl.arange(0, BLOCK_G)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(x + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    tl.debug_barrier()  # all of a row is read before its codes may take its place
    scale = scale_of(tl.max(tl.abs(value), axis=1))
    code = to_float8(tl.math.div_rn(value, tl.broadcast_to(scale[:, None], value.shape)))
    tl.store(codes + row * STRIDE + at, code, mask=at < WIDTH)
    tl.store(scales + row * (STRIDE // 4) + FIRST + group, scale, mask=group * GROUP < WIDTH)


@jit
def _code_rows_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    counts: tl.tensor,
    part: tl.tensor,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    count = rows_by_slot(counts, SLOTS, BLOCK_S, PARTS, BLOCK_P)
    end = tl.cumsum(count, axis=0)
    for index in range(tl.program_id(0), tl.sum(count, axis=0), tl.num_programs(0)):
        slot, first, _, _ = find_tile(index, count, end, 1)
        places = rows_of(counts, slot, first, part, 1, PARTS, BLOCK_P)
        row = slot.to(tl.int64) * part * PARTS + tl.sum(places, axis=0)
        code_one_row(x, codes, scales, row, WIDTH, STRIDE, FIRST, GROUP, BLOCK_G)


def code_rows(packed: torch.Tensor, counts: torch.Tensor, *, in_place: bool) -> RowCodes:
    """Of `packed` [S, C, width] and `counts` as expert_ffn.py has them; `in_place`: the rows are gone then.

    Raises ValueError for rows that are too short to have their codes in their place.
    """
    slots, capacity, width = packed.shape
    made = _within(packed if in_place else torch.empty_like(packed), width)
    if (first_scale(width) + -(-width // ROW_GROUP)) * _SCALE > made.bytes_a_row:
        raise ValueError(f"rows of {width} numbers have no room for their codes")
    parts = counts.numel() // slots
    _code_rows_kernel[(min(processors(packed.device) * _PROGRAMS, slots * capacity),)](
        packed,
        made.codes,
        made.scales,
        counts,
        capacity // parts,
        WIDTH=width,
        STRIDE=made.bytes_a_row,
        FIRST=first_scale(width),
        GROUP=ROW_GROUP,
        BLOCK_G=power_of_2(-(-width // ROW_GROUP)),
        SLOTS=slots,
        BLOCK_S=power_of_2(slots),
        PARTS=parts,
        BLOCK_P=power_of_2(parts),
        num_warps=4 if width <= 4096 else 8,
        enable_fp_fusion=False,
    )
    return made
