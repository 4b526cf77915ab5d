"""The exchange over memory that all ranks can address, whatever wakes them.

A rank puts its tokens into its own outbox once, and says so by writing one word; whoever owns an expert fetches
what is meant for it out of all outboxes with one gather. Results go back with one scatter into the boxes of the
sources. Only the last to arrive in an operation raises the alarm that wakes the others. So an operation costs a
rank some vectorised calls, one word and one sleep, however many peers there are: with more processes than cores
it is this work that counts, not the latency of a message.

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

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.exchange.base import ExchangeShape, Format, Received
from elastic_ep.exchange.peers import Peers
from elastic_ep.exchange.windows import LINE, Windows
from elastic_ep.wire.messages import Member

TILE = 16
"""Rows per expert tile."""

HOST_FORMAT = Format(torch.device("cpu"), torch.float32, torch.int64, tile=TILE, ordered=True, zero_tail=True)

STRIDE = LINE // 8
"""Words (int64) from one rank's first to the next rank's."""

_TOKENS = 1
INCARNATION, HERE = 2, 3

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class Bell(Protocol):
    """How ranks that share the windows wake each other: an alarm, heard by all, that is counted."""

    def alarms(self) -> int:
        """How many alarms there have been, or any other value that an alarm changes."""
        ...

    def raise_alarm(self) -> None:
        """Any thread."""
        ...

    def give_way(self) -> None:
        """Let others run on this core, if there are any who want to. Releases the GIL."""
        ...

    def sleep(self, alarms: int) -> None:
        """Return soon after an alarm has changed `alarms`, or earlier. Releases the GIL."""
        ...

    def fence(self) -> None:
        """Order the memory accesses before it and after it, for all ranks."""
        ...


class PullExchange:
    """`Exchange` over a buffer laid out as `Windows`, with `bell` to wake and wait."""

    format = HOST_FORMAT

    def __init__(
        self, buffer: memoryview, shape: ExchangeShape, member: Member, bell: Bell, *, carried: bool = False
    ) -> None:
        """`carried`: what this rank posts is told to other hosts."""
        self.shape = shape
        self.member = member
        self._peers = Peers(member, shape.num_ranks, shape.slots_per_rank)
        self._bell = bell
        self._order = [(member.rank + offset) % shape.num_ranks for offset in range(1, shape.num_ranks)]
        self._waits = False
        self._operations = 0
        self._number = 0
        self._last = 0
        self._tokens = 0
        self._target: Integers = np.zeros(0, np.int64)
        self._packed = self._rows(np.zeros((0, shape.hidden), np.float32))
        self._columns = np.arange(0)
        self._targets: dict[int, Integers] = {}
        self._map(buffer)
        if carried:  # what an earlier incarnation has posted must not be told as this one's
            self._words[member.rank * STRIDE] = 0
            bell.fence()
        self._words[member.rank * STRIDE + INCARNATION] = member.incarnation
        bell.fence()
        # An earlier incarnation may have left tokens here. Nobody reads them before this one is activated.
        self._my_experts.fill(-1)

    def _map(self, buffer: memoryview) -> None:
        shape, windows, me = self.shape, Windows.layout(self.shape), self.member.rank
        ranks, tokens, top_k, hidden = shape.num_ranks, shape.max_tokens, shape.top_k, shape.hidden

        def part(offset: int, dtype: Any, *sizes: int) -> Any:
            return np.frombuffer(buffer, dtype, int(np.prod(sizes)), offset).reshape(sizes)

        self._words = buffer[: windows.experts].cast("B").cast("q")
        self._experts = part(windows.experts, np.int32, ranks, tokens, top_k)
        x: Floats = part(windows.x, np.float32, windows.x_rows, hidden)
        boxes: Floats = part(windows.boxes, np.float32, windows.x_rows * top_k, hidden)
        self._my_experts = self._experts[me]
        self._my_x = x[me * tokens : (me + 1) * tokens]
        self._my_box = boxes[me * tokens * top_k : (me + 1) * tokens * top_k].reshape(tokens, top_k, hidden)
        self._x, self._boxes = self._rows(x), self._rows(boxes)
        self._waste = ranks * tokens * top_k + me
        self._my_slots = (me * shape.slots_per_rank + np.arange(shape.slots_per_rank, dtype=np.int32))[
            :, None, None, None
        ]

    def _rows(self, array: npt.NDArray[Any]) -> npt.NDArray[np.void]:
        """The rows of a matrix as single elements, which numpy moves several times faster than as rows."""
        return array.view(np.dtype((np.void, 4 * self.shape.hidden))).reshape(-1)

    @property
    def waiting_for(self) -> int | None:
        # Looked up when asked: not every peer that arrives wakes this rank.
        return self._missing(self._number) if self._waits else None

    @property
    def operations(self) -> int:
        return self._operations

    def connect(self, member: Member) -> None:
        """Nothing to do: all ranks' windows are mapped from the start."""

    def activate(self, member: Member) -> None:
        self._peers.activate(member)

    def mask(self, member: Member) -> None:
        self._peers.mask(member)
        self._bell.raise_alarm()

    def begin_step(self, step: int) -> None:
        self._number = step * self.shape.operations_per_step
        self._last = self._number + self.shape.operations_per_step
        self._peers.begin_step()

    def end_step(self) -> frozenset[int]:
        if self._number != self._last:
            raise RuntimeError(f"{self._last - self._number} operations of this step were not performed")
        return self._peers.end_step()

    def close(self) -> None:
        """No operation may be in progress or follow. The memory goes with the last tensor that lies in it."""
        self._last = self._number

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        self._next_operation(combine=False)
        experts: npt.NDArray[Any] = physical_experts.numpy()
        self._check(x, experts)
        before, tokens = self._tokens, len(experts)
        self._my_x[:tokens] = x.numpy()
        self._my_experts[:tokens] = experts
        if tokens < before:
            self._my_experts[tokens:before] = -1
        self._words[self.member.rank * STRIDE + _TOKENS] = tokens
        self._tokens = tokens
        self._meet()
        return self._gather()

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self._next_operation(combine=True)
        if tuple(weights.shape) != (self._tokens, self.shape.top_k):
            raise ValueError(f"weights {tuple(weights.shape)}: expected {(self._tokens, self.shape.top_k)}")
        rows = self._rows(y.numpy().reshape(-1, self.shape.hidden))
        if len(rows) != len(self._target):
            raise ValueError(f"y has {len(rows)} rows, dispatch gave {len(self._target)}")
        self._boxes[self._target] = rows
        self._meet()
        return torch.from_numpy(self._weighted_sum(weights.numpy()))

    def _next_operation(self, *, combine: bool) -> None:
        if self._number == self._last:
            raise RuntimeError("more operations than operations_per_step, or no step begun")
        if self._number % 2 != combine:
            raise RuntimeError("dispatch and combine must alternate")
        self._number += 1

    def _check(self, x: torch.Tensor, experts: npt.NDArray[Any]) -> None:
        """Raise ValueError if the arguments do not fit; note the ranks that do not take part and are sent to."""
        shape = self.shape
        if experts.shape[1:] != (shape.top_k,) or tuple(x.shape) != (len(experts), shape.hidden):
            raise ValueError(f"x {tuple(x.shape)}, physical_experts {experts.shape}: do not fit {shape}")
        if len(experts) > shape.max_tokens:
            raise ValueError(f"{len(experts)} tokens, but max_tokens is {shape.max_tokens}")
        try:
            reached: npt.NDArray[np.bool_] = self._peers.reachable[experts]
        except IndexError as error:
            raise ValueError("a physical expert out of range") from error
        if not reached.all():
            unreached = experts[~reached]
            if unreached.max() >= shape.num_ranks * shape.slots_per_rank or unreached.min() < -1:
                raise ValueError("a physical expert out of range")
            missed = set((unreached // shape.slots_per_rank).tolist())
            self._peers.miss(missed - {-1})

    def _post(self) -> None:
        """Say that this rank's data of the present operation is there."""
        self._bell.fence()
        self._words[self.member.rank * STRIDE] = self._number
        self._bell.fence()

    def _meet(self) -> None:
        """The last to arrive wakes all others.

        With more ranks than cores, letting the others run once is mostly enough, and costs half of what sleeping
        and being woken does. With a core for each rank it costs nothing.
        """
        self._post()
        bell, number = self._bell, self._number
        if self._missing(number) is None:
            bell.raise_alarm()
        else:
            self._waits = True
            bell.give_way()
            # The count is read before the words and the masks: what changes after that ends the sleep.
            alarms = bell.alarms()
            while self._missing(number) is not None:
                bell.sleep(alarms)
                alarms = bell.alarms()
            self._waits = False
            bell.fence()
        self._operations += 1

    def _missing(self, number: int) -> int | None:
        words, live = self._words, self._peers.live
        for rank in self._order:
            if words[rank * STRIDE] < number and live[rank]:
                return rank
        return None

    def _gather(self) -> Received:
        """Fetch this rank's tokens."""
        shape = self.shape
        live, words, slots = self._peers.live, self._words, shape.slots_per_rank
        most = max(
            [words[rank * STRIDE + _TOKENS] for rank in range(shape.num_ranks) if live[rank]], default=0
        )
        most = min(shape.max_tokens, 1 << (most - 1).bit_length() if most else 1)
        mine = self._experts[:, :most] == self._my_slots
        if not all(live):
            mine &= self._peers.live_array[:, None, None]
        found = mine.reshape(-1).nonzero()[0]
        counts = np.bincount(found // (mine.size // slots), minlength=slots)
        capacity = TILE * max(1, -(-max(counts.tolist()) // TILE))
        if capacity > len(self._columns):
            self._columns = np.arange(capacity)
        target = np.empty((slots, capacity), np.int64)
        target.fill(self._waste)
        target[self._columns[:capacity] < counts[:, None]] = self._target_of(most)[found]
        self._target = target = target.reshape(-1)
        if len(target) > len(self._packed):
            self._packed = self._rows(np.zeros((2 * len(target), shape.hidden), np.float32))
        packed = self._packed[: len(target)]
        self._x.take(target // shape.top_k, 0, packed, "clip")
        inputs = packed.view(np.float32).reshape(slots, capacity, shape.hidden)
        return Received(torch.from_numpy(inputs), torch.from_numpy(counts))

    def _target_of(self, most: int) -> Integers:
        """The row in all boxes of each (slot, rank, token < most, k). As many tables as there are powers of two."""
        if most not in self._targets:
            ranks, tokens, top_k = self._experts.shape
            rows = np.arange(ranks * tokens * top_k).reshape(ranks, tokens, top_k)[:, :most]
            self._targets[most] = np.tile(rows.reshape(-1), self.shape.slots_per_rank)
        return self._targets[most]

    def _weighted_sum(self, weights: Floats) -> Floats:
        """Sum over k, in order. One rounding for each product and each sum, so no result depends on the batch."""
        box = self._my_box[: self._tokens]
        counted = self._peers.reachable[self._my_experts[: self._tokens]]
        if not counted.all():
            # Not a product with zero: what lies in the box then may be anything, NaN too.
            box = np.where(counted[:, :, None], box, np.float32(0))
            weights = np.where(counted, weights, np.float32(0))
        total: Floats = box[:, 0] * weights[:, :1]
        for k in range(1, self.shape.top_k):
            total += box[:, k] * weights[:, k : k + 1]
        return total
