"""Where rows lie that a dispatch has left: by slot, and of each slot in parts; only the device knows how many."""

from __future__ import annotations

import triton.language as tl

from elastic_ep.kernel import jit


@jit
def rows_by_slot(
    counts: tl.tensor,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> tl.tensor:
    """Of `counts` [slots, parts]: the slots' rows [BLOCK_S] int32."""
    slots = tl.arange(0, BLOCK_S)
    parts = tl.arange(0, BLOCK_P)
    real = (slots < SLOTS)[:, None] & (parts < PARTS)[None, :]
    of_parts = tl.load(counts + slots[:, None] * PARTS + parts[None, :], mask=real, other=0)
    return tl.sum(of_parts.to(tl.int32), axis=1)


@jit
def find_tile(
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
def rows_of(
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
