"""A step's batch as index tensors, made once a step and used by every layer.

Shapes: T tokens, padded to Tp; N query tiles; B key blocks; Hq query heads, Hk key-value heads, G = Hq / Hk.

Attention works on query tiles of `QUERY_TILE` consecutive tokens of one sequence (a decode fills one row of its tile)
and on key blocks of `KEY_BLOCK` tokens. Both are fixed, so the bits of a token's result depend neither on how its
prompt was cut into chunks nor on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.model.kv_pages import NULL_PAGE
from elastic_ep.model.layers import padded
from elastic_ep.model.scheduler import Chunk

QUERY_TILE = 4
KEY_BLOCK = 128

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How a layer's KV cache is laid out: rows [2 (keys, values), Hk, pages, page_size] of D elements, flattened."""

    num_heads: int
    num_kv_heads: int
    page_size: int
    total_pages: int
    """The null page included."""

    @property
    def rows(self) -> int:
        return 2 * self.num_kv_heads * self.total_pages * self.page_size


@dataclass(frozen=True, slots=True)
class Batch:
    num_tokens: int
    tokens: torch.Tensor
    """[Tp]; padding is token 0"""
    positions: torch.Tensor
    """[Tp]"""
    write_rows: torch.Tensor
    """[Tp * 2 * Hk] cache rows of each token's keys and values; padding goes to the null page"""
    query_rows: torch.Tensor
    """[N * Hk * QUERY_TILE * G] rows of [Tp * (Hq + Hk)]"""
    context: tuple[torch.Tensor, ...]
    """B times [2 * N * Hk * KEY_BLOCK / page_size] cache pages of each tile's key block"""
    bias: tuple[torch.Tensor, ...]
    """B times [N * Hk, QUERY_TILE * G, KEY_BLOCK] 0 where the query may look, else -inf"""
    output_rows: torch.Tensor
    """[Tp * Hq] rows of the attention output [N * Hk * QUERY_TILE * G]"""
    logit_rows: torch.Tensor
    """[R padded] the token rows that yield logits"""


def make_batch(chunks: Seq[Chunk], layout: CacheLayout, device: torch.device) -> Batch:
    """At least one chunk."""
    lengths: _Ints = np.array([chunk.length for chunk in chunks])
    starts: _Ints = np.array([chunk.start for chunk in chunks])
    ends = np.cumsum(lengths)
    first = ends - lengths
    total = int(ends[-1])
    chunk_of: _Ints = np.repeat(np.arange(len(chunks)), lengths)
    within = np.arange(total) - first[chunk_of]
    position = starts[chunk_of] + within
    table = _block_table(chunks, layout.page_size)

    tokens: _Ints = np.zeros(padded(total), dtype=np.int64)
    tokens[:total] = [t for c in chunks for t in c.sequence.tokens[c.start : c.start + c.length]]
    positions = np.zeros_like(tokens)
    positions[:total] = position
    pages = np.full_like(tokens, NULL_PAGE)
    pages[:total] = table[chunk_of, position // layout.page_size]

    tiles = -(-lengths // QUERY_TILE)
    first_tile = np.cumsum(tiles) - tiles
    tile_of_token = first_tile[chunk_of] + within // QUERY_TILE
    tile_chunk: _Ints = np.repeat(np.arange(len(chunks)), tiles)
    offset = (np.arange(len(tile_chunk)) - first_tile[tile_chunk]) * QUERY_TILE
    lane = np.minimum(
        np.arange(QUERY_TILE), (lengths[tile_chunk] - offset)[:, None] - 1
    )  # spare lanes repeat
    token_of_lane = (first[tile_chunk] + offset)[:, None] + lane

    samples = [row for row, chunk in zip(ends - 1, chunks, strict=True) if chunk.samples]
    logit_rows: _Ints = np.zeros(padded(len(samples)), dtype=np.int64)
    logit_rows[: len(samples)] = samples

    blocks = int(position.max()) // KEY_BLOCK + 1
    seen = position[token_of_lane]
    return Batch(
        num_tokens=total,
        tokens=torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(positions).to(device),
        write_rows=_write_rows(pages, positions, layout).to(device),
        query_rows=_query_rows(token_of_lane, layout).to(device),
        context=tuple(_context(table[tile_chunk], block, layout).to(device) for block in range(blocks)),
        bias=tuple(_bias(seen, block, layout).to(device) for block in range(blocks)),
        output_rows=_output_rows(tile_of_token, within % QUERY_TILE, len(tokens), layout).to(device),
        logit_rows=torch.from_numpy(logit_rows).to(device),
    )


def _block_table(chunks: Seq[Chunk], page_size: int) -> _Ints:
    """[chunks, pages] with null pages at the end, in whole key blocks."""
    block_pages = KEY_BLOCK // page_size
    most = max(len(chunk.sequence.pages) for chunk in chunks)
    table: _Ints = np.full((len(chunks), -(-most // block_pages) * block_pages), NULL_PAGE, dtype=np.int64)
    for row, chunk in zip(table, chunks, strict=True):
        row[: len(chunk.sequence.pages)] = chunk.sequence.pages
    return table


def _write_rows(pages: _Ints, positions: _Ints, layout: CacheLayout) -> torch.Tensor:
    planes = np.arange(2 * layout.num_kv_heads) * layout.total_pages
    rows = (planes + pages[:, None]) * layout.page_size + (positions % layout.page_size)[:, None]
    return torch.from_numpy(rows.reshape(-1))


def _query_rows(token_of_lane: _Ints, layout: CacheLayout) -> torch.Tensor:
    group = layout.num_heads // layout.num_kv_heads
    heads = np.arange(layout.num_heads).reshape(1, layout.num_kv_heads, 1, group)
    rows = token_of_lane[:, None, :, None] * (layout.num_heads + layout.num_kv_heads) + heads
    return torch.from_numpy(rows.reshape(-1))


def _context(table: _Ints, block: int, layout: CacheLayout) -> torch.Tensor:
    block_pages = KEY_BLOCK // layout.page_size
    pages = table[:, block * block_pages : (block + 1) * block_pages]
    planes = np.arange(2 * layout.num_kv_heads).reshape(2, 1, layout.num_kv_heads, 1) * layout.total_pages
    return torch.from_numpy((planes + pages[:, None, :]).reshape(-1))


def _bias(seen: _Ints, block: int, layout: CacheLayout) -> torch.Tensor:
    """`seen` [N, QUERY_TILE]: the last position that each query looks at, its own."""
    keys = np.arange(block * KEY_BLOCK, (block + 1) * KEY_BLOCK)
    hidden = np.where(keys <= seen[:, :, None], np.float32(0), np.float32(-np.inf))
    group = layout.num_heads // layout.num_kv_heads
    full = np.broadcast_to(
        hidden[:, None, :, None, :], (len(seen), layout.num_kv_heads, QUERY_TILE, group, KEY_BLOCK)
    )
    return torch.from_numpy(full.reshape(-1, QUERY_TILE * group, KEY_BLOCK))


def _output_rows(tile: _Ints, lane: _Ints, padded_tokens: int, layout: CacheLayout) -> torch.Tensor:
    group = layout.num_heads // layout.num_kv_heads
    heads = np.arange(layout.num_heads)
    kv_head, member = heads // group, heads % group
    rows: _Ints = np.zeros((padded_tokens, layout.num_heads), dtype=np.int64)
    tile_head = tile[:, None] * layout.num_kv_heads + kv_head
    rows[: len(tile)] = (tile_head * QUERY_TILE + lane[:, None]) * group + member
    return torch.from_numpy(rows.reshape(-1))
