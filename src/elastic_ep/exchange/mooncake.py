"""The exchange over Mooncake EP's elastic buffer: dispatch and combine are kernels, counts stay on the device.

The buffer (kvcache-ai/Mooncake, `mooncake_ep_buffer.Buffer.create_elastic`) needs no process group and has no rank
with a special role.

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
from contextlib import suppress
from typing import Any

import torch

from elastic_ep.config import CannotRun
from elastic_ep.exchange.base import ExchangeShape, Format, Received
from elastic_ep.exchange.device import BufferExchange
from elastic_ep.exchange.mooncake_needs import CPU_WHEEL, CUDA_WHEEL, EXPERTS_MULTIPLE, HIDDEN_MULTIPLE

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


class MooncakeExchange(BufferExchange):
    """`DeviceExchange` over Mooncake EP. Raises ValueError for a shape that it cannot carry, and MooncakeUnavailable.

    `mask` waits for the device in the step in which a peer was connected (see the HAZARD above).
    """

    def _check(self, shape: ExchangeShape) -> None:
        if shape.hidden % HIDDEN_MULTIPLE:
            raise ValueError(f"hidden is {shape.hidden}, but Mooncake needs a multiple of {HIDDEN_MULTIPLE}")
        if shape.num_ranks * shape.slots_per_rank % EXPERTS_MULTIPLE:
            raise ValueError(
                f"{shape.num_ranks} ranks with {shape.slots_per_rank} physical experts each: the group "
                f"needs a multiple of {EXPERTS_MULTIPLE}, give each rank an empty slot more"
            )

    def _open(self, timeout_ms: int, connect_timeout_ms: int) -> None:
        shape = self.shape
        self.format = Format(
            self._device, torch.bfloat16, torch.int32, tile=None, ordered=False, zero_tail=False
        )
        self._experts = shape.num_ranks * shape.slots_per_rank
        self._padding = _padded(shape.hidden) - shape.hidden
        self._handle: tuple[Any, ...] | None = None
        self._chosen: torch.Tensor | None = None
        self._side = torch.cuda.Stream(self._device, priority=-1)
        self._buffer = load_buffer_class().create_elastic(
            rank=self.member.rank,
            tcp_store_group=self._store,
            timeout_ms=timeout_ms,
            metadata_timeout_ms=connect_timeout_ms,
            explicitly_destroy=True,
        )
        self._buffer.update_memory_buffers(shape.num_ranks, shape.slots_per_rank, buffer_bytes(shape))

    def _connect(self, rank: int) -> None:
        self._buffer.connect_ranks([rank], activate=False)

    def _disconnect(self, rank: int) -> None:
        self._buffer.disconnect_ranks([rank])

    def _admit(self, rank: int) -> None:
        with torch.cuda.stream(self._side):
            self._buffer.update_mask_buffer(rank, False)
        torch.cuda.current_stream(self._device).wait_stream(self._side)

    def _exclude(self, rank: int) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            self._buffer.update_mask_buffer(rank, True)

    def _query(self, masks: torch.Tensor) -> None:
        self._buffer.query_mask_buffer(masks)

    def _destroy(self) -> None:
        self._buffer.destroy()

    def _take_in(self) -> None:
        """Repeat a mask as it is: that of a rank that takes no part, or none if all do, as they were activated since."""
        self._taken_in = True
        with self._masking:
            idle = next((rank for rank in sorted(self._connected) if not self._peers.live[rank]), None)
            if idle is not None:
                self._exclude(idle)

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
