"""The exchange over memory that all ranks can address, whatever wakes them.

A rank puts its tokens into its own outbox once, and says so by writing one word; whoever owns an expert fetches
what is meant for it out of all outboxes with one gather. Results go back with one scatter into the boxes of the
sources. So an operation costs a rank a handful of vectorised calls, one word and one wake-up, however many peers
there are: with more processes than cores it is the work per operation that counts, not the latency of a message.

Why one outbox and one box a rank are enough, without double buffering. In operation n a rank writes, posts n,
waits until every live peer has posted n, and reads. Dispatch and combine alternate.

* Outbox of r, written in dispatch n and again in dispatch n + 2. A peer reads it in n before it posts n + 1, and
  r passes n + 1 only after that post: nobody reads any more when r writes again.
* Box of r, written by an owner in combine n + 1 and again in n + 3. The owner enters n + 3 after it has passed
  n + 2, which r posts after it has read its box in n + 1.
* A joiner's outbox and box are touched by nobody before its first step, and at that boundary all others stand
  in the same operation.
* A masked peer may have been killed in mid-write: in its own outbox, which nobody reads any more, or in box rows
  whose owner it is, which count as zero. The step is poisoned anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.exchange.base import NO_EXPERT, TILE, ExchangeShape, Received
from elastic_ep.exchange.peers import Peers
from elastic_ep.exchange.windows import LINE, Windows
from elastic_ep.messages import Member

STRIDE = LINE // 8
"""Words (int64) from one rank's first to the next rank's."""

_TOKENS = 1

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[Any]


class Bell(Protocol):
    """How ranks tell each other that an operation's data is there."""

    def post(self, rank: int, number: int) -> None:
        """Publish `number` as `rank`'s last operation, after everything this thread wrote before."""
        ...

    def wait(self, rank: int, number: int, live: list[bool]) -> None:
        """Return once `rank` has posted `number` or more, or soon after `live[rank]` has become False."""
        ...

    def ring(self, rank: int) -> None:
        """Make everybody who waits for `rank` look again. Any thread."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Arrived:
    """Where a dispatch's rows lie: `place` in the packed rows, `target` in all boxes seen as rows."""

    place: Integers
    target: Integers
    rows: int


_NOTHING = _Arrived(np.zeros(0, np.int64), np.zeros(0, np.int64), 0)


class PullExchange:
    """`Exchange` over a buffer laid out as `Windows`, with `bell` to wake and wait."""

    def __init__(self, buffer: memoryview, shape: ExchangeShape, member: Member, bell: Bell) -> None:
        self.shape = shape
        self.member = member
        self._peers = Peers(member, shape.num_ranks)
        self._bell = bell
        self._order = [(member.rank + offset) % shape.num_ranks for offset in range(1, shape.num_ranks)]
        self._waiting_for: int | None = None
        self._operations = 0
        self._number = 0
        self._last = 0
        self._arrived = _NOTHING
        self._packed = np.zeros((0, shape.hidden), np.float32)
        self._tokens = 0
        self._some_nowhere = False
        self._map(buffer)
        # An earlier incarnation may have left tokens here. Nobody reads them before this one is activated.
        self._my_experts.fill(NO_EXPERT)

    def _map(self, buffer: memoryview) -> None:
        shape, windows = self.shape, Windows.layout(self.shape)
        ranks, tokens, top_k, hidden = shape.num_ranks, shape.max_tokens, shape.top_k, shape.hidden

        def part(offset: int, dtype: Any, *sizes: int) -> Any:
            return np.frombuffer(buffer, dtype, int(np.prod(sizes)), offset).reshape(sizes)

        # Two views of the same words: one by one a memoryview is the faster, all at once an array.
        self._posted = buffer[: windows.experts].cast("B").cast("q")
        self._sent: Integers = part(windows.words, np.int64, ranks, STRIDE)[:, _TOKENS]
        self._experts: Integers = part(windows.experts, np.int32, ranks, tokens, top_k)
        self._x: Floats = part(windows.x, np.float32, ranks * tokens + 1, hidden)
        self._boxes: Floats = part(windows.boxes, np.float32, ranks * tokens * top_k, hidden)
        me = self.member.rank
        self._my_experts = self._experts[me]
        self._my_x = self._x[me * tokens : (me + 1) * tokens]
        self._my_box = self._boxes.reshape(ranks, tokens, top_k, hidden)[me]

    @property
    def waiting_for(self) -> int | None:
        return self._waiting_for

    @property
    def operations(self) -> int:
        return self._operations

    def connect(self, member: Member) -> None:
        """Nothing to do: all ranks' windows are mapped from the start."""

    def activate(self, member: Member) -> None:
        self._peers.activate(member)

    def mask(self, member: Member) -> None:
        self._peers.mask(member)
        self._bell.ring(member.rank)

    def begin_step(self, step: int) -> None:
        self._number = step * self.shape.operations_per_step
        self._last = self._number + self.shape.operations_per_step
        self._peers.begin_step()

    def end_step(self) -> frozenset[int]:
        if self._number != self._last:
            raise RuntimeError(f"{self._last - self._number} operations of this step were not performed")
        return self._peers.end_step()

    def close(self) -> None:
        """Let go of the memory. No operation may be in progress or follow."""
        self._last = self._number
        self._bell.close()

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        self._next_operation(combine=False)
        experts = physical_experts.numpy()
        self._check_tokens(x, experts)
        before, self._tokens = self._tokens, len(experts)
        self._my_x[: self._tokens] = x.numpy()
        self._my_experts[: self._tokens] = experts
        self._my_experts[self._tokens : before] = NO_EXPERT
        self._posted[self.member.rank * STRIDE + _TOKENS] = self._tokens
        if not self._peers.all_live:
            owners = np.unique(experts // self.shape.slots_per_rank)
            self._peers.miss(int(rank) for rank in owners if rank >= 0 and not self._peers.live[rank])
        self._post_and_wait()
        return self._gather()

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self._next_operation(combine=True)
        arrived, hidden = self._arrived, self.shape.hidden
        if tuple(weights.shape) != (self._tokens, self.shape.top_k):
            raise ValueError(f"weights {tuple(weights.shape)}: expected {(self._tokens, self.shape.top_k)}")
        rows = y.numpy().reshape(-1, hidden)
        if len(rows) != arrived.rows:
            raise ValueError(f"y has {len(rows)} rows, dispatch gave {arrived.rows}")
        self._boxes[arrived.target] = rows[arrived.place]
        self._post_and_wait()
        return torch.from_numpy(self._weighted_sum(weights.numpy()))

    def _next_operation(self, *, combine: bool) -> None:
        if self._number == self._last:
            raise RuntimeError("more operations than operations_per_step, or no step begun")
        if self._number % 2 != combine:
            raise RuntimeError("dispatch and combine must alternate")
        self._number += 1

    def _check_tokens(self, x: torch.Tensor, experts: Integers) -> None:
        shape = self.shape
        if experts.shape[1:] != (shape.top_k,) or tuple(x.shape) != (len(experts), shape.hidden):
            raise ValueError(f"x {tuple(x.shape)}, physical_experts {experts.shape}: do not fit {shape}")
        if len(experts) > shape.max_tokens:
            raise ValueError(f"{len(experts)} tokens, but max_tokens is {shape.max_tokens}")
        lowest = NO_EXPERT if experts.size == 0 else int(experts.min())
        if lowest < NO_EXPERT or (experts.size and experts.max() >= shape.num_ranks * shape.slots_per_rank):
            raise ValueError("a physical expert out of range")
        self._some_nowhere = lowest == NO_EXPERT

    def _post_and_wait(self) -> None:
        number, posted, live = self._number, self._posted, self._peers.live
        self._bell.post(self.member.rank, number)
        for rank in self._order:
            if live[rank] and posted[rank * STRIDE] < number:
                self._waiting_for = rank
                self._bell.wait(rank, number, live)
        self._waiting_for = None
        self._operations += 1

    def _gather(self) -> Received:
        """Fetch this rank's tokens, ordered by (slot, source rank, token, k)."""
        shape, live = self.shape, self._peers.live_array
        slots_here, top_k = shape.slots_per_rank, shape.top_k
        most = int((self._sent * live).max())
        slot = self._experts[:, :most] - np.int32(self.member.rank * slots_here)
        if not self._peers.all_live:
            slot[~live] = NO_EXPERT
        slot = slot.reshape(-1)
        hits = np.flatnonzero(slot.view(np.uint32) < slots_here)  # as unsigned, a negative slot is a huge one
        mine = slot[hits].astype(np.uint16 if slots_here < 2**16 else np.int64)
        order = np.argsort(mine, kind="stable")
        hits = hits[order]
        counts = np.bincount(mine, minlength=slots_here)
        capacity = TILE * max(1, -(-int(counts.max()) // TILE))
        shift = np.arange(slots_here) * capacity - (np.cumsum(counts) - counts)
        place = np.arange(len(hits)) + np.repeat(shift, counts)
        target = hits + hits // max(1, most * top_k) * ((shape.max_tokens - most) * top_k)
        self._arrived = _Arrived(place, target, slots_here * capacity)
        index = np.full(slots_here * capacity, len(self._x) - 1)  # the row that is always zero
        index[place] = target // top_k
        packed = np.take(self._x, index, axis=0, out=self._room(len(index)), mode="clip")
        return Received(
            torch.from_numpy(packed).view(slots_here, capacity, shape.hidden), torch.from_numpy(counts)
        )

    def _room(self, rows: int) -> Floats:
        if rows > len(self._packed):
            self._packed = np.zeros((2 * rows, self.shape.hidden), np.float32)
        return self._packed[:rows]

    def _weighted_sum(self, weights: Floats) -> Floats:
        """Sum over k, in order. One rounding for each product and each sum, so no result depends on the batch."""
        box = self._my_box[: self._tokens]
        if self._some_nowhere or not self._peers.all_live:
            experts = self._my_experts[: self._tokens]
            counted = (experts >= 0) & self._peers.live_array[experts // self.shape.slots_per_rank]
            # Not a product with zero: what lies in the box then may be anything, NaN too.
            box = np.where(counted[:, :, None], box, np.float32(0))
            weights = np.where(counted, weights, np.float32(0))
        total: Floats = box[:, 0] * weights[:, :1]
        for k in range(1, self.shape.top_k):
            total += box[:, k] * weights[:, k : k + 1]
        return total
