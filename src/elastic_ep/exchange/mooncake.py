"""The exchange over Mooncake EP's elastic buffer: dispatch and combine are kernels, counts stay on the device.

The buffer (kvcache-ai/Mooncake, `mooncake_ep_buffer.Buffer.create_elastic`) needs no process group and has no rank
with a special role. Who takes part is a mask in device memory that its kernels read while they wait. So a mask
written on another stream ends a kernel that spins on a dead peer, and a captured graph survives every change of
membership.

HAZARD: the buffer alternates between two halves, and a captured graph remembers which. Every rank must perform an even
number of operations in all that it does, warm-up and capture included, or its halves are not those of its peers.

HAZARD: the kernels of all ranks wait for each other, so all of them must fit onto their devices at once. On a GPU shared
through MPS that is one block of 1024 threads for every 8 physical experts of the group, for every rank; without
MPS the ranks take turns, a time slice each.

HAZARD: a change of a mask waits for the whole device if any peer was connected since the last one, and holds the
interpreter lock meanwhile. In mid-step, with a dead peer, that is until the kernels give up. So what was connected is
taken in at the next boundary, where the device is idle; a death in the very step in which a peer was connected still
meets it.

HAZARD: under MPS the ranks also share their faults. A rank killed while its kernels ran took all others with it (an
illegal memory access in each) 10 times of 13, unless its memory stayed until they had ended: then 0 of 8 times (see
host/device_files.py). Killed between two steps, never (20 kills); without MPS never (16 kills).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch

from elastic_ep.config import CannotRun
from elastic_ep.exchange.base import ExchangeShape, Format, Received, Work
from elastic_ep.exchange.mooncake_needs import CPU_WHEEL, CUDA_WHEEL, EXPERTS_MULTIPLE, HIDDEN_MULTIPLE
from elastic_ep.exchange.peers import Peers
from elastic_ep.exchange.step_barrier import StepBarrier
from elastic_ep.exchange.store import IncarnationStore, PeerGone, Store
from elastic_ep.wire.messages import Member

_WIRE_MULTIPLE = 256
"""What combine's kernel takes; smaller hidden sizes are padded with zeros on the way."""


class MooncakeUnavailable(CannotRun):
    """This machine cannot run the exchange; the text says what is missing and what to do."""


def load_buffer_class() -> Any:
    """Mooncake's `Buffer`. Raises MooncakeUnavailable."""
    if not torch.cuda.is_available():
        raise MooncakeUnavailable("no CUDA device, or a driver too old for this torch; use --device cpu")
    try:
        # The native part first: the Python part imports without it and fails only later.
        importlib.import_module("mooncake.ep")
        return importlib.import_module("mooncake.mooncake_ep_buffer").Buffer
    except ImportError as error:
        raise MooncakeUnavailable(_explain(error)) from error


def buffer_bytes(shape: ExchangeShape) -> int:
    """Device memory that a rank's buffer takes. Raises MooncakeUnavailable."""
    hint = load_buffer_class().get_low_latency_buffer_size_hint
    return int(
        hint(shape.max_tokens, _padded(shape.hidden), shape.num_ranks, shape.num_ranks * shape.slots_per_rank)
    )


def _padded(hidden: int) -> int:
    return -(-hidden // _WIRE_MULTIPLE) * _WIRE_MULTIPLE


def _explain(error: ImportError) -> str:
    def installed(name: str) -> bool:
        with suppress(importlib.metadata.PackageNotFoundError):
            return bool(importlib.metadata.version(name))
        return False

    if "libibverbs" in str(error) or "libmlx5" in str(error):
        return f"Mooncake needs the libraries libibverbs1 and ibverbs-providers: {error}"
    if installed(CPU_WHEEL):
        return f"{CPU_WHEEL} is installed, which has no EP; uninstall it and install {CUDA_WHEEL}"
    if not installed(CUDA_WHEEL):
        return f"Mooncake is not installed: pip install {CUDA_WHEEL}"
    return f"Mooncake does not load: {error}"


class MooncakeExchange:
    """`DeviceExchange` on the current CUDA device.

    Nothing between `meet` and `end_step` waits for anything, so a step may be captured in a CUDA graph (`dispatch` and
    `combine` only). `read_masks` may be called before `end_step`, on the forward stream: then one wait serves the masks
    and whatever else is copied to the host.

    With `barrier`, `meet` returns when all who take part have begun the step (step_barrier.py says why); without it that
    is the caller's business, and nobody knows whom a step waits for.

    `timeout_ms` is how long a kernel waits for a peer before it masks it by itself: the last resort, if the control
    loop hangs too. `suspects` names those.
    """

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
        if shape.hidden % HIDDEN_MULTIPLE:
            raise ValueError(f"hidden is {shape.hidden}, but Mooncake needs a multiple of {HIDDEN_MULTIPLE}")
        if shape.num_ranks * shape.slots_per_rank % EXPERTS_MULTIPLE:
            raise ValueError(
                f"{shape.num_ranks} ranks with {shape.slots_per_rank} physical experts each: the group "
                f"needs a multiple of {EXPERTS_MULTIPLE}, give each rank an empty slot more"
            )
        buffer_class = load_buffer_class()
        self.shape = shape
        self.member = member
        self.suspects: frozenset[int] = frozenset()
        self._experts = shape.num_ranks * shape.slots_per_rank
        self._padding = _padded(shape.hidden) - shape.hidden
        self._peers = Peers(member, shape.num_ranks, shape.slots_per_rank)
        self._targets: frozenset[int] = frozenset()
        self._device = torch.device("cuda", torch.cuda.current_device())
        self.format = Format(
            self._device, torch.bfloat16, torch.int32, tile=None, ordered=False, zero_tail=False
        )
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
        self._side = torch.cuda.Stream(self._device, priority=-1)
        self._masks = torch.zeros(shape.num_ranks, dtype=torch.int32, device=self._device)
        self._masks_host = torch.zeros(shape.num_ranks, dtype=torch.int32, pin_memory=True)
        self._masks_read = torch.cuda.Event()
        self._reading = False
        self._handle: tuple[Any, ...] | None = None
        self._chosen: torch.Tensor | None = None
        self._operations = 0
        self._buffer = buffer_class.create_elastic(
            rank=member.rank,
            tcp_store_group=self._store,
            timeout_ms=timeout_ms,
            metadata_timeout_ms=connect_timeout_ms,
            explicitly_destroy=True,
        )
        self._buffer.update_memory_buffers(shape.num_ranks, shape.slots_per_rank, buffer_bytes(shape))

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
                self._buffer.disconnect_ranks([rank])
            self._store.incarnations[rank] = incarnation
            self._buffer.connect_ranks([rank], activate=False)
            self._connected[rank] = incarnation
            self._taken_in = False

    def activate(self, member: Member) -> None:
        if member.rank == self.member.rank:
            return
        with self._masking:
            self._peers.activate(member)
            if not self._peers.live[member.rank]:
                return
            with torch.cuda.stream(self._side):
                self._buffer.update_mask_buffer(member.rank, False)
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def mask(self, member: Member) -> None:
        """Does not wait for the device, but in the step in which a peer was connected (see the HAZARD above)."""
        with self._masking:
            was = self._peers.live[member.rank]
            self._peers.mask(member)  # a wait for it in `connect` ends by this
            if was and not self._peers.live[member.rank]:
                with torch.cuda.device(self._device), torch.cuda.stream(self._side):
                    self._buffer.update_mask_buffer(member.rank, True)

    def begin_step(self, step: int) -> None:
        """Tells the others. The kernels number operations by themselves."""
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

    def _take_in(self) -> None:
        """Repeat a mask as it is: that of a rank that takes no part, or none if all do, as they were activated since."""
        self._taken_in = True
        with self._masking:
            idle = next((rank for rank in sorted(self._connected) if not self._peers.live[rank]), None)
            if idle is not None:
                with torch.cuda.stream(self._side):
                    self._buffer.update_mask_buffer(idle, True)

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        packed, counts, self._handle, _, _ = self._buffer.dispatch(
            self._pad(x), physical_experts, self.shape.max_tokens, self._experts, use_fp8=False
        )
        self._chosen = physical_experts
        return Received(self._cut(packed), counts)

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self._handle is None or self._chosen is None:
            raise RuntimeError("dispatch and combine must alternate")
        combined, _, _ = self._buffer.combine(self._pad(y), self._chosen, weights, self._handle)
        self._handle = self._chosen = None
        return self._cut(combined)

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, self._padding)) if self._padding else x

    def _cut(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., : self.shape.hidden].contiguous() if self._padding else x

    def read_masks(self) -> None:
        """Queue a copy of the masks to the host on the current stream."""
        self._buffer.query_mask_buffer(self._masks)
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
        if self._buffer is not None:
            torch.cuda.synchronize(self._device)
            buffer, self._buffer = self._buffer, None
            buffer.destroy()
