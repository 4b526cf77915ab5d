"""A process that holds one end of an exchange for the test process, which calls it through three pipes, its lanes.

Each lane has a thread here, so what must work in the middle of an operation does: a mask ends the wait of `FORWARD`.
"""

from __future__ import annotations

import os
import pickle
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.exchange.base import Exchange, ExchangeShape, Format, Received
from elastic_ep.wire.messages import Member

FORWARD, CONNECT, CONTROL = LANES = ("forward", "connect", "control")

Opener = Callable[[ExchangeShape, Member, str], Exchange]
"""Builds an end over what lies at a place in the file system. On the forward thread; given by name, so of a module."""


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their bytes."""


@dataclass(frozen=True)
class Sent:
    """A tensor on its way through a pipe, its bits as they are: torch would send its memory's descriptor, and numpy
    does not know bfloat16."""

    bits: npt.NDArray[np.integer[Any]]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Sent:
        # First `cpu`, which lets other threads run while it waits for the device: numpy(force=True) does not, and a mask
        # that is to end that wait would come after it.
        return cls(tensor.view(_INTEGERS[tensor.itemsize]).cpu().numpy(), tensor.dtype)

    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.bits).view(self.dtype)


@dataclass(frozen=True)
class Failure:
    error: Exception
    trace: str


class Host:
    """The end that this process has at present."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._exchange: Exchange | None = None

    def do(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Open an end and say its format, or a method or a property of the one that is open.

        Tensors go to the device of that format, and what comes from there must be of it.
        """
        if name == "open":
            self._exchange = self._opener(*arguments)
            return self._exchange.format
        assert self._exchange is not None
        form = self._exchange.format
        member = getattr(self._exchange, name)
        value = member(*(_there(one, form) for one in arguments)) if callable(member) else member
        if isinstance(value, Received):
            return _back(value.packed, form.rows, form), _back(value.counts, form.counts, form)
        return _back(value, form.rows, form) if isinstance(value, torch.Tensor) else value

    def serve(self, pipe: Connection) -> None:
        """Until the other side closes it."""
        while True:
            try:
                name, arguments = pipe.recv()
            except EOFError:
                return
            try:
                answer = self.do(name, arguments)
            except Exception as error:
                answer = Failure(_portable(error), traceback.format_exc())
            pipe.send(answer)


def _there(value: Any, form: Format) -> Any:
    return value.tensor().to(form.device) if isinstance(value, Sent) else value


def _back(tensor: torch.Tensor, dtype: torch.dtype, form: Format) -> Sent:
    if (tensor.dtype, tensor.device) != (dtype, form.device):
        raise TypeError(f"{tensor.dtype} on {tensor.device} from an exchange that declares {form}")
    return Sent.of(tensor)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def rank_main(
    lanes: Mapping[str, Connection],
    opener: Opener,
    warm_up: Callable[[], None],
    environment: Mapping[str, str],
) -> None:
    """Says on `FORWARD` when it is ready, or why not. Ends with `CONTROL`, whatever the other threads do."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    host = Host(opener)

    def forward() -> None:
        try:
            warm_up()
        except Exception as error:
            lanes[FORWARD].send(Failure(_portable(error), traceback.format_exc()))
            return
        lanes[FORWARD].send(None)
        host.serve(lanes[FORWARD])

    threading.Thread(target=forward, daemon=True).start()
    threading.Thread(target=host.serve, args=(lanes[CONNECT],), daemon=True).start()
    host.serve(lanes[CONTROL])
    os._exit(0)
