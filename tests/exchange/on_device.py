"""An end on a GPU in a rank process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from elastic_ep.exchange.base import DeviceExchange, ExchangeShape, Work
from elastic_ep.exchange.device import BufferExchange
from elastic_ep.exchange.mooncake import MooncakeExchange, load_buffer_class
from elastic_ep.exchange.mooncake_needs import HIDDEN_MULTIPLE
from elastic_ep.exchange.peer_memory import PeerMemoryExchange
from elastic_ep.exchange.step_barrier import StepBarrier
from elastic_ep.timing import USUAL
from elastic_ep.wire.messages import Member
from tests.kit.file_store import FileStore


def open_mooncake(shape: ExchangeShape, member: Member, place: str) -> DeviceExchange:
    """`place` is the group's directory. On the thread that will use it, whose stream it sets."""
    return _open(MooncakeExchange, shape, member, place)


def open_peer_memory(shape: ExchangeShape, member: Member, place: str) -> DeviceExchange:
    """As `open_mooncake`."""
    return _open(PeerMemoryExchange, shape, member, place)


def _open(kind: type[BufferExchange], shape: ExchangeShape, member: Member, place: str) -> DeviceExchange:
    device = torch.device("cuda", member.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))
    directory = Path(place)
    return kind(
        shape,
        member,
        FileStore(directory),
        barrier=StepBarrier(directory, shape.num_ranks, member.rank),
        timeout_ms=20_000,
        connect_timeout_ms=USUAL.store_get_ms,
    )


def warm_up_mooncake() -> None:
    """A step without peers: whatever is compiled or loaded at first use is there before anybody waits for it.

    Raises MooncakeUnavailable.
    """
    load_buffer_class()
    _warm_up(open_mooncake)


def warm_up_peer_memory() -> None:
    _warm_up(open_peer_memory)


def _warm_up(open_end: Callable[[ExchangeShape, Member, str], DeviceExchange]) -> None:
    shape = ExchangeShape(2, 1, HIDDEN_MULTIPLE, 1, 1, operations_per_step=2)
    with tempfile.TemporaryDirectory() as place:
        end = open_end(shape, Member(0, 0), place)
        form = end.format
        end.route_to({0})
        end.begin_step(0)
        end.meet(Work(0, 0))
        x = torch.ones(1, shape.hidden, dtype=form.rows, device=form.device)
        received = end.dispatch(x, torch.zeros(1, 1, dtype=torch.int64, device=form.device))
        end.combine(received.packed, torch.ones(1, 1, device=form.device))
        end.end_step()
        end.close()
