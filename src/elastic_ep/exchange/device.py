"""An exchange on GPUs, whatever carries the rows: who takes part, connecting, masks, and how a step begins and ends.

Who takes part is a mask that kernels read while they wait. So masking ends a kernel that spins on a dead peer, and a
captured graph survives every change of membership.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection

import torch

from elastic_ep.exchange.base import ExchangeShape, Format, Received, Work
from elastic_ep.exchange.peers import Peers
from elastic_ep.exchange.step_barrier import StepBarrier
from elastic_ep.exchange.store import IncarnationStore, PeerGone, Store
from elastic_ep.wire.messages import Member


class BufferExchange(ABC):
    """`DeviceExchange` on the current CUDA device.

    Nothing between `meet` and `end_step` waits for anything, so a step may be captured in a CUDA graph (`dispatch` and
    `combine` only). `read_masks` may be called before `end_step`, on the forward stream: then one wait serves the masks
    and whatever else is copied to the host.

    With `barrier`, `meet` returns when all who take part have begun the step (step_barrier.py says why); without it that
    is the caller's business, and nobody knows whom a step waits for.

    `timeout_ms` is how long a kernel waits for a peer before it masks it by itself: the last resort, if the control
    loop hangs too. `suspects` names those.
    """

    format: Format

    def __init__(
        self,
        shape: ExchangeShape,
        member: Member,
        store: Store,
        *,
        barrier: StepBarrier | None = None,
        timeout_ms: int,
        connect_timeout_ms: int,
    ) -> None:
        self._check(shape)
        self.shape = shape
        self.member = member
        self.suspects: frozenset[int] = frozenset()
        self._peers = Peers(member, shape.num_ranks, shape.slots_per_rank)
        self._targets: frozenset[int] = frozenset()
        self._barrier = barrier
        self._step: int | None = None
        self._ended: int | None = None
        """The step that has ended last, if there were others in it."""
        self._mine = Work(0, 0)
        self._store = IncarnationStore(store, self._is_wanted)
        self._store.incarnations[member.rank] = member.incarnation
        self._connected: dict[int, int] = {}
        self._wanted: dict[int, int] = {}
        """By rank, the newest incarnation that somebody connects to, or has."""
        self._taken_in = True
        """Whether a boundary has passed since the last peer was connected."""
        self._connecting = threading.Lock()
        self._masking = threading.Lock()
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._masks = torch.zeros(shape.num_ranks, dtype=torch.int32, device=self._device)
        self._masks_host = torch.zeros(shape.num_ranks, dtype=torch.int32, pin_memory=True)
        self._masks_read = torch.cuda.Event()
        self._reading = False
        self._operations = 0
        self._closed = False
        self._open(timeout_ms, connect_timeout_ms)

    @abstractmethod
    def _check(self, shape: ExchangeShape) -> None:
        """Before anything touches a device. Raises ValueError for a shape that cannot be carried."""

    @abstractmethod
    def _open(self, timeout_ms: int, connect_timeout_ms: int) -> None:
        """Make the own buffer, and `format`."""

    @abstractmethod
    def _connect(self, rank: int) -> None:
        """Exchange addresses with this rank, by `self._store`. Raises what the store raises."""

    @abstractmethod
    def _disconnect(self, rank: int) -> None:
        """It is masked, and its next incarnation is about to be connected."""

    @abstractmethod
    def _admit(self, rank: int) -> None:
        """Kernels wait for it and send to it from the next step on. At a boundary."""

    @abstractmethod
    def _exclude(self, rank: int) -> None:
        """Kernels no longer wait for it, those that run included. Any thread."""

    @abstractmethod
    def _query(self, masks: torch.Tensor) -> None:
        """Queue: whom kernels take for masked, masks [ranks] int32."""

    @abstractmethod
    def _destroy(self) -> None: ...

    @abstractmethod
    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received: ...

    @abstractmethod
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor: ...

    def _take_in(self) -> None:
        """At the first boundary after a peer was connected: the device is idle."""
        self._taken_in = True

    @property
    def waiting_for(self) -> int | None:
        """A live rank that is behind this one, if a step is in progress: the device does not tell more."""
        step, barrier = self._step, self._barrier
        if step is None or barrier is None:
            return None
        return next((rank for rank in self.live if barrier.of(rank) < step), None)

    @property
    def operations(self) -> int:
        """Of all steps that have ended."""
        return self._operations

    @property
    def live(self) -> frozenset[int]:
        """Ranks that take part, this one included. Any thread."""
        return frozenset(rank for rank, live in enumerate(self._peers.live) if live)

    def route_to(self, ranks: Collection[int]) -> None:
        """The ranks that the routing tables name from now on: one of them that is not live poisons each step."""
        self._targets = frozenset(ranks)

    def connect(self, member: Member) -> None:
        """Exchange addresses with `member`, which must do the same now: give it a thread of its own.

        Raises what the store raises if the peer does not come, PeerGone as soon as that is certain.
        """
        rank, incarnation = member
        self._wanted[rank] = max(incarnation, self._wanted.get(rank, -1))
        with self._connecting, torch.cuda.device(self._device):
            known = self._connected.get(rank, -1)
            if rank == self.member.rank or known >= incarnation:
                return
            if not self._is_wanted(member):
                raise PeerGone(f"{member} is gone")
            if known >= 0:
                del self._connected[rank]
                self._disconnect(rank)
            self._store.incarnations[rank] = incarnation
            self._connect(rank)
            self._connected[rank] = incarnation
            self._taken_in = False

    def activate(self, member: Member) -> None:
        if member.rank == self.member.rank:
            return
        with self._masking:
            self._peers.activate(member)
            if self._peers.live[member.rank]:
                self._admit(member.rank)

    def mask(self, member: Member) -> None:
        with self._masking:
            was = self._peers.live[member.rank]
            self._peers.mask(member)  # a wait for it in `connect` ends by this
            if was and not self._peers.live[member.rank]:
                self._exclude(member.rank)

    def begin_step(self, step: int) -> None:
        """Tells the others."""
        self._peers.begin_step()
        self._reading = False
        if not self._taken_in:
            self._take_in()
        if self._barrier is not None and len(self.live) > 1:
            self._barrier.say(step)
            self._step = step

    def meet(self, work: Work) -> None:
        self._mine = work
        if self._barrier is not None and self._step is not None:
            self._barrier.say_work(self._step, work)
            self._barrier.wait_for(self._step, lambda: self.live)

    def work(self) -> Work:
        """What is known without a barrier is this rank's own."""
        barrier, step = self._barrier, self._ended
        if barrier is None or step is None:
            return self._mine
        works = [barrier.work_of(rank, step) for rank in self.live - {self.member.rank}] + [self._mine]
        return Work(max(work.prompt_tokens for work in works), sum(work.decodes for work in works))

    def read_masks(self) -> None:
        """Queue a copy of the masks to the host on the current stream."""
        self._query(self._masks)
        self._masks_host.copy_(self._masks, non_blocking=True)
        self._masks_read.record()
        self._reading = True

    def end_step(self) -> frozenset[int]:
        """Waits for the step's results."""
        if not self._reading:
            self.read_masks()
        self._masks_read.synchronize()
        self._reading = False
        self._step, self._ended = None, self._step
        self._operations += self.shape.operations_per_step
        lost = set(self._peers.end_step())
        live = self.live
        masked = {rank for rank, value in enumerate(self._masks_host.tolist()) if value}
        self.suspects = frozenset(masked & live)
        return frozenset(lost | self.suspects | (self._targets - live))

    def _is_wanted(self, member: Member) -> bool:
        newest = self._wanted.get(member.rank, member.incarnation)
        return newest <= member.incarnation and not self._peers.is_masked(member)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            torch.cuda.synchronize(self._device)
            self._destroy()
