"""The experts' SwiGLU on the packed receive layout: two grouped products whose row counts only the device knows.

Persistent programs, one wave of them, share out the tiles that exist: each finds its next (slot, row tile, column tile)
by a running sum over `counts`, so a slot without rows costs nothing and nothing is read back. The idea is that of the
grouped product in Triton's tutorials and of vLLM's fused experts; that the counts come from the dispatch is DeepEP's
and Mooncake EP's low-latency layout.

The products are computed transposed: the weights are the left operand, whose 64-row grain the tensor cores insist on,
and the token rows are the right one, which may be as few as 16 (as DeepGEMM's swapped small-batch kernels do). One
kind of instruction therefore serves one row and thousands, and it sums k in steps of 16 from the first to the last,
each onto the accumulator: every shape of tile gives a row the same bits. tests/kernels/ holds it to that on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl

from elastic_ep.model.kernels.launch import dot, jit, power_of_2


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one product is cut. Speed depends on it, results do not."""

    rows: int
    """Of a tile."""
    few: int
    """Of a slot's last tile if no more are left: the decoder's common case. At most `rows`."""
    columns: int
    """Of the output."""
    depth: int
    """Of one step of the sum."""
    warps: int
    stages: int
    per_processor: int
    """Programs that are to share a multiprocessor."""


@dataclass(frozen=True, slots=True)
class Plan:
    gate_up: Tiles
    down: Tiles


_FEW = Plan(
    gate_up=Tiles(rows=64, few=16, columns=64, depth=64, warps=4, stages=4, per_processor=2),
    down=Tiles(rows=64, few=16, columns=128, depth=64, warps=4, stages=4, per_processor=2),
)
_MANY = Plan(
    gate_up=Tiles(rows=128, few=64, columns=64, depth=64, warps=4, stages=3, per_processor=2),
    down=Tiles(rows=128, few=64, columns=128, depth=64, warps=8, stages=3, per_processor=2),
)
_FLOAT32 = Plan(
    gate_up=Tiles(rows=32, few=16, columns=32, depth=32, warps=4, stages=2, per_processor=2),
    down=Tiles(rows=32, few=16, columns=64, depth=32, warps=4, stages=2, per_processor=2),
)


def plan_for(expected_rows: int, dtype: torch.dtype) -> Plan:
    """For about `expected_rows` a slot."""
    if dtype == torch.float32:
        return _FLOAT32
    return _FEW if expected_rows <= 64 else _MANY


@jit
def _find_tile(
    tile: tl.tensor,
    counts: tl.tensor,
    COLUMN_TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """Slot, first row, number of rows left, column tile; rows of a slot and a column tile are neighbours."""
    slots = tl.arange(0, BLOCK_S)
    count = tl.load(counts + slots, mask=slots < SLOTS, other=0).to(tl.int32)
    size = (count + ROWS - 1) // ROWS * COLUMN_TILES
    end = tl.cumsum(size, axis=0)
    slot = tl.sum((end <= tile).to(tl.int32), axis=0)
    here = slots == slot
    tile -= tl.sum(tl.where(here, end - size, 0), axis=0)
    count = tl.sum(tl.where(here, count, 0), axis=0)
    row_tiles = (count + ROWS - 1) // ROWS
    first = tile % row_tiles * ROWS
    return slot, first, count - first, tile // row_tiles


@jit
def _count_tiles(
    counts: tl.tensor,
    COLUMN_TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    slots = tl.arange(0, BLOCK_S)
    count = tl.load(counts + slots, mask=slots < SLOTS, other=0).to(tl.int32)
    return tl.sum((count + ROWS - 1) // ROWS, axis=0) * COLUMN_TILES


@jit
def _gate_up_tile(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """y[:left, column:] = silu(gate) * up for one tile; x and y point to its first row, w to its slot."""
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    k = tl.arange(0, K)
    real_row = (row < left)[:, None]
    real_n = (n < INNER)[None, :]
    x_at = x + row[:, None] * H + k[None, :]
    w_at = w + k[:, None] * (2 * INNER) + n[None, :]
    gated = tl.zeros([N, R], tl.float32)
    up = tl.zeros([N, R], tl.float32)
    for start in range(0, H, K):
        if H % K == 0:
            rows = tl.load(x_at, mask=real_row, other=0.0)
        else:
            rows = tl.load(x_at, mask=real_row & (k < H - start)[None, :], other=0.0)
        if H % K == 0 and INNER % N == 0:
            left_weights = tl.load(w_at)
            right_weights = tl.load(w_at + INNER)
        else:
            real = real_n & (k < H - start)[:, None]
            left_weights = tl.load(w_at, mask=real, other=0.0)
            right_weights = tl.load(w_at + INNER, mask=real, other=0.0)
        gated = dot(tl.trans(left_weights), tl.trans(rows), gated)
        up = dot(tl.trans(right_weights), tl.trans(rows), up)
        x_at += K
        w_at += K * (2 * INNER)
    value = gated / (1.0 + tl.exp(-gated)) * up
    value = tl.trans(value.to(y.dtype.element_ty))
    tl.store(y + row[:, None] * INNER + n[None, :], value, mask=real_row & real_n)


@jit
def _down_tile(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    left: tl.tensor,
    column: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """y[:left, column:] = x @ w for one tile."""
    row = tl.arange(0, R)
    n = column + tl.arange(0, N)
    k = tl.arange(0, K)
    real_row = (row < left)[:, None]
    real_n = (n < H)[None, :]
    x_at = x + row[:, None] * INNER + k[None, :]
    w_at = w + k[:, None] * H + n[None, :]
    total = tl.zeros([N, R], tl.float32)
    for start in range(0, INNER, K):
        if INNER % K == 0:
            rows = tl.load(x_at, mask=real_row, other=0.0)
        else:
            rows = tl.load(x_at, mask=real_row & (k < INNER - start)[None, :], other=0.0)
        if INNER % K == 0 and H % N == 0:
            weights = tl.load(w_at)
        else:
            weights = tl.load(w_at, mask=real_n & (k < INNER - start)[:, None], other=0.0)
        total = dot(tl.trans(weights), tl.trans(rows), total)
        x_at += K
        w_at += K * H
    value = tl.trans(total.to(y.dtype.element_ty))
    tl.store(y + row[:, None] * H + n[None, :], value, mask=real_row & real_n)


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
    IN: tl.constexpr = INNER if DOWN else H
    OUT: tl.constexpr = H if DOWN else INNER
    COLUMN_TILES: tl.constexpr = (OUT + N - 1) // N
    total = _count_tiles(counts, COLUMN_TILES, SLOTS, BLOCK_S, ROWS)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        slot, first, left, column = _find_tile(tile, counts, COLUMN_TILES, SLOTS, BLOCK_S, ROWS)
        row = slot.to(tl.int64) * capacity + first
        x_tile = x + row * IN
        y_tile = y + row * OUT
        column = column * N
        if DOWN:
            w_slot = w + slot.to(tl.int64) * (INNER * H)
            if left <= FEW:
                _down_tile(x_tile, w_slot, y_tile, left, column, H, INNER, FEW, N, K)
            else:
                _down_tile(x_tile, w_slot, y_tile, left, column, H, INNER, ROWS, N, K)
        else:
            w_slot = w + slot.to(tl.int64) * (H * 2 * INNER)
            if left <= FEW:
                _gate_up_tile(x_tile, w_slot, y_tile, left, column, H, INNER, FEW, N, K)
            else:
                _gate_up_tile(x_tile, w_slot, y_tile, left, column, H, INNER, ROWS, N, K)


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors to share the work; the interpreter makes do with three."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 3


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

    `packed` [S, C, H] and `counts` [S] (int32 or int64, at most C) as a dispatch leaves them; rows from `counts` on
    are never read. `gate_up` [S, H, 2 I] (gate first), `down` [S, I, H]: as model/weights.py has them, which suits the
    GPU too: both are read along their last dimension. All contiguous, all of one dtype. The product between is
    rounded to that dtype.

    `expected_rows` a slot (C if not given) chooses the tiles, unless a `plan` is given: it makes the call fast, not
    right, so a graph captured for a few rows also serves a step in which a peer sends many.
    """
    slots, capacity, hidden = packed.shape
    inner = down.shape[1]
    plan = plan or plan_for(capacity if expected_rows is None else expected_rows, packed.dtype)
    between = packed.new_empty(slots, capacity, inner)
    y = torch.empty_like(packed)
    for tiles, x, weights, out in ((plan.gate_up, packed, gate_up, between), (plan.down, between, down, y)):
        most = slots * -(-capacity // tiles.rows) * -(-out.shape[-1] // tiles.columns)
        programs = min(_processors(packed.device) * tiles.per_processor, most)
        _experts_kernel[(programs,)](
            x,
            weights,
            out,
            counts,
            capacity,
            H=hidden,
            INNER=inner,
            SLOTS=slots,
            BLOCK_S=power_of_2(slots),
            ROWS=tiles.rows,
            FEW=tiles.few,
            N=tiles.columns,
            K=tiles.depth,
            DOWN=weights is down,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=False,
        )
    return y
