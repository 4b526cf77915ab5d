"""An end over Mooncake in a rank process, for callers whose tensors are on the host, in float32, and small."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from elastic_ep.exchange.base import DeviceExchange, Exchange, ExchangeShape, Received, Work
from elastic_ep.exchange.mooncake import MooncakeExchange, load_buffer_class
from elastic_ep.exchange.mooncake_needs import HIDDEN_MULTIPLE
from elastic_ep.exchange.step_barrier import StepBarrier
from elastic_ep.timing import USUAL
from elastic_ep.wire.messages import Member
from tests.kit.file_store import FileStore

WIRE = torch.bfloat16


def carried(shape: ExchangeShape) -> ExchangeShape:
    """What Mooncake can do that is enough for `shape`.

    Its windows hold one row for each token and expert, as a gate never chooses an expert twice. The tests' tokens may.
    """
    hidden = -(-shape.hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
    return replace(shape, hidden=hidden, max_tokens=shape.max_tokens * shape.top_k)


class HostEnd:
    """`Exchange` over `inner`, which is of the shape `carried(shape)` and on `device`.

    Every operation ends with a copy to the host, so what follows finds the device idle. Rows from `counts` on are made
    zero, and the ranks that tokens went to become the step's route.
    """

    def __init__(self, inner: DeviceExchange, shape: ExchangeShape, device: torch.device) -> None:
        self._inner = inner
        self._shape = shape
        self._carried = carried(shape)
        self._device = device
        self._named: set[int] = set()

    @property
    def waiting_for(self) -> int | None:
        return self._inner.waiting_for

    @property
    def operations(self) -> int:
        return self._inner.operations

    def connect(self, member: Member) -> None:
        self._inner.connect(member)

    def activate(self, member: Member) -> None:
        self._inner.activate(member)

    def mask(self, member: Member) -> None:
        self._inner.mask(member)

    def begin_step(self, step: int) -> None:
        self._named.clear()
        self._inner.begin_step(step)
        self._inner.meet(Work(0, 0))

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        chosen = physical_experts[physical_experts >= 0]
        self._named.update((chosen // self._shape.slots_per_rank).tolist())
        received = self._inner.dispatch(self._sent(x), physical_experts.to(self._device))
        shape, expected = self._carried, (self._shape.slots_per_rank, self._capacity, self._carried.hidden)
        if tuple(received.packed.shape) != expected or received.counts.dtype != torch.int32:
            raise TypeError(f"received {received.packed.shape}, {received.counts.dtype} for {shape}")
        packed, counts = self._fetched(received.packed), received.counts.cpu()
        packed[torch.arange(self._capacity) >= counts[:, None]] = 0
        return Received(packed, counts)

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._fetched(self._inner.combine(self._sent(y), weights.to(self._device)))

    def end_step(self) -> frozenset[int]:
        self._inner.route_to(self._named)
        return self._inner.end_step()

    def close(self) -> None:
        self._inner.close()

    @property
    def _capacity(self) -> int:
        return self._carried.num_ranks * self._carried.max_tokens

    def _sent(self, rows: torch.Tensor) -> torch.Tensor:
        padding = self._carried.hidden - self._shape.hidden
        return torch.nn.functional.pad(rows, (0, padding)).to(self._device, WIRE)

    def _fetched(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.cpu().float()[..., : self._shape.hidden].contiguous()


def open_mooncake(shape: ExchangeShape, member: Member, place: str) -> Exchange:
    """`place` is the group's directory. On the thread that will use it, whose stream it sets."""
    device = torch.device("cuda", member.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))
    directory = Path(place)
    barrier = StepBarrier(directory, shape.num_ranks, member.rank)
    return HostEnd(
        MooncakeExchange(
            carried(shape),
            member,
            FileStore(directory),
            barrier=barrier,
            timeout_ms=20_000,
            connect_timeout_ms=USUAL.store_get_ms,
        ),
        shape,
        device,
    )


def warm_up_mooncake() -> None:
    """A step without peers: whatever is compiled or loaded at first use is there before anybody waits for it.

    Raises MooncakeUnavailable.
    """
    load_buffer_class()
    shape = ExchangeShape(2, 1, 1, 1, 1, operations_per_step=2)
    with tempfile.TemporaryDirectory() as place:
        end = open_mooncake(shape, Member(0, 0), place)
        end.begin_step(0)
        received = end.dispatch(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
        end.combine(received.packed, torch.ones(1, 1))
        end.end_step()
        end.close()
