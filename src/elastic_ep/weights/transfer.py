"""One-sided reads of other processes' memory, through Mooncake's TransferEngine.

A rank serves its registered memory; whoever knows its session and an address reads from there without its help.
What the library does, as seen with 0.3.13 over TCP, and what follows from it here:

* Importing it starts five threads: import it in the rank, never in the fork server.
* A read cannot be cancelled, and its first one from a stopped process blocks in the library for up to a minute, with
  a lock held that every other read through the same engine needs. So every read runs on a `_Lane`, an engine and a
  thread of its own, into the lane's own buffer. A read past its deadline is left to its lane, which comes back into
  use when the read has really ended; nothing it still writes can reach memory that matters.
* A read that failed is not over: when a link is back, its bytes may still come. So its buffer is never used again, nor
  freed. And a link that is cut, or a peer that is stopped, is waited for half a minute unless two settings say less.
* Its blocking calls release the interpreter lock, but spin on a core until the data is there. Here the lane submits,
  then asks with pauses.
* Destroying an engine takes a second with the interpreter lock held. So engines are never destroyed.
* An engine remembers a session for ever. Ports are reused, so a lane that failed with a session never tries it again.

HAZARD: the ports listen on every interface, whatever address is announced (MC_TCP_BIND_ADDRESS does not change that),
without authentication, and registered memory can be written by anyone who reaches them. They are chosen at random from
15000 to 17000, or from MC_MIN_RPC_PORT to MC_MAX_RPC_PORT: a firewall must let in only hosts of the group there.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from elastic_ep.wire.slot_messages import Region

_WHEELS = "mooncake-transfer-engine-non-cuda or mooncake-transfer-engine-cuda13"
_SETTINGS = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_TCP_ENABLE_CONNECTION_POOL": "1",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",
    "MC_TCP_STATUS_TIMEOUT_SEC": "2",
}
_GLOG_LEVEL, _FATAL = "_ZN3fLI17FLAGS_minloglevelE", 3
_COMPLETED, _FAILED = 1, -1
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 5e-5, 1e-2


class TransferUnavailable(RuntimeError):
    """The library cannot be used; the message says why, in one line."""


class PullFailed(RuntimeError):
    """The bytes did not come: the source is gone, refused, was too slow, or sent others than expected."""


class WrongBytes(PullFailed):
    """They came, and are others than expected: `checksum` instead."""

    def __init__(self, message: str, checksum: int) -> None:
        super().__init__(message)
        self.checksum = checksum


def open_plane(host: str = "127.0.0.1") -> TransferPlane | str:
    """This process's end of the state plane, or why there is none. Once in a process, after its fork.

    `host`: the address of this machine that peers dial.
    """
    apply_settings()
    try:
        return TransferPlane(host)
    except TransferUnavailable as reason:
        return str(reason)


def apply_settings() -> None:
    """Load the library with the environment variables that it needs, and silent, where the user chose nothing else.

    For the start of a rank, before the first `available` or `TransferPlane`. Without the connection pool every read
    makes a connection, and blocks while a stopped peer accepts none.
    """
    silent = "MC_LOG_LEVEL" not in os.environ
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with suppress(TransferUnavailable):
        _load()
        if silent:
            _silence()


def _silence() -> None:
    """Its own setting leaves errors on standard error: one at every engine's start, more when a peer dies.

    Those come as `PullFailed` anyway. What remains is the flag of the logging library (glog) inside.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/libglog" in line:
            with suppress(OSError, ValueError):
                library = ctypes.CDLL(line.split(maxsplit=5)[5])
                ctypes.c_int.in_dll(library, _GLOG_LEVEL).value = _FATAL
            return


def available() -> str | None:
    """None if reads from peers are possible, else the reason why not. HAZARD: loads the library, which starts threads."""
    try:
        _load()
    except TransferUnavailable as reason:
        return str(reason)
    return None


def _load() -> Any:
    try:
        return importlib.import_module("mooncake.engine")
    except ModuleNotFoundError:
        raise TransferUnavailable(f"Mooncake is not installed: pip install {_WHEELS}") from None
    except ImportError as error:
        text = " ".join(str(error).split())
        if "libibverbs" in text:
            raise TransferUnavailable(f"Mooncake needs the Debian package libibverbs1: {text}") from None
        raise TransferUnavailable(f"Mooncake does not load: {text}") from None


def _start_engine(host: str) -> Any:
    engine = _load().TransferEngine()
    if engine.initialize(host, "P2PHANDSHAKE", "tcp", "") != 0:
        raise TransferUnavailable(f"Mooncake's TransferEngine does not start on {host}")
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))  # never destroyed, see above
    return engine


class TransferPlane:
    """This process's end of the state plane: serves `register`ed memory, reads that of others.

    Raises `TransferUnavailable`. To be made in a rank after its fork. Every method may be called from any thread.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._server = _start_engine(host)
        self.session = f"{host}:{self._server.get_rpc_port()}"
        self._lock = threading.Lock()
        self._registered: list[int] = []
        self._idle: list[_Lane] = []
        self._lanes = 0

    @property
    def lanes(self) -> int:
        """How many reads have been under way at once, those past their deadline included."""
        return self._lanes

    def register(self, regions: Iterable[Region]) -> None:
        """Let others read `regions`, which must stay where they are until `close`."""
        regions = list(regions)
        addresses = [region.address for region in regions]
        if self._server.batch_register_memory(addresses, [region.nbytes for region in regions]) != 0:
            raise ValueError("memory regions overlap, or are registered already")
        self._registered += addresses

    def read(self, session: str, parts: Sequence[tuple[int, int]]) -> Read:
        """Begin to read `parts`, (address, bytes) each, of the process with `session`. Returns at once."""
        lane = self._lane_for(session)
        read = Read(session, parts, lane)
        lane.orders.put(read)
        return read

    def pull(
        self, session: str, remote_address: int, local_address: int, nbytes: int, deadline_s: float
    ) -> None:
        """Copy `nbytes` of another process's memory to this one's `local_address`, or leave that as it is.

        Raises PullFailed.
        """
        with self.read(session, [(remote_address, nbytes)]) as read:
            data = read.wait(deadline_s)
            ctypes.memmove(local_address, data.data_ptr(), nbytes)

    def close(self) -> None:
        """Serve nothing any more. HAZARD: a read that is under way goes on; keep the memory until the process ends."""
        self._server.batch_unregister_memory(self._registered)
        self._registered = []
        with self._lock:
            idle, self._idle = self._idle, []
        for lane in idle:
            lane.orders.put(None)

    def _lane_for(self, session: str) -> _Lane:
        with self._lock:
            usable = [lane for lane in self._idle if session not in lane.failed]
            known = [lane for lane in usable if session in lane.opened]
            if usable:
                lane = (known or usable)[-1]
                self._idle.remove(lane)
                return lane
            self._lanes += 1
        return _Lane(_start_engine(self._host), self._take_back)

    def _take_back(self, lane: _Lane) -> None:
        with self._lock:
            self._idle.append(lane)


class Read:
    """A read under way. `wait` for its data, use them, then `release` (or leave the `with` block)."""

    def __init__(self, session: str, parts: Sequence[tuple[int, int]], lane: _Lane) -> None:
        self.session = session
        self.parts = parts
        self.nbytes = sum(nbytes for _, nbytes in parts)
        self._lane = lane
        self._ended = threading.Event()
        self._released = threading.Event()
        self._error: str | None = None
        self.given_back = False

    def wait(self, deadline_s: float) -> torch.Tensor:
        """The bytes of all parts, one after the other, [nbytes] uint8: a view that is valid until `release`.

        Raises PullFailed, after `deadline_s` seconds at the latest.
        """
        if not self._ended.wait(deadline_s):
            raise PullFailed(f"{self.nbytes} bytes from {self.session} did not come within {deadline_s:g} s")
        if self._error is not None:
            raise PullFailed(f"{self.nbytes} bytes from {self.session}: {self._error}")
        return self._lane.buffer[: self.nbytes]

    def release(self) -> None:
        """Give the buffer back."""
        self._released.set()
        self._lane.settle(self)

    def end(self, error: str | None) -> None:
        """Called by the lane: the library writes no more."""
        self._error = error
        self._ended.set()
        self._lane.settle(self)

    @property
    def settled(self) -> bool:
        return self._ended.is_set() and self._released.is_set()

    def __enter__(self) -> Read:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class _Lane:
    """An engine, the thread that speaks to it, and the buffer it writes to. Carries out one read at a time."""

    def __init__(self, engine: Any, take_back: Callable[[_Lane], None]) -> None:
        self._engine = engine
        self._take_back = take_back
        self._lock = threading.Lock()
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.opened: set[str] = set()
        self.failed: set[str] = set()
        """Sessions whose reads failed: what the engine remembers of them may be of a process before."""
        self._quarantine: list[torch.Tensor] = []
        """Buffers of reads that failed: something may still come for them."""
        self.orders: queue.SimpleQueue[Read | None] = queue.SimpleQueue()
        threading.Thread(target=self._main, name="pull", daemon=True).start()

    def settle(self, read: Read) -> None:
        """Back to the idle ones, once, when the library has ended `read` and its user has released it."""
        with self._lock:
            if not read.settled or read.given_back:
                return
            read.given_back = True
        self._take_back(self)

    def _main(self) -> None:
        while (read := self.orders.get()) is not None:
            error = self._carry_out(read)
            if error is None:
                self.opened.add(read.session)
            else:
                self.failed.add(read.session)
                self._quarantine.append(self.buffer)
                self.buffer = torch.empty(0, dtype=torch.uint8)
            read.end(error)

    def _carry_out(self, read: Read) -> str | None:
        if len(self.buffer) < read.nbytes:
            self.buffer = torch.empty(read.nbytes, dtype=torch.uint8)
        local, batches = self.buffer.data_ptr(), []
        began = time.perf_counter()
        for address, nbytes in read.parts:
            # One batch a part: the library tells the state of a batch's first part only, short of spinning.
            batches.append(self._engine.batch_transfer_async_read(read.session, [local], [address], [nbytes]))
            local += nbytes
        # All of them, also when one has failed: the buffer is not free before.
        states = [self._end_of(batch, began) for batch in batches]
        if 0 in batches:
            return "the source does not answer"
        return None if all(state == _COMPLETED for state in states) else "the source is gone, or refused"

    def _end_of(self, batch: int, began: float) -> int:
        if batch == 0:
            return _FAILED
        while (state := int(self._engine.transfer_check_status(batch))) not in (_COMPLETED, _FAILED):
            # In proportion to what has passed: late by a twentieth at most, and few calls for a long read.
            passed = time.perf_counter() - began
            time.sleep(min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, passed / 20)))
        return state
