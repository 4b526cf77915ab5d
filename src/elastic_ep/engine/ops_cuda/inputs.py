"""What changes from step to step, in device memory at addresses that never change: a captured graph reads it there."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cuda.kernels.dense import ROW_CLASSES
from elastic_ep.engine.scheduler import Chunk

TILE_ROWS = 16
"""Rows that are computed at least: the fewest that a product is as fast for as for one."""
GRAPH_ROWS = 4352
"""Steps of more rows are computed eagerly: only there is the device busy for longer than the host takes to launch all
that a step consists of, which in a busy process are tens of milliseconds."""
_FINE_ROWS = 256
"""From here on padding costs products of it, and there are rungs between those that double."""
_ALIGN = 32
"""Elements, so that every part is as well aligned as an allocation: Triton compiles for alignment."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a graph is captured for. `rows` of tokens, padding included, a multiple of the tile."""

    rows: int
    decode: bool
    """Every chunk is one token: row i belongs to sequence i, and has logits."""
    sequences: int = 0
    """If not `decode`: the rows of logits, a multiple of the tile too."""

    @property
    def outputs(self) -> int:
        """Rows of logits."""
        return self.rows if self.decode else self.sequences


def ladder(most: int, tile: int) -> list[int]:
    """The rows that graphs are captured for, where a step has `most` at most: each capture makes a return longer, and a
    step is padded to the next. Up to four tiles all cost the time of reading the weights; then a rung is twice the
    last, at last with two between: a little more, for decodes beside as many tokens of prompts, and half as much more."""
    top = min(most, GRAPH_ROWS)
    doubled = [tile, *(tile << power for power in range(2, top.bit_length()))]
    fine = [rung for rung in doubled if rung >= _FINE_ROWS and rung % (8 * tile) == 0]
    between = [rung * eighths // 8 for rung in fine for eighths in (9, 12)]
    return [*(rung for rung in sorted(doubled + between) if rung < top), top]


@dataclass(frozen=True, slots=True)
class NextDecodes:
    """What a step reads that computes the next token of each sequence of the step of decodes before it, but for those
    tokens: positions and places in the KV cache [n] int32, and the rows whose sequences have got a page."""

    chunks: list[Chunk]
    positions: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int32]
    grown: list[int]


class StepInputs:
    """All int32. R the most rows, S the most sequences (both in whole tiles), P the pages of the longest sequence.

    Padding: token 0 at position 0, written nowhere; sequences of no tokens.
    """

    def __init__(self, limits: EngineLimits, tile: int, device: torch.device) -> None:
        def tiles(count: int) -> int:
            return -(-count // tile) * tile

        self._tile = tile
        self._tiles = tiles
        self._page = limits.page_size
        self.max_rows = tiles(limits.max_num_batched_tokens)
        self.max_sequences = tiles(limits.max_num_seqs)
        rows, sequences = self.max_rows, self.max_sequences
        self._mixed_rows, self._decode_rows = ladder(rows, tile), ladder(sequences, tile)
        sizes = [rows, rows, rows, sequences, sequences, sequences + 1, 1]
        starts = np.cumsum([0, *(-(-size // _ALIGN) * _ALIGN for size in sizes)]).tolist()
        pinned = device.type == "cuda"
        self._host = torch.zeros(starts[-1], dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        here, there = self._host.numpy(), self._device
        parts = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        (
            self._tokens,
            self._positions,
            self._slots,
            self._last_rows,
            self._lengths,
            self._bounds,
            self._count,
        ) = (here[part] for part in parts)
        self.tokens, self.positions, self.slots, self.last_rows, self.lengths, self.bounds, self.count = (
            there[part] for part in parts
        )
        """[R] tokens, positions and places in the KV cache (-1: none); [S] the last row and the context of each sequence
        (0: no sequence); [S + 1] where its rows begin; [1] the rows that are real."""
        pages = limits.sequence_pages
        self._host_tables = torch.zeros(sequences, pages, dtype=torch.int32, pin_memory=pinned)
        self._tables: npt.NDArray[np.int32] = self._host_tables.numpy()
        self.tables = torch.zeros(sequences, pages, dtype=torch.int32, device=device)
        """[S, P] page numbers."""
        self._numbers = np.arange(sequences, dtype=np.int32)
        self._decodes: tuple[int, int] | None = None
        """If the last step was one of decodes: its rows, padding included, and its sequences."""
        self._written: list[tuple[list[int], int]] = [([], 0) for _ in range(sequences)]
        """The list that each table was written from, and how long it was. Kept, so that no other one is taken for it."""

    def shape_of(self, chunks: Seq[Chunk]) -> StepShape:
        """A step without chunks is a decode of nobody."""
        total = sum([length for _, _, length in chunks])
        if total == len(chunks):
            return self.decode_shape(total)
        rows = self._padded(total, self._mixed_rows)
        sequences = rows if rows <= GRAPH_ROWS else self._tiles(len(chunks))
        return StepShape(rows, decode=False, sequences=min(sequences, self.max_sequences))

    def decode_shape(self, sequences: int) -> StepShape:
        return StepShape(self._padded(sequences, self._decode_rows), decode=True)

    def graphed(self) -> list[StepShape]:
        """Every shape of at most `GRAPH_ROWS` rows. The largest first: what it has at work then serves all others."""
        decodes = [StepShape(rows, decode=True) for rows in reversed(self._decode_rows)]
        return [self._mixed(rows) for rows in reversed(self._mixed_rows)] + decodes

    def largest(self) -> list[StepShape]:
        """The two largest shapes: what a step has at work at most. And one for each other way to cut the products of an
        eager step, which the first step that needs it would have to compile."""
        eager = {rows for rows in ROW_CLASSES if GRAPH_ROWS < rows < self.max_rows}
        mixed = [self._mixed(rows) for rows in sorted(eager | {self.max_rows}, reverse=True)]
        return [StepShape(self.max_sequences, decode=True), *mixed]

    def _mixed(self, rows: int) -> StepShape:
        return StepShape(rows, decode=False, sequences=min(rows, self.max_sequences))

    def _padded(self, rows: int, rungs: list[int]) -> int:
        if rows > rungs[-1]:
            return self._tiles(rows)
        return next(rung for rung in rungs if rows <= rung)

    def fill(self, chunks: Seq[Chunk], shape: StepShape) -> None:
        """Queue the copies to the device. The step before must have ended: its copies read the same host memory."""
        decodes = (shape.rows, len(chunks)) if shape.decode else None
        before, self._decodes = self._decodes, None  # nobody knows what is there if this raises half-way
        if decodes is None or decodes != before:
            self._frame(chunks, shape)
        if shape.decode:
            self._fill_decodes(chunks)
        self._decodes = decodes
        self._device.copy_(self._host, non_blocking=True)
        if self._write_tables(chunks):
            self.tables.copy_(self._host_tables, non_blocking=True)

    def prepare_next(self, chunks: list[Chunk]) -> NextDecodes | None:
        """While the device works: nothing that it may still read is written. `chunks` are those of the step after it, as
        `NextDecodes` has them. None if this step is no such one."""
        if self._decodes is None or self._decodes[1] != len(chunks):
            return None
        page = self._page
        starts = array("i", [start for _, start, _ in chunks])
        slots = array("i", [seq.pages[start // page] * page + start % page for seq, start, _ in chunks])
        counts = zip(chunks, self._written, strict=False)
        grown = [row for row, (chunk, (_, count)) in enumerate(counts) if len(chunk.sequence.pages) != count]
        return NextDecodes(chunks, np.array(starts, np.int32), np.array(slots, np.int32), grown)

    def fill_next(self, prepared: NextDecodes, tokens: npt.NDArray[np.int64]) -> None:
        """As `fill`, for a step right after the one that `prepared` follows, which gave these `tokens`."""
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = prepared.positions
        self._slots[:count] = prepared.slots
        self._lengths[:count] = prepared.positions + 1
        self._device.copy_(self._host, non_blocking=True)
        for row in prepared.grown:
            self._write_table(row, prepared.chunks[row].sequence.pages)
        if prepared.grown:
            self.tables.copy_(self._host_tables, non_blocking=True)

    def _frame(self, chunks: Seq[Chunk], shape: StepShape) -> None:
        """All but what `_fill_decodes` fills in if every chunk is one token."""
        self._tokens[: shape.rows] = 0
        self._positions[: shape.rows] = 0
        self._slots[: shape.rows] = -1
        self._lengths[:] = 0
        self._last_rows[:] = 0
        count = end = len(chunks)
        if shape.decode:
            self._bounds[:count] = self._last_rows[:count] = self._numbers[:count]
        else:
            end = self._fill_chunks(chunks)
        self._bounds[count:] = end
        self._count[0] = end

    def _fill_decodes(self, chunks: Seq[Chunk]) -> None:
        """What differs between two steps of as many decodes.

        The device is idle meanwhile, and caches are cold after the wait for a step: few small operations of numpy.
        """
        page, rows = self._page, len(chunks)
        tokens, positions, slots, lengths = array("i"), array("i"), array("i"), array("i")
        for sequence, start, _ in chunks:
            tokens.append(sequence.tokens[start])
            positions.append(start)
            slots.append(sequence.pages[start // page] * page + start % page)
            lengths.append(start + 1)
        self._tokens.data[:rows] = tokens
        self._positions.data[:rows] = positions
        self._slots.data[:rows] = slots
        self._lengths.data[:rows] = lengths

    def _fill_chunks(self, chunks: Seq[Chunk]) -> int:
        """The rows that are real."""
        end = 0
        for index, chunk in enumerate(chunks):
            begin, end = end, end + chunk.length
            self._fill_chunk(chunk, slice(begin, end))
            self._bounds[index] = begin
            self._lengths[index] = chunk.start + chunk.length
            self._last_rows[index] = end - 1
        return end

    def _fill_chunk(self, chunk: Chunk, rows: slice) -> None:
        sequence, page = chunk.sequence, self._page
        positions = np.arange(chunk.start, chunk.start + chunk.length, dtype=np.int32)
        pages = np.array(
            sequence.pages[chunk.start // page : (chunk.start + chunk.length - 1) // page + 1], np.int32
        )
        self._tokens[rows] = sequence.tokens[chunk.start : chunk.start + chunk.length]
        self._positions[rows] = positions
        self._slots[rows] = pages[positions // page - chunk.start // page] * page + positions % page

    def _write_tables(self, chunks: Seq[Chunk]) -> bool:
        """Whether a table changed: every few steps one does. What lies beyond a sequence's pages is never read.

        A sequence's list of pages only ever grows; one that has given its pages back gets another list.
        """
        changed = False
        for row, ((sequence, _, _), (written, count)) in enumerate(zip(chunks, self._written, strict=False)):
            pages = sequence.pages
            if pages is not written or len(pages) != count:
                self._write_table(row, pages)
                changed = True
        return changed

    def _write_table(self, row: int, pages: list[int]) -> None:
        written, count = self._written[row]
        begin = count if pages is written else 0
        self._tables[row, begin : len(pages)] = pages[begin:]
        self._written[row] = (pages, len(pages))
