"""The experts' SwiGLU on the packed receive layout: two grouped products whose row counts only the device knows.

Persistent programs, one wave of them, share out the tiles that exist: each finds its next (slot, row tile, column tile)
by a running sum over `counts`, so a slot without rows costs nothing and nothing is read back. The idea is that of the
grouped product in Triton's tutorials and of vLLM's fused experts; that the counts come from the dispatch is DeepEP's
and Mooncake EP's low-latency layout.

The products are computed transposed: the weights are the left operand, whose 64-row grain the tensor cores insist on,
and the token rows are the right one, which may be as few as 16 (as DeepGEMM's swapped small-batch kernels do). One
kind of instruction therefore serves one row and thousands, and it sums k in steps of 16 from the first to the last,
each onto the accumulator: every shape of tile gives a row the same bits, as tests/engine/kernels/ checks on the GPU.

Weights may be codes in float8 with scales, as checkpoints in FP8 have them: they are read as codes, and what a step of
the sum over k comes to is multiplied by its scale. That step has one length then, whatever the tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton.language as tl

from elastic_ep.engine.ops_cuda.kernels.expert_plan import Plan, Tiles, plan_for
from elastic_ep.engine.ops_cuda.kernels.expert_tiles import (
    activated,
    biased,
    down_tile,
    gate_up_tile,
    scaled_down_tile,
    scaled_gate_up_tile,
    store_tile,
)
from elastic_ep.kernel import jit, power_of_2, processors
from elastic_ep.models.formats import SCALED_DEPTH
from elastic_ep.models.spec import Clamped

_ALL = 1 << 30


@dataclass(frozen=True, slots=True)
class Scaled:
    """Matrices of all slots in float8: `codes` [S, out, in] and `scales` [S, blocks, blocks] float32.

    A block has `rows` and `columns`, the latter a multiple of `SCALED_DEPTH`; 0 is all. Those of gate and up, one below
    the other, begin anew.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    rows: int
    columns: int


@jit
def _find_tile(
    tile: tl.tensor,
    counts: tl.tensor,
    end: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """Slot, first row, number of rows left, column tile; rows of a slot and a column tile are neighbours.

    `counts` [slots] are the slots' rows, `end` [slots] the running sum of their tiles.
    """
    slot = tl.sum((end <= tile).to(tl.int32), axis=0)
    tile -= tl.max(tl.where(end <= tile, end, 0), axis=0)
    count = tl.sum(tl.where(tl.arange(0, end.shape[0]) == slot, counts, 0), axis=0)
    row_tiles = (count + ROWS - 1) // ROWS
    first = tile % row_tiles * ROWS
    return slot, first, count - first, tile // row_tiles


@jit
def _rows_of(
    counts: tl.tensor,
    slot: tl.tensor,
    first: tl.tensor,
    part: tl.tensor,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> tl.tensor:
    """Where in its slot each of the rows from `first` on lies [R] int32: one part of it after the other is filled."""
    row = first + tl.arange(0, R)
    if PARTS > 1:
        index = tl.arange(0, BLOCK_P)
        count = tl.load(counts + slot * PARTS + index, mask=index < PARTS, other=0).to(tl.int32)
        end = tl.cumsum(count, axis=0)
        mine = tl.sum((row[:, None] >= end[None, :]).to(tl.int32), axis=1)
        before = tl.sum(tl.where(index[None, :] == mine[:, None], (end - count)[None, :], 0), axis=1)
        row = mine * part + row - before
    return row


@jit
def _tile(
    x: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    counts: tl.tensor,
    part: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    slot: tl.tensor,
    first: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    DOWN: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    SCALED: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
) -> None:
    IN: tl.constexpr = INNER if DOWN else H
    OUT: tl.constexpr = H if DOWN else INNER
    begin = slot.to(tl.int64) * part * PARTS
    packed = first + tl.arange(0, R)
    strewn = _rows_of(counts, slot, first, part, R, PARTS, BLOCK_P)
    if DOWN:
        w_slot = w + slot.to(tl.int64) * (INNER * H)
        if SCALED:
            BLOCKS: tl.constexpr = (INNER + SCALE_COLUMNS - 1) // SCALE_COLUMNS
            scales += slot * (BLOCKS * ((H + SCALE_ROWS - 1) // SCALE_ROWS))
            value = scaled_down_tile(
                x + begin * IN,
                packed,
                w_slot,
                scales,
                left,
                column,
                H,
                INNER,
                R,
                N,
                K,
                SCALE_ROWS,
                SCALE_COLUMNS,
            )
        else:
            value = down_tile(x + begin * IN, packed, w_slot, left, column, H, INNER, R, N, K)
        if BIASED:
            value = biased(value, bias + slot * H, column, H, N)
        store_tile(y + begin * OUT, strewn, value, left, column, OUT, R, N)
    else:
        w_slot = w + slot.to(tl.int64) * (H * 2 * INNER)
        if SCALED:
            WIDE_BLOCKS: tl.constexpr = (H + SCALE_COLUMNS - 1) // SCALE_COLUMNS
            scales += slot * (WIDE_BLOCKS * 2 * ((INNER + SCALE_ROWS - 1) // SCALE_ROWS))
            gated, up = scaled_gate_up_tile(
                x + begin * IN,
                strewn,
                w_slot,
                scales,
                left,
                column,
                H,
                INNER,
                R,
                N,
                K,
                SCALE_ROWS,
                SCALE_COLUMNS,
            )
        else:
            gated, up = gate_up_tile(x + begin * IN, strewn, w_slot, left, column, H, INNER, R, N, K)
        if BIASED:
            gated = biased(gated, bias + slot * (2 * INNER), column, INNER, N)
            up = biased(up, bias + slot * (2 * INNER) + INNER, column, INNER, N)
        value = activated(gated, up, alpha, limit, CLAMPED)
        store_tile(y + begin * OUT, packed, value, left, column, OUT, R, N)


@jit
def _experts_kernel(
    x: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    counts: tl.tensor,
    part: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    FEW: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    DOWN: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    SCALED: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
) -> None:
    OUT: tl.constexpr = H if DOWN else INNER
    COLUMN_TILES: tl.constexpr = (OUT + N - 1) // N
    slots = tl.arange(0, BLOCK_S)
    parts = tl.arange(0, BLOCK_P)
    real = (slots < SLOTS)[:, None] & (parts < PARTS)[None, :]
    of_parts = tl.load(counts + slots[:, None] * PARTS + parts[None, :], mask=real, other=0)
    count = tl.sum(of_parts.to(tl.int32), axis=1)
    size = (count + ROWS - 1) // ROWS * COLUMN_TILES
    end = tl.cumsum(size, axis=0)
    for tile in range(tl.program_id(0), tl.sum(size, axis=0), tl.num_programs(0)):
        slot, first, left, column = _find_tile(tile, count, end, ROWS)
        column *= N
        if FEW == ROWS:  # one body then: two would have shared memory each
            _tile(
                x, w, scales, bias, y, counts, part, alpha, limit, slot, first, left, column, H, INNER, PARTS, BLOCK_P,
                ROWS, N, K, DOWN, BIASED, CLAMPED, SCALED, SCALE_ROWS, SCALE_COLUMNS,
            )  # fmt: skip
        elif left <= FEW:
            _tile(
                x, w, scales, bias, y, counts, part, alpha, limit, slot, first, left, column, H, INNER, PARTS, BLOCK_P,
                FEW, N, K, DOWN, BIASED, CLAMPED, SCALED, SCALE_ROWS, SCALE_COLUMNS,
            )  # fmt: skip
        else:
            _tile(
                x, w, scales, bias, y, counts, part, alpha, limit, slot, first, left, column, H, INNER, PARTS, BLOCK_P,
                ROWS, N, K, DOWN, BIASED, CLAMPED, SCALED, SCALE_ROWS, SCALE_COLUMNS,
            )  # fmt: skip


@cache
def _launch(
    tiles: Tiles,
    x: torch.Tensor,
    weights: torch.Tensor | Scaled,
    y: torch.Tensor,
    counts: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Clamped | None,
    *,
    down: bool,
) -> None:
    """One of the two products: y [S, C, OUT] of x [S, C, IN]."""
    scaled = weights if isinstance(weights, Scaled) else None
    if scaled:
        tiles = replace(tiles, depth=SCALED_DEPTH)
    slots, capacity, width = x.shape
    parts = counts.numel() // slots
    most = slots * -(-capacity // tiles.rows) * -(-y.shape[-1] // tiles.columns)
    programs = min(processors(x.device) * tiles.per_processor, most)
    _experts_kernel[(programs,)](
        x,
        weights.codes if isinstance(weights, Scaled) else weights,
        scaled.scales if scaled else x,
        x if bias is None else bias,
        y,
        counts,
        capacity // parts,
        activation.alpha if activation else 0.0,
        activation.limit if activation else 0.0,
        H=y.shape[-1] if down else width,
        INNER=width if down else y.shape[-1],
        SLOTS=slots,
        BLOCK_S=power_of_2(slots),
        PARTS=parts,
        BLOCK_P=power_of_2(parts),
        ROWS=tiles.rows,
        FEW=tiles.few,
        N=tiles.columns,
        K=tiles.depth,
        DOWN=down,
        BIASED=bias is not None,
        CLAMPED=activation is not None,
        SCALED=scaled is not None,
        SCALE_ROWS=(scaled.rows if scaled else 0) or _ALL,
        SCALE_COLUMNS=(scaled.columns if scaled else 0) or _ALL,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=False,
    )


def expert_ffn(
    packed: torch.Tensor,
    counts: torch.Tensor,
    gate_up: torch.Tensor | Scaled,
    down: torch.Tensor | Scaled,
    *,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    activation: Clamped | None = None,
    expected_rows: int | None = None,
    plan: Plan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(silu(x Wg) * (x Wu)) Wd of each slot's rows: [S, C, H] like `packed`; its other rows are undefined.

    `packed` [S, C, H] and `counts` [S] (int32 or int64, at most C) as a dispatch leaves them; what rows from `counts`
    on hold does not matter. With `counts` [S, P] each slot has P parts of C / P rows, and a count for each.
    `gate_up` [S, H, 2 I] (gate first), `down` [S, I, H]: as weights/bank.py has them, which suits the GPU too: both are
    read along their last dimension. All contiguous, all of one dtype. The product between is rounded to that dtype.
    `biases`, if there are some: [S, 2 I] and [S, H] of the two products; `activation`, if it is not silu.
    Where they are `Scaled`: codes [S, 2 I, H] and [S, H, I]. Raises ValueError for blocks of which a step has several.

    `expected_rows` a slot (C if not given) chooses the tiles, unless a `plan` is given: it makes the call fast, not
    right, so a graph captured for a few rows also serves a step in which a peer sends many. `out` may be `packed`.
    """
    slots, capacity, _ = packed.shape
    for weights in (gate_up, down):
        if isinstance(weights, Scaled) and weights.columns % SCALED_DEPTH:
            raise ValueError(
                f"scales for every {weights.columns} columns: a multiple of {SCALED_DEPTH} expected"
            )
    plan = plan or plan_for(capacity if expected_rows is None else expected_rows, packed.dtype)
    inner = down.codes.shape[2] if isinstance(down, Scaled) else down.shape[1]
    between = packed.new_empty(slots, capacity, inner)
    y = torch.empty_like(packed) if out is None else out
    of_both, of_down = biases or (None, None)
    _launch(plan.gate_up, packed, gate_up, between, counts, of_both, activation, down=False)
    _launch(plan.down, between, down, y, counts, of_down, None, down=True)
    return y
