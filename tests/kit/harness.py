"""A launcher with its events, and processes seen from outside. Every wait has a deadline."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import msgspec

from elastic_ep.host.fork_messages import LaunchOptions, SharedFiles
from elastic_ep.host.keeper import AGENT, Keeper
from elastic_ep.host.server_process import ServerProcess
from elastic_ep.wire.host_messages import HostEvent, Launched
from elastic_ep.wire.messages import Member

DEADLINE_S = 20.0
T = TypeVar("T", bound=HostEvent)


class Hellos:
    """The pipe that the test ranks say hello into."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self._buffer = b""

    def next(self) -> dict[str, Any]:
        """Blocks; the event loop may wait: nothing else is to happen before the hello."""
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.read_end], [], [], DEADLINE_S)
            assert ready, "no hello in time"
            self._buffer += os.read(self.read_end, 65536)
        line, _, self._buffer = self._buffer.partition(b"\n")
        facts: dict[str, Any] = json.loads(line)
        return facts

    async def next_async(self) -> dict[str, Any]:
        return await anyio.to_thread.run_sync(self.next)

    def rest(self) -> list[dict[str, Any]]:
        """What is there already."""
        while select.select([self.read_end], [], [], 0)[0]:
            self._buffer += os.read(self.read_end, 65536)
        lines, self._buffer = self._buffer.splitlines(), b""
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


class Run:
    def __init__(self, hellos: Hellos) -> None:
        self.events: list[HostEvent] = []
        self.hellos = hellos
        self.launcher: Keeper
        self._changed = anyio.Event()

    def on_event(self, event: HostEvent) -> None:
        self.events.append(event)
        self._changed.set()
        self._changed = anyio.Event()

    async def expect(self, kind: type[T], where: Callable[[T], bool] = lambda _: True) -> T:
        """The first event of this kind, past or to come."""
        with anyio.fail_after(DEADLINE_S):
            while True:
                for event in self.events:
                    if isinstance(event, kind) and where(event):
                        return event
                await self._changed.wait()

    async def expect_any(self, kinds: tuple[type[Any], ...], member: Member) -> None:
        """An event of one of these kinds, of this member."""
        with anyio.fail_after(DEADLINE_S):
            while not any(isinstance(event, kinds) and event.member == member for event in self.events):
                await self._changed.wait()

    async def changed(self) -> None:
        """There is another event."""
        await self._changed.wait()

    async def launch(self, member: Member, do: str = "sleep", **config: Any) -> int:
        self.launcher.launch(member, msgspec.json.encode({"do": do, **config}).decode())
        return (await self.expect(Launched, lambda event: event.member == member)).pid

    async def up(self, member: Member, do: str = "sleep", **config: Any) -> dict[str, Any]:
        """Launched, said hello, watched."""
        await self.launch(member, do, **config)
        facts = await self.hellos.next_async()
        self.launcher.watch(member)
        return facts

    def of(self, member: Member) -> list[str]:
        """The names of this member's events, in order."""
        return [type(event).__name__ for event in self.events if getattr(event, "member", None) == member]


@asynccontextmanager
async def running(
    directory: Path, *, begun: ServerProcess | None = None, agent: str = AGENT, **options: Any
) -> AsyncIterator[Run]:
    hellos = Hellos()
    run = Run(hellos)
    settings = {"entry": "rank_entries:main", "preload": (), **options}
    try:
        options_ = LaunchOptions(directory=str(directory), **settings)
        files = SharedFiles(hellos.write_end, hellos.write_end)
        async with Keeper(options_, files, begun=begun, agent=agent) as run.launcher:
            with anyio.fail_after(60):
                await run.launcher.start(run.on_event)
            yield run
    finally:
        hellos.close()


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie (a container's init may not reap)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Poll for something that nothing announces; how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.005)
    return time.monotonic() - began


def title(pid: int) -> str:
    """What `ps` shows of the process."""
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0 ")
