"""The experts' SwiGLU on the packed receive layout: two grouped products whose row counts only the device knows.

Persistent programs, one wave of them, share out the tiles that exist: each finds its next (slot, row tile, column tile)
by a running sum over `counts`, so a slot without rows costs nothing and nothing is read back. The idea is that of the
grouped product in Triton's tutorials and of vLLM's fused experts; that the counts come from the dispatch is DeepEP's
and Mooncake EP's low-latency layout.

The products are computed transposed: the weights are the left operand, whose 64-row grain the tensor cores insist on,
and the token rows are the right one, which may be as few as 16 (as DeepGEMM's swapped small-batch kernels do). One
kind of instruction therefore serves one row and thousands, and it sums k in steps of 16 from the first to the last,
each onto the accumulator: every shape of tile gives a row the same bits, as tests/engine/kernels/ checks on the GPU.
"""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl

from elastic_ep.engine.ops_cuda.kernels.expert_plan import Plan, Tiles, plan_for
from elastic_ep.engine.ops_cuda.kernels.expert_tiles import down_tile, gate_up_tile, store_tile
from elastic_ep.engine.ops_cuda.kernels.launch import jit, power_of_2


@jit
def _find_tile(
    tile: tl.tensor,
    counts: tl.tensor,
    end: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """Slot, first row, number of rows left, column tile; rows of a slot and a column tile are neighbours.

    `end` [slots] is the running sum of the slots' tiles.
    """
    slot = tl.sum((end <= tile).to(tl.int32), axis=0)
    tile -= tl.max(tl.where(end <= tile, end, 0), axis=0)
    count = tl.load(counts + slot).to(tl.int32)
    row_tiles = (count + ROWS - 1) // ROWS
    first = tile % row_tiles * ROWS
    return slot, first, count - first, tile // row_tiles


@jit
def _tile(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    capacity: tl.tensor,
    slot: tl.tensor,
    first: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    DOWN: tl.constexpr,
) -> None:
    IN: tl.constexpr = INNER if DOWN else H
    OUT: tl.constexpr = H if DOWN else INNER
    row = slot.to(tl.int64) * capacity + first
    if DOWN:
        w_slot = w + slot.to(tl.int64) * (INNER * H)
        value = down_tile(x + row * IN, w_slot, left, column, H, INNER, R, N, K)
    else:
        w_slot = w + slot.to(tl.int64) * (H * 2 * INNER)
        value = gate_up_tile(x + row * IN, w_slot, left, column, H, INNER, R, N, K)
    store_tile(y + row * OUT, value, left, column, OUT, R, N)


@jit
def _experts_kernel(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    counts: tl.tensor,
    capacity: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr,
    FEW: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    DOWN: tl.constexpr,
) -> None:
    OUT: tl.constexpr = H if DOWN else INNER
    COLUMN_TILES: tl.constexpr = (OUT + N - 1) // N
    slots = tl.arange(0, BLOCK_S)
    count = tl.load(counts + slots, mask=slots < SLOTS, other=0).to(tl.int32)
    size = (count + ROWS - 1) // ROWS * COLUMN_TILES
    end = tl.cumsum(size, axis=0)
    for tile in range(tl.program_id(0), tl.sum(size, axis=0), tl.num_programs(0)):
        slot, first, left, column = _find_tile(tile, counts, end, ROWS)
        column *= N
        if FEW == ROWS:  # one body then: two would have shared memory each
            _tile(x, w, y, capacity, slot, first, left, column, H, INNER, ROWS, N, K, DOWN)
        elif left <= FEW:
            _tile(x, w, y, capacity, slot, first, left, column, H, INNER, FEW, N, K, DOWN)
        else:
            _tile(x, w, y, capacity, slot, first, left, column, H, INNER, ROWS, N, K, DOWN)


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors to share the work; the interpreter makes do with three."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 3


def _launch(
    tiles: Tiles,
    x: torch.Tensor,
    weights: torch.Tensor,
    y: torch.Tensor,
    counts: torch.Tensor,
    *,
    down: bool,
) -> None:
    """One of the two products: y [S, C, OUT] of x [S, C, IN]."""
    slots, capacity, width = x.shape
    most = slots * -(-capacity // tiles.rows) * -(-y.shape[-1] // tiles.columns)
    programs = min(_processors(x.device) * tiles.per_processor, most)
    _experts_kernel[(programs,)](
        x,
        weights,
        y,
        counts,
        capacity,
        H=y.shape[-1] if down else width,
        INNER=width if down else y.shape[-1],
        SLOTS=slots,
        BLOCK_S=power_of_2(slots),
        ROWS=tiles.rows,
        FEW=tiles.few,
        N=tiles.columns,
        K=tiles.depth,
        DOWN=down,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=False,
    )


def expert_ffn(
    packed: torch.Tensor,
    counts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    expected_rows: int | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """(silu(x Wg) * (x Wu)) Wd of each slot's rows: [S, C, H] like `packed`; rows from `counts` on are undefined.

    `packed` [S, C, H] and `counts` [S] (int32 or int64, at most C) as a dispatch leaves them; what rows from `counts`
    on hold does not matter. `gate_up` [S, H, 2 I] (gate first), `down` [S, I, H]: as weights/bank.py has them, which
    suits the GPU too: both are read along their last dimension. All contiguous, all of one dtype. The product between
    is rounded to that dtype.

    `expected_rows` a slot (C if not given) chooses the tiles, unless a `plan` is given: it makes the call fast, not
    right, so a graph captured for a few rows also serves a step in which a peer sends many.
    """
    slots, capacity, _ = packed.shape
    plan = plan or plan_for(capacity if expected_rows is None else expected_rows, packed.dtype)
    between = packed.new_empty(slots, capacity, down.shape[1])
    y = torch.empty_like(packed)
    _launch(plan.gate_up, packed, gate_up, between, counts, down=False)
    _launch(plan.down, between, down, y, counts, down=True)
    return y
