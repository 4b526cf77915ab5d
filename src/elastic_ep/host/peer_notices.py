"""Tells ranks of a peer's death straight from the thread that heard of it.

A loss is a view, which comes in its order over the one PUB socket. But survivors are in mid-step and wait for the dead,
while the run process's event loop may be busy with its clients. That a member is dead is a fact without order: it may
come before the view, after it, twice or never. So it goes past the loop, as one datagram to each rank.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from elastic_ep.wire.messages import Member

_NOTICE = struct.Struct("qq")


def _address(directory: Path, member: Member) -> str:
    return str(directory / f"notices-{member.rank}.{member.incarnation}")


class NoticeSender:
    """Any thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def tell(self, dead: Member, others: Iterable[Member]) -> None:
        """Who is not there, or does not listen, hears of it by the view."""
        notice = _NOTICE.pack(*dead)
        for member in others:
            with suppress(OSError):
                self._socket.sendto(notice, _address(self._directory, member))

    def close(self) -> None:
        self._socket.close()


class NoticeReader:
    """`on_death` is called on the running event loop. `directory` is private to the group."""

    def __init__(self, directory: Path, me: Member, on_death: Callable[[Member], None]) -> None:
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(_address(directory, me))
        self._loop.add_reader(self._socket, self._read)

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while True:
                notice = self._socket.recv(_NOTICE.size + 1)
                if len(notice) == _NOTICE.size:
                    self._on_death(Member(*_NOTICE.unpack(notice)))

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()
