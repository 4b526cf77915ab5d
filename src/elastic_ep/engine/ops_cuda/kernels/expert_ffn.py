"""The experts' SwiGLU on the packed receive layout: two grouped products whose row counts only the device knows.

Persistent programs, one wave of them, share out the tiles that exist: each finds its next (slot, row tile, column tile)
by a running sum over `counts`, so a slot without rows costs nothing and nothing is read back. The idea is that of the
grouped product in Triton's tutorials and of vLLM's fused experts; that the counts come from the dispatch is DeepEP's
and Mooncake EP's low-latency layout.

The products are computed transposed: the weights are the left operand, whose 64-row grain the tensor cores insist on,
and the token rows are the right one, which may be as few as 16 (as DeepGEMM's swapped small-batch kernels do). One
kind of instruction therefore serves one row and thousands, and it sums k in steps of 16 from the first to the last,
each onto the accumulator: every shape of tile gives a row the same bits, as tests/engine/kernels/ checks on the GPU.

Weights may be codes with scales, as quantised checkpoints have them (coded_tiles.py): they are read as codes, and no
matrix is made of them. Rows may become codes before they meet them (row_codes.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton.language as tl

from elastic_ep.engine.ops_cuda.kernels.coded_tiles import (
    FP8,
    FP8_ROWS,
    INT4,
    MXFP4,
    coded_tile,
    store_row_codes,
)
from elastic_ep.engine.ops_cuda.kernels.expert_plan import Plan, Tiles, plan_for, plan_of_codes
from elastic_ep.engine.ops_cuda.kernels.expert_tiles import (
    activated,
    biased,
    down_tile,
    gate_up_tile,
    store_tile,
)
from elastic_ep.engine.ops_cuda.kernels.packed_rows import find_tile, rows_by_slot, rows_of
from elastic_ep.engine.ops_cuda.kernels.row_codes import RowCodes, blank_codes, code_rows
from elastic_ep.kernel import jit, power_of_2, processors
from elastic_ep.models.formats import MX_BLOCK, ROW_GROUP, SCALED_DEPTH, Format, Fp8, Int4, Mxfp4
from elastic_ep.models.spec import Clamped

_ALL = 1 << 30


@dataclass(frozen=True, slots=True)
class Scaled:
    """Matrices of all slots as a checkpoint in `format` has them: its `codes` and `scales`, and perhaps `zeros`.

    Of FP8 codes [S, out, in] and scales [S, blocks, blocks] float32, of MXFP4 [S, out, in / 2] and [S, out, in / 32]
    uint8, of INT4 [S, out, in / 8] int32 and [S, out, groups] float32, these two as weights/arranged.py leaves them.
    Gate and up lie one below the other, and their blocks begin anew.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    format: Format
    zeros: torch.Tensor | None = None

    @property
    def form(self) -> int:
        """As coded_tiles.py counts. Raises ValueError for blocks of which a step of the sum has several."""
        match self.format:
            case Fp8() as made:
                _check_columns(made.columns, SCALED_DEPTH)
                return int(FP8_ROWS if made.rows_too else FP8)
            case Int4() as made:
                _check_columns(made.group, ROW_GROUP)
                return int(INT4)
            case Mxfp4():
                return int(MXFP4)
        raise ValueError(f"no kernel computes from {self.format}")

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        match self.format:
            case Fp8() as made:
                return made.rows or _ALL, made.columns or _ALL
            case Int4() as made:
                return 1, made.group or _ALL
        return 1, MX_BLOCK

    @property
    def elements(self) -> torch.Tensor:
        """The codes: each, or eight in a word."""
        return self.codes if self.codes.dtype == torch.float8_e4m3fn else self.codes.view(torch.int32)

    def plan(self, expected_rows: int, dtype: torch.dtype) -> Plan:
        form = self.form
        return (
            plan_for(expected_rows, dtype) if form == FP8 else plan_of_codes(expected_rows, form == FP8_ROWS)
        )

    def cut(self, tiles: Tiles, *, down: bool) -> Tiles:
        """Steps are as long as the format has it, and a tile of rows that become codes is a group of theirs wide."""
        if self.form == MXFP4:  # whose scales are in its numbers
            return tiles
        if self.form == FP8:
            return replace(tiles, depth=SCALED_DEPTH)
        if self.form == FP8_ROWS and not down:
            tiles = replace(tiles, columns=ROW_GROUP)
        return replace(tiles, depth=ROW_GROUP)


def _check_columns(columns: int, step: int) -> None:
    if columns % step:
        raise ValueError(f"scales for every {columns} columns: a multiple of {step} expected")


@jit
def _tile(
    x: tl.tensor,
    x_scales: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    y_scales: tl.tensor,
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
    X_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    DOWN: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    FORM: tl.constexpr,
    ZEROS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
) -> None:
    IN: tl.constexpr = INNER if DOWN else H
    OUT: tl.constexpr = H if DOWN else INNER
    begin = slot.to(tl.int64) * part * PARTS
    packed = first + tl.arange(0, R)
    strewn = rows_of(counts, slot, first, part, R, PARTS, BLOCK_P)
    x += begin * X_STRIDE
    y += begin * Y_STRIDE
    source = packed if DOWN else strewn
    if FORM == 0:
        w += slot.to(tl.int64) * (H * INNER if DOWN else 2 * H * INNER)
        if DOWN:
            gated = down_tile(x, source, w, left, column, H, INNER, R, N, K)
            up = gated
        else:
            gated, up = gate_up_tile(x, source, w, left, column, H, INNER, R, N, K)
    else:
        MATRICES: tl.constexpr = 1 if DOWN else 2
        BLOCKS: tl.constexpr = (IN + SCALE_COLUMNS - 1) // SCALE_COLUMNS
        gated, up = coded_tile(
            x,
            x_scales + begin * (X_STRIDE // 4),
            source,
            w + slot.to(tl.int64) * (MATRICES * OUT * WIDTH),
            scales + slot * (MATRICES * ((OUT + SCALE_ROWS - 1) // SCALE_ROWS) * BLOCKS),
            zeros + slot * (MATRICES * ((OUT + 7) // 8) * BLOCKS),
            left,
            column,
            IN,
            OUT,
            X_STRIDE,
            WIDTH,
            R,
            N,
            K,
            not DOWN,
            FORM,
            ZEROS,
            SCALE_ROWS,
            SCALE_COLUMNS,
        )
    if DOWN:
        if BIASED:
            gated = biased(gated, bias + slot * H, column, H, N)
        store_tile(y, strewn, gated, left, column, OUT, R, N)
    else:
        if BIASED:
            gated = biased(gated, bias + slot * (2 * INNER), column, INNER, N)
            up = biased(up, bias + slot * (2 * INNER) + INNER, column, INNER, N)
        value = activated(gated, up, alpha, limit, CLAMPED)
        if FORM == FP8_ROWS:
            y_scales += begin * (Y_STRIDE // 4)
            store_row_codes(y, y_scales, packed, value, left, column, OUT, Y_STRIDE, (OUT + 3) // 4, R, N)
        else:
            store_tile(y, packed, value, left, column, OUT, R, N)


@jit
def _experts_kernel(
    x: tl.tensor,
    x_scales: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    y_scales: tl.tensor,
    counts: tl.tensor,
    part: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    X_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
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
    FORM: tl.constexpr,
    ZEROS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
) -> None:
    OUT: tl.constexpr = H if DOWN else INNER
    COLUMN_TILES: tl.constexpr = (OUT + N - 1) // N
    count = rows_by_slot(counts, SLOTS, BLOCK_S, PARTS, BLOCK_P)
    size = (count + ROWS - 1) // ROWS * COLUMN_TILES
    end = tl.cumsum(size, axis=0)
    for tile in range(tl.program_id(0), tl.sum(size, axis=0), tl.num_programs(0)):
        slot, first, left, column = find_tile(tile, count, end, ROWS)
        column *= N
        if FEW == ROWS:  # one body then: two would have shared memory each
            _tile(
                x, x_scales, w, scales, zeros, bias, y, y_scales, counts, part, alpha, limit, slot, first, left, column,
                H, INNER, X_STRIDE, Y_STRIDE, WIDTH, PARTS, BLOCK_P, ROWS, N, K, DOWN, BIASED, CLAMPED, FORM,
                ZEROS, SCALE_ROWS, SCALE_COLUMNS,
            )  # fmt: skip
        elif left <= FEW:
            _tile(
                x, x_scales, w, scales, zeros, bias, y, y_scales, counts, part, alpha, limit, slot, first, left, column,
                H, INNER, X_STRIDE, Y_STRIDE, WIDTH, PARTS, BLOCK_P, FEW, N, K, DOWN, BIASED, CLAMPED, FORM,
                ZEROS, SCALE_ROWS, SCALE_COLUMNS,
            )  # fmt: skip
        else:
            _tile(
                x, x_scales, w, scales, zeros, bias, y, y_scales, counts, part, alpha, limit, slot, first, left, column,
                H, INNER, X_STRIDE, Y_STRIDE, WIDTH, PARTS, BLOCK_P, ROWS, N, K, DOWN, BIASED, CLAMPED, FORM,
                ZEROS, SCALE_ROWS, SCALE_COLUMNS,
            )  # fmt: skip


Rows = torch.Tensor | RowCodes


def _launch(
    tiles: Tiles,
    x: Rows,
    weights: torch.Tensor | Scaled,
    y: Rows,
    counts: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Clamped | None,
    *,
    down: bool,
) -> None:
    """One of the two products: y [S, C, OUT] of x [S, C, IN]."""
    scaled = weights if isinstance(weights, Scaled) else None
    if scaled:
        tiles = scaled.cut(tiles, down=down)
    (x_rows, x_scales, width), (y_rows, y_scales, out) = _memory(x), _memory(y)
    slots, capacity, _ = x_rows.shape
    parts = counts.numel() // slots
    most = slots * -(-capacity // tiles.rows) * -(-out // tiles.columns)
    programs = min(processors(x_rows.device) * tiles.per_processor, most)
    scale_rows, scale_columns = scaled.block if scaled else (1, 1)
    _experts_kernel[(programs,)](
        x_rows,
        x_scales,
        weights.elements if isinstance(weights, Scaled) else weights,
        scaled.scales if scaled else x_scales,
        scaled.zeros if scaled and scaled.zeros is not None else counts,
        y_rows if bias is None else bias,
        y_rows,
        y_scales,
        counts,
        capacity // parts,
        activation.alpha if activation else 0.0,
        activation.limit if activation else 0.0,
        H=out if down else width,
        INNER=width if down else out,
        X_STRIDE=x_rows.shape[2],
        Y_STRIDE=y_rows.shape[2],
        WIDTH=scaled.elements.shape[2] if scaled else 0,
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
        FORM=scaled.form if scaled else 0,
        ZEROS=scaled is not None and scaled.zeros is not None,
        SCALE_ROWS=scale_rows,
        SCALE_COLUMNS=scale_columns,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=False,
    )


def _memory(rows: Rows) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Where the rows lie, where their scales do if they have some, and how many numbers a row has."""
    if isinstance(rows, RowCodes):
        return rows.codes, rows.scales, rows.width
    return rows, rows, rows.shape[2]


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
    Where they are `Scaled` both are, in one format. If it says so (`Fp8.rows_too`) rows become codes before each of the
    products, those between right from float32. Raises ValueError as `Scaled.form` does.

    `expected_rows` a slot (C if not given) chooses the tiles, unless a `plan` is given: it makes the call fast, not
    right, so a graph captured for a few rows also serves a step in which a peer sends many. `out` may be `packed`.
    """
    slots, capacity, _ = packed.shape
    choose = gate_up.plan if isinstance(gate_up, Scaled) else plan_for
    plan = plan or choose(capacity if expected_rows is None else expected_rows, packed.dtype)
    inner = (gate_up.codes.shape[1] if isinstance(gate_up, Scaled) else gate_up.shape[2]) // 2
    y = torch.empty_like(packed) if out is None else out
    of_both, of_down = biases or (None, None)
    x: Rows = packed
    between: Rows
    if isinstance(gate_up, Scaled) and gate_up.form == FP8_ROWS:
        x = code_rows(packed, counts, in_place=y.data_ptr() == packed.data_ptr())
        between = blank_codes((slots, capacity), inner, packed.device)
    else:
        between = packed.new_empty(slots, capacity, inner)
    _launch(plan.gate_up, x, gate_up, between, counts, of_both, activation, down=False)
    _launch(plan.down, between, down, y, counts, of_down, None, down=True)
    return y
