"""Rows to experts in other ranks' memory and back, by stores and loads of kernels: the peers are on this host.

Every rank has one block of device memory that all others map (`Layout`). To dispatch, a token's row is stored in the
memory of each rank that has one of its experts, in a part that only this rank writes; when all rows are there, one word
for each expert says how many, and the receiver waits for the words. The experts leave their results in the place of
the rows. To combine, a rank waits until each peer says that its results are there, and loads those of its own tokens.
That one-sided stores with a count as the flag do for a dispatch is the idea of DeepEP's low-latency kernels; that
results are fetched rather than sent needs no second set of buffers.

Why one block is enough: rows of the next layer are sent by a rank that has fetched its results of this one, and go to
the very places that it fetched from.

A word holds the number of its operation, so that none needs to be reset. Kernels that wait are of one program, so that
on a shared device there is room for what they wait for. A masked peer is not waited for. The host masks by a store into
its own memory, which kernels read while they wait: no call of CUDA can be held up by what another thread asks of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from elastic_ep.kernel import INTERPRETED, jit, power_of_2

if not INTERPRETED.value:
    from triton.language.extra.cuda import globaltimer
else:

    @jit
    def globaltimer() -> tl.tensor:
        return tl.full([], 0, tl.int64)


_EPOCHS = tl.constexpr(0x7FFFFFFF)
_LOOKS = tl.constexpr(32)
"""A waiting kernel looks at the host's memory once in so many rounds: that takes longer than a round."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A rank's block: rows [slots, ranks, tokens, hidden] of 16 bits, a word for each of [slots, ranks], one a rank."""

    slots: int
    ranks: int
    tokens: int
    hidden: int

    @property
    def words_at(self) -> int:
        rows = self.slots * self.ranks * self.tokens * self.hidden * 2
        return -(-rows // 16) * 16

    @property
    def ready_at(self) -> int:
        return self.words_at + 8 * self.slots * self.ranks

    @property
    def size(self) -> int:
        """Bytes."""
        return self.ready_at + 8 * self.ranks


@jit
def _send_kernel(
    x: tl.tensor,
    rows: tl.tensor,
    words: tl.tensor,
    chosen: tl.tensor,
    places: tl.tensor,
    sent: tl.tensor,
    done: tl.tensor,
    counts: tl.tensor,
    masks: tl.tensor,
    peers: tl.tensor,
    base: tl.tensor,
    operation: tl.tensor,
    me: tl.tensor,
    tokens: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_H)
    of_k = tl.arange(0, BLOCK_K)
    expert = tl.load(chosen + token * K + of_k, mask=of_k < K, other=-1).to(tl.int32)
    row = tl.load(x + token * H + lane, mask=lane < H, other=0.0)
    real = expert >= 0
    rank = tl.maximum(expert, 0) // SLOTS
    if RANKS > 1:
        real = real & (tl.load(masks + rank, mask=real, other=1) == 0)
    row_in_part = tl.atomic_add(sent + tl.maximum(expert, 0), 1, mask=real, sem="relaxed")
    real = real & (row_in_part < tokens)
    place = ((expert - rank * SLOTS) * RANKS + me) * tokens + row_in_part
    tl.store(places + token * K + of_k, tl.where(real, place, -1), mask=of_k < K)
    block = tl.multiple_of(tl.load(peers + rank, mask=real, other=0) // 2, [16])
    to = block + place.to(tl.int64) * H
    tl.store(
        rows + (to[:, None] + lane[None, :]),
        tl.broadcast_to(row[None, :], [BLOCK_K, BLOCK_H]),
        mask=real[:, None] & (lane < H)[None, :],
    )
    tl.debug_barrier()  # the stores of all threads come before the one that counts them
    if tl.atomic_add(done, 1, sem="acq_rel", scope="sys") == tl.num_programs(0) - 1:
        every = tl.arange(0, BLOCK_E)
        exists = every < SLOTS * RANKS
        count = tl.minimum(tl.atomic_xchg(sent + every, 0, mask=exists), tokens)
        tl.store(done, 0)
        if RANKS == 1:
            tl.store(counts + every, count, mask=exists)
        else:
            owner = every // SLOTS
            live = exists & (tl.load(masks + owner, mask=exists, other=1) == 0)
            epoch = (tl.load(base) + operation) & _EPOCHS
            word = (epoch << 32) | count.to(tl.int64)
            at = (every - owner * SLOTS) * RANKS + me + tl.load(peers + owner, mask=live, other=0) // 8
            tl.atomic_xchg(words + at, word, mask=live, sem="release", scope="sys")


@jit
def _arrive_kernel(
    words: tl.tensor,
    masks: tl.tensor,
    told: tl.tensor,
    counts: tl.tensor,
    base: tl.tensor,
    operation: tl.tensor,
    limit_ns: tl.tensor,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.arange(0, BLOCK)
    exists = at < PARTS
    source = at % RANKS
    epoch = (tl.load(base) + operation) & _EPOCHS
    _wait(words, masks, told, at, source, exists, epoch, 32, limit_ns)
    word = tl.atomic_add(words + at, 0, mask=exists, sem="acquire", scope="sys")
    masked = tl.load(masks + source, mask=exists, other=1, volatile=True)
    here = (masked == 0) & ((word >> 32) == epoch)
    tl.store(counts + at, tl.where(here, word & 0xFFFFFFFF, 0).to(tl.int32), mask=exists)


@jit
def _wait(
    words: tl.tensor,
    masks: tl.tensor,
    told: tl.tensor,
    at: tl.tensor,
    source: tl.tensor,
    exists: tl.tensor,
    epoch: tl.tensor,
    SHIFT: tl.constexpr,
    limit_ns: tl.tensor,
) -> None:
    """Until each word says `epoch` or its source is masked, here or by what the host has `told` (in its memory, so it
    is looked at now and then). Whoever has not come after `limit_ns` is masked."""
    began = globaltimer()
    late = 1
    looks = 0
    while late > 0:
        word = tl.load(words + at, mask=exists, other=0, volatile=True)
        masked = tl.load(masks + source, mask=exists, other=1, volatile=True)
        missing = exists & ((word >> SHIFT) != epoch) & (masked == 0)
        late = tl.sum(missing.to(tl.int32), axis=0)
        if looks % _LOOKS == 0:
            host = tl.load(told + source, mask=missing, other=0, volatile=True)
            gone = missing & ((host != 0) | (globaltimer() - began > limit_ns))
            tl.store(masks + source, tl.full(at.shape, 1, tl.int64), mask=gone)
        looks += 1


@jit
def _ready_kernel(
    ready: tl.tensor,
    masks: tl.tensor,
    peers: tl.tensor,
    base: tl.tensor,
    operation: tl.tensor,
    me: tl.tensor,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rank = tl.arange(0, BLOCK)
    exists = rank < RANKS
    live = exists & (tl.load(masks + rank, mask=exists, other=1) == 0)
    epoch = (tl.load(base) + operation) & _EPOCHS
    at = tl.load(peers + rank, mask=live, other=0) // 8 + me
    tl.atomic_xchg(ready + at, tl.zeros([BLOCK], tl.int64) + epoch, mask=live, sem="release", scope="sys")


@jit
def _done_kernel(
    ready: tl.tensor,
    masks: tl.tensor,
    told: tl.tensor,
    base: tl.tensor,
    operation: tl.tensor,
    limit_ns: tl.tensor,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rank = tl.arange(0, BLOCK)
    exists = rank < RANKS
    epoch = (tl.load(base) + operation) & _EPOCHS
    _wait(ready, masks, told, rank, rank, exists, epoch, 0, limit_ns)
    tl.atomic_add(ready + rank, 0, mask=exists, sem="acquire", scope="sys")


@jit
def _fetch_kernel(
    y: tl.tensor,
    rows: tl.tensor,
    chosen: tl.tensor,
    places: tl.tensor,
    weights: tl.tensor,
    masks: tl.tensor,
    peers: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = lane < H
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + token * K + k)
        rank = 0 * place
        real = place >= 0
        if RANKS > 1:
            rank = tl.maximum(tl.load(chosen + token * K + k).to(tl.int32), 0) // SLOTS
            real = real & (tl.load(masks + rank) == 0)
        block = tl.multiple_of(tl.load(peers + rank) // 2, 16)
        row = tl.load(rows + block + place.to(tl.int64) * H + lane, mask=exists & real, other=0.0)
        total += tl.load(weights + token * K + k) * row.to(tl.float32)
    tl.store(y + token * H + lane, total.to(y.dtype.element_ty), mask=exists)


class Ends:
    """What one rank's kernels need beside its block: all on its device, at addresses that never change."""

    def __init__(
        self,
        layout: Layout,
        me: int,
        top_k: int,
        operations: int,
        rows: torch.Tensor,
        words: torch.Tensor,
        ready: torch.Tensor,
    ) -> None:
        """`rows`, `words` and `ready` are the parts of the own block."""
        device = rows.device

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.layout = layout
        self.operations = operations
        """Of a step."""
        self._me = me
        self._rows, self._words, self._ready = rows, words, ready
        size = 1 + 2 * layout.ranks
        self._told = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        """What the host says: the number of the step's first operation, who is masked, and how many bytes from the own
        block each rank's is mapped. Copied at a step's begin."""
        self._state = zeros(size, dtype=torch.int64)
        masks = slice(1, 1 + layout.ranks)
        self._base, self.masks, self._peers = self._state[:1], self._state[masks], self._state[masks.stop :]
        self._told_masks = self._told[masks]
        self._told_masks[:] = 1
        self._told_masks[me] = 0
        self._sent = zeros(layout.ranks * layout.slots)
        self._done = zeros(1)
        self._counts = zeros(operations, layout.slots, layout.ranks)
        self._places = zeros(layout.tokens, top_k)

    def begin_step(self, step: int) -> None:
        """Operations are numbered on from those of the step before. Queues one copy on the current stream."""
        self._told[0] = (step + 1) * self.operations
        self._state.copy_(self._told, non_blocking=True)

    def admit(self, rank: int, offset: int) -> None:
        """From the next step on. `offset`: its block, in bytes from the own one."""
        self._told[1 + self.layout.ranks + rank] = offset
        self._told_masks[rank] = 0

    def mask(self, rank: int) -> None:
        """At once. Any thread; a store into memory."""
        self._told_masks[rank] = 1

    def send(self, x: torch.Tensor, chosen: torch.Tensor, operation: int) -> None:
        """x [T, hidden], chosen [T, K] int64 physical experts, each at most once a token, or -1; both contiguous.

        Raises ValueError for what there is no room for: what lies beyond belongs to somebody else.
        """
        layout = self.layout
        if x.shape[1] != layout.hidden or chosen.shape != (len(x), self._places.shape[1]):
            raise ValueError(f"rows {tuple(x.shape)}, experts {tuple(chosen.shape)} for {layout}")
        if len(x) > layout.tokens:
            raise ValueError(f"{len(x)} tokens, but there is room for {layout.tokens}")
        if not len(x):  # somebody must say so
            x, chosen = x.new_zeros(1, layout.hidden), chosen.new_full((1, chosen.shape[1]), -1)
        _send_kernel[(len(x),)](
            x,
            self._rows,
            self._words,
            chosen,
            self._places,
            self._sent,
            self._done,
            self._counts[operation],
            self.masks,
            self._peers,
            self._base,
            operation,
            self._me,
            layout.tokens,
            H=layout.hidden,
            K=chosen.shape[1],
            SLOTS=layout.slots,
            RANKS=layout.ranks,
            BLOCK_H=power_of_2(layout.hidden),
            BLOCK_K=power_of_2(chosen.shape[1]),
            BLOCK_E=power_of_2(layout.ranks * layout.slots),
            num_warps=8,
        )

    def arrive(self, operation: int, limit_ns: int) -> torch.Tensor:
        """counts [slots, ranks] int32, when all live peers have sent."""
        layout, counts = self.layout, self._counts[operation]
        if layout.ranks > 1:
            _arrive_kernel[(1,)](
                self._words,
                self.masks,
                self._told_masks,
                counts,
                self._base,
                operation,
                limit_ns,
                RANKS=layout.ranks,
                PARTS=layout.slots * layout.ranks,
                BLOCK=power_of_2(layout.slots * layout.ranks),
            )
        return counts

    def say_ready(self, operation: int) -> None:
        layout = self.layout
        if layout.ranks > 1:
            _ready_kernel[(1,)](
                self._ready,
                self.masks,
                self._peers,
                self._base,
                operation,
                self._me,
                RANKS=layout.ranks,
                BLOCK=power_of_2(layout.ranks),
                num_warps=1,
            )

    def fetch(
        self, chosen: torch.Tensor, weights: torch.Tensor, operation: int, limit_ns: int
    ) -> torch.Tensor:
        """[T, hidden]: the sum over k of weights[:, k] times the result of expert k, in float32, first to last."""
        layout, (tokens, top_k) = self.layout, chosen.shape
        if layout.ranks > 1:
            _done_kernel[(1,)](
                self._ready,
                self.masks,
                self._told_masks,
                self._base,
                operation,
                limit_ns,
                RANKS=layout.ranks,
                BLOCK=power_of_2(layout.ranks),
                num_warps=1,
            )
        y = torch.empty(tokens, layout.hidden, dtype=self._rows.dtype, device=chosen.device)
        if not tokens:
            return y
        block = min(1024, power_of_2(layout.hidden))
        _fetch_kernel[(tokens, triton.cdiv(layout.hidden, block))](
            y,
            self._rows,
            chosen,
            self._places,
            weights,
            self.masks,
            self._peers,
            H=layout.hidden,
            K=top_k,
            SLOTS=layout.slots,
            RANKS=layout.ranks,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )
        return y
