"""A step's batch as index tensors, made once a step and used by every layer.

Shapes: T tokens, padded to Tp; N query tiles; P pairs; Hq query heads, Hk key-value heads, G = Hq / Hk.

Attention works on query tiles of `QUERY_TILE` consecutive tokens of one sequence (a decode fills one row of its tile)
and on key blocks of `KEY_BLOCK` tokens: a *pair* is a tile and one of the blocks that it may see. Both sizes are
fixed, so the bits of a token's result depend neither on how its prompt was cut into chunks nor on what else is in the
batch. Work items are the P * Hk (pair, key-value head).
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.engine.ops_cpu.layers import padded
from elastic_ep.engine.scheduler import Chunk
from elastic_ep.kv.page_table import NULL_PAGE
from elastic_ep.models.spec import AnyAttention, LatentAttention, Window

QUERY_TILE = 2
KEY_BLOCK = 64

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How a layer's KV cache is laid out: rows [2 (keys, values), Hk, pages, page_size] of D elements, flattened.

    With `latent` [1, 1, pages, page_size]: a row is the key that all heads share, and begins with their value.
    """

    num_heads: int
    num_kv_heads: int
    page_size: int
    total_pages: int
    """The null page included."""
    latent: bool = False

    @staticmethod
    def of(kind: AnyAttention, page_size: int, total_pages: int) -> CacheLayout:
        if isinstance(kind, LatentAttention):
            return CacheLayout(kind.heads, 1, page_size, total_pages, latent=True)
        return CacheLayout(kind.heads, kind.kv_heads, page_size, total_pages)

    @property
    def planes(self) -> int:
        """Rows that a token has."""
        return 1 if self.latent else 2 * self.num_kv_heads

    @property
    def rows(self) -> int:
        return self.planes * self.total_pages * self.page_size

    @property
    def group(self) -> int:
        """G, query heads that share a key-value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Batch:
    num_tokens: int
    num_tiles: int
    """N"""
    num_blocks: int
    """B, the most blocks that a tile may see"""
    tokens: torch.Tensor
    """[Tp]; padding is token 0"""
    positions: torch.Tensor
    """[Tp]"""
    write_rows: torch.Tensor
    """[Tp * planes] cache rows of each token's keys and values; padding goes to the null page"""
    query_rows: torch.Tensor
    """[P * Hk * QUERY_TILE * G] rows of [Tp * (Hq + Hk)]"""
    context: torch.Tensor
    """[planes * P * KEY_BLOCK / page_size] cache pages of each pair's keys and values"""
    biases: dict[Window | None, torch.Tensor]
    """Of each window, None for no window: [P * Hk, QUERY_TILE * G, KEY_BLOCK] 0 where the query may look, else -inf"""
    score_rows: torch.Tensor
    """[P * Hk * QUERY_TILE * G] rows of the scores when joined: [N * Hk * QUERY_TILE * G * B]"""
    part_rows: torch.Tensor
    """[P * Hk] where each item's part of the output goes: [B * N * Hk]"""
    output_rows: torch.Tensor
    """[Tp * Hq] rows of the attention output [N * Hk * QUERY_TILE * G]"""
    logit_rows: torch.Tensor
    """[R padded] the token rows that yield logits"""


class BatchMaker:
    """Keeps what does not change from step to step."""

    def __init__(
        self, layout: CacheLayout, device: torch.device, windows: Collection[Window | None] = (None,)
    ) -> None:
        kv_heads, group = layout.num_kv_heads, layout.group
        self._layout = layout
        self._device = device
        self._block_pages = KEY_BLOCK // layout.page_size
        self._windows = windows
        self._planes: _Ints = np.arange(layout.planes) * layout.total_pages
        self._heads: _Ints = np.arange(layout.num_heads).reshape(kv_heads, 1, group)
        self._lanes: _Ints = np.arange(QUERY_TILE)
        self._kv_heads: _Ints = np.arange(kv_heads)
        self._rows: _Ints = np.arange(QUERY_TILE * group)
        self._qk_heads = layout.num_heads + kv_heads
        # Rows of the attention output are ordered [tile, kv head, lane, group].
        head = np.arange(layout.num_heads)
        self._head_offset: _Ints = head // group * (QUERY_TILE * group) + head % group
        # Row n: of a block's keys the first n may be seen.
        seen = np.arange(KEY_BLOCK) < np.arange(KEY_BLOCK + 1)[:, None]
        self._bias = torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf)))

    def make(self, chunks: Seq[Chunk]) -> Batch:
        """At least one chunk."""
        layout, page_size = self._layout, self._layout.page_size
        lengths: _Ints = np.array([chunk.length for chunk in chunks])
        starts: _Ints = np.array([chunk.start for chunk in chunks])
        ends = lengths.cumsum()
        first = ends - lengths
        total = int(ends[-1])
        chunk_of: _Ints = np.arange(len(chunks)).repeat(lengths)
        within = np.arange(total) - first[chunk_of]
        position = starts[chunk_of] + within
        table = self._block_table(chunks)

        tokens: _Ints = np.zeros(padded(total), dtype=np.int64)
        tokens[:total] = [t for c in chunks for t in c.sequence.tokens[c.start : c.start + c.length]]
        positions = np.zeros_like(tokens)
        positions[:total] = position
        pages = np.full_like(tokens, NULL_PAGE)
        pages[:total] = table[chunk_of, position // page_size]
        write_rows = (self._planes + pages[:, None]) * page_size + (positions % page_size)[:, None]

        tiles = -(-lengths // QUERY_TILE)
        first_tile = tiles.cumsum() - tiles
        tile_chunk: _Ints = np.arange(len(chunks)).repeat(tiles)
        offset = (np.arange(len(tile_chunk)) - first_tile[tile_chunk]) * QUERY_TILE
        lane = np.minimum(self._lanes, (lengths[tile_chunk] - offset)[:, None] - 1)  # spare lanes repeat
        token_of_lane = (first[tile_chunk] + offset)[:, None] + lane
        seen = position[token_of_lane] + 1
        blocks = (seen[:, -1] - 1) // KEY_BLOCK + 1
        pair_tile: _Ints = np.arange(len(blocks)).repeat(blocks)
        pair_block = np.arange(len(pair_tile)) - (blocks.cumsum() - blocks)[pair_tile]
        query_rows = token_of_lane[pair_tile][:, None, :, None] * self._qk_heads + self._heads

        tile_of_token = first_tile[chunk_of] + within // QUERY_TILE
        output_rows: _Ints = np.zeros((len(tokens), layout.num_heads), dtype=np.int64)
        row = tile_of_token * layout.num_kv_heads * QUERY_TILE + within % QUERY_TILE
        output_rows[:total] = row[:, None] * layout.group + self._head_offset

        samples = [int(end) - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.samples]
        samples += [0] * (padded(len(samples)) - len(samples))
        most = int(blocks.max())
        before = (pair_block * KEY_BLOCK)[:, None]
        item = pair_tile[:, None] * layout.num_kv_heads + self._kv_heads
        score_rows = (item[:, :, None] * len(self._rows) + self._rows) * most + pair_block[:, None, None]
        part_rows = pair_block[:, None] * (len(blocks) * layout.num_kv_heads) + item
        return Batch(
            num_tokens=total,
            num_tiles=len(blocks),
            num_blocks=most,
            tokens=self._tensor(tokens),
            positions=self._tensor(positions),
            write_rows=self._tensor(write_rows),
            query_rows=self._tensor(query_rows),
            context=self._tensor(self._context(table, tile_chunk[pair_tile], pair_block)),
            biases={window: self._bias_of(seen[pair_tile], before, window) for window in self._windows},
            score_rows=self._tensor(score_rows),
            part_rows=self._tensor(part_rows),
            output_rows=self._tensor(output_rows),
            logit_rows=torch.tensor(samples, dtype=torch.int64, device=self._device),
        )

    def _tensor(self, array: _Ints) -> torch.Tensor:
        return torch.from_numpy(array.reshape(-1)).to(self._device)

    def _block_table(self, chunks: Seq[Chunk]) -> _Ints:
        """[chunks, pages], in whole key blocks, filled up with null pages."""
        most = max(len(chunk.sequence.pages) for chunk in chunks)
        width = -(-most // self._block_pages) * self._block_pages
        rows = [c.sequence.pages + [NULL_PAGE] * (width - len(c.sequence.pages)) for c in chunks]
        return np.array(rows, dtype=np.int64)

    def _context(self, table: _Ints, chunk: _Ints, block: _Ints) -> _Ints:
        """The pages of block `block[p]` of chunk `chunk[p]`: [planes / Hk, P, Hk, pages of a block]."""
        blocks = table.reshape(-1, self._block_pages)
        pages = blocks[chunk * (table.shape[1] // self._block_pages) + block]
        context: _Ints = self._planes.reshape(-1, 1, self._layout.num_kv_heads, 1) + pages[:, None, :]
        return context

    def _bias_of(self, seen: _Ints, before: _Ints, window: Window | None) -> torch.Tensor:
        """`seen` [P, QUERY_TILE]: how many keys each query may see without `window`; `before` [P, 1]: those before
        the block."""
        layout = self._layout
        shape = (len(seen), layout.num_kv_heads, QUERY_TILE, layout.group)

        def rows(counts: _Ints) -> _Ints:
            return np.broadcast_to(counts.clip(0, KEY_BLOCK)[:, None, :, None], shape).flatten()

        bias = self._bias.index_select(0, torch.from_numpy(rows(seen - before)))
        if window is not None:
            first = (seen - 1) // window.size * window.size if window.chunked else seen - window.size
            hidden = torch.from_numpy(np.arange(KEY_BLOCK) < rows(first - before)[:, None])
            bias.masked_fill_(hidden, -torch.inf)
        return bias.view(-1, QUERY_TILE * layout.group, KEY_BLOCK).to(self._device)
