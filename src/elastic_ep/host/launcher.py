"""Starts, fences and watches rank processes; lives on the agent's event loop.

A rank's life, as seen here: queued -> asked for (one at a time) -> running -> dying -> gone. Four things speak
of its end: the robust mutex (first, but only once watched), the pidfd (the process is gone), the fork server's
word (adds the exit status), and the life line, which works the other way: closing it kills the rank.

An agent may die while its ranks live. So before a rank is asked for, `tell` hears of it, with all that the next agent
needs: `adopt` takes it over.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import anyio

from elastic_ep.host import life_line
from elastic_ep.host.agent_messages import Adopt, Asked, ServerWanted
from elastic_ep.host.death_watch import MUTEX, DeathWatch
from elastic_ep.host.fork_client import ForkClient
from elastic_ep.host.fork_messages import (
    Exited,
    Fork,
    FromServer,
    LaunchOptions,
    Resynced,
    SharedFiles,
)
from elastic_ep.host.peer_notices import NoticeSender
from elastic_ep.host.robust_mutex import RobustMutexes
from elastic_ep.wire.host_messages import (
    Died,
    Launched,
    LaunchFailed,
    RankEvent,
    Reaped,
    ServerReady,
)
from elastic_ep.wire.messages import Member

UNKNOWN_STATUS = "unknown"


class Tell(Protocol):
    """Event loop. The descriptors stay the caller's."""

    def __call__(self, message: Asked | ServerWanted | ServerReady | RankEvent, /, *fds: int) -> None: ...


@dataclass(slots=True)
class _Process:
    """A rank's process, from the request for it until it is gone."""

    member: Member
    config_fd: int = -1
    slot: int = -1
    life_fd: int = -1
    pidfd: int = -1
    pid: int = 0
    server_pid: int | None = None
    """Of the fork server that is its parent and will know its exit status."""
    noticed: bool = False
    gone_ns: int | None = None
    timer: asyncio.TimerHandle | None = None


class Launcher:
    """Ranks inherit `files`; all descriptors given stay the caller's.

    `tell` hears what becomes of ranks and must not raise; `tell_at_once`, from another thread, of a death that the kernel
    has just told, before the survivors hear of it.
    """

    def __init__(
        self,
        options: LaunchOptions,
        files: SharedFiles,
        mutex_fd: int,
        tell: Tell,
        tell_at_once: Callable[[Died], None],
    ) -> None:
        self._options = options
        self._timing = options.timing
        self._files = (mutex_fd, *files)
        self._tell = tell
        self._tell_at_once = tell_at_once
        self._processes: dict[Member, _Process] = {}
        self._queue: deque[_Process] = deque()
        self._asked: _Process | None = None
        self._server: ForkClient | None = None
        self._server_wanted = False
        self._settled = True
        """It is known of every rank whether it was forked."""
        self._closing = False
        self._changed = anyio.Event()
        self._loop = asyncio.get_running_loop()
        self._mutexes = RobustMutexes(mutex_fd, options.mutexes)
        self._free_slots = deque(range(options.mutexes))
        self._death_watch = DeathWatch(self._mutexes, self._loop)
        self._notices = NoticeSender(Path(options.directory))

    async def close(self) -> None:
        """All ranks are killed, the fork server goes; returns when both are gone, or have had their time."""
        self._closing = True
        for process in list(self._queue):
            self._fail(process, "shutting down")
        self.kill_all()
        await self._in_time(lambda: not self._processes)
        if self._server is not None:
            if self._server.ready:
                self._server.hang_up()
            else:
                self._server.kill()  # it imports and does not listen; it has no ranks
            await self._in_time(lambda: self._server is None)
        if self._server is not None:
            self._server.kill()
            await self._in_time(lambda: self._server is None)
        for process in list(self._processes.values()):  # in uninterruptible sleep, if ever
            self._gone(process, UNKNOWN_STATUS)
        await self._in_time(lambda: not self._death_watch.busy_slots)
        self._notices.close()

    def launch(self, member: Member, config_fd: int) -> None:
        """`Launched` or `LaunchFailed` follows. The file with the configuration is this object's. ValueError if it was
        launched before."""
        if member in self._processes:
            raise ValueError(f"{member} is launched already")
        process = self._processes[member] = _Process(member, config_fd)
        self._queue.append(process)
        if self._closing:
            self._loop.call_soon(self._fail, process, "shutting down")
        elif self._server is None:
            self._want_server()
        else:
            self._loop.call_soon(self._ask)

    def adopt(self, rank: Adopt, life_fd: int, pidfd: int) -> None:
        """A rank that another agent has asked for; -1 for a descriptor that is not known. `all_adopted` follows."""
        process = _Process(rank.member, -1, rank.slot, life_fd, pidfd, rank.pid, rank.server_pid)
        self._processes[rank.member] = process
        self._free_slots.remove(rank.slot)
        if pidfd >= 0:
            self._loop.add_reader(pidfd, self._on_pidfd, process)

    def all_adopted(self) -> int:
        """How many there are."""
        for process in list(self._processes.values()):
            if process.pidfd < 0 and process.server_pid != self.server_pid:
                self._fail(process, "its fork server and the host's agent died while it was launched")
        adopted = len(self._processes)
        if self._server is not None and self._server.ready:
            self._settled = False
            self._server.resync()
        return adopted

    def watch(self, member: Member) -> None:
        """The rank says that it runs, so it holds its mutex: watch that. No effect if it is gone."""
        process = self._processes.get(member)
        if process is None or process.slot < 0 or process.slot in self._death_watch.busy_slots:
            return
        slot = process.slot

        def on_death(cause: str, at_ns: int) -> None:
            self._notice(process, cause, at_ns)

        def on_released() -> None:
            if self._processes.get(member) is not process:
                self._free_slots.append(slot)
            self._stir()

        def tell() -> None:
            # The controller first: it is to have lost the member before it hears of a step that did without.
            self._tell_at_once(Died(member, MUTEX, time.monotonic_ns()))
            self._notices.tell(member, [other for other in tuple(self._processes) if other != member])

        self._death_watch.watch(slot, on_death, on_released, tell)

    def kill(self, member: Member) -> None:
        """Fence: SIGKILL, in whatever state it is, stopped ones included. Idempotent; unknown is no error."""
        process = self._processes.get(member)
        if process is None:
            return
        if process in self._queue:
            self._loop.call_soon(self._fail, process, "fenced before it was launched")
            return
        if process.pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
        self._cut(process)

    def kill_all(self) -> None:
        for member in list(self._processes):
            self.kill(member)

    # Fork server

    @property
    def server_pid(self) -> int | None:
        return self._server.pid if self._server else None

    def server_begun(self, pid: int, control: socket.socket, pidfd: int, ready: bool) -> None:
        """There is a fork server; both descriptors are this object's."""
        self._server_wanted = False
        self._server = ForkClient(self._options, self._files, pid, control, pidfd, ready, self._on_message)

    def server_failed(self, reason: str) -> None:
        self._server_wanted = False
        for waiting in list(self._queue):
            self._fail(waiting, f"no fork server: {reason}")

    def server_exited(self, pid: int, status: str) -> None:
        if self._server is None or self._server.pid != pid:
            return
        was_ready = self._server.ready
        self._server.exited()
        self._server, self._settled = None, True
        if self._asked is not None:
            process, self._asked = self._asked, None
            self._fail(process, f"fork server: {status}")
        for process in list(self._processes.values()):
            if process.gone_ns is not None:
                self._gone(process, UNKNOWN_STATUS)
            elif process.pidfd < 0 and process not in self._queue:  # adopted, and never told of
                self._fail(process, f"fork server: {status}")
        if was_ready and not self._closing:
            self._want_server()
        else:
            for process in list(self._queue):
                self._fail(process, f"fork server: {status}")
        self._stir()

    def _want_server(self) -> None:
        if not self._server_wanted:
            self._server_wanted = True
            self._tell(ServerWanted())

    def _on_message(self, message: FromServer, fds: list[int]) -> None:
        match message:
            case ServerReady():
                self._tell(message)
            case Launched():
                self._on_launched(message, fds[0])
            case LaunchFailed(member, reason):
                self._answered(member)
                if child := self._processes.get(member):
                    self._fail(child, reason)
            case Exited(member, status):
                self._on_exited(member, status)
            case Resynced():
                self._settled = True
                for process in list(self._processes.values()):
                    if process.pidfd < 0 and process not in self._queue:
                        self._fail(process, "the host's agent died before it was launched")
        self._ask()
        self._stir()

    def _on_launched(self, launched: Launched, pidfd: int) -> None:
        self._answered(launched.member)
        process = self._processes.get(launched.member)
        if process is None or process.pidfd >= 0:  # said again
            os.close(pidfd)
            return
        process.pidfd, process.pid = pidfd, launched.pid
        self._tell(launched, pidfd)
        self._loop.add_reader(pidfd, self._on_pidfd, process)

    def _on_exited(self, member: Member, status: str) -> None:
        child = self._processes.get(member)
        if child is None:
            return
        if child.pidfd < 0:  # adopted: who was told that it was forked is dead
            self._fail(child, status)
            return
        self._notice(child, "reaped", time.monotonic_ns())
        self._gone(child, status)

    def _answered(self, member: Member) -> None:
        if self._asked is not None and self._asked.member == member:
            self._asked = None

    # Processes

    def _ask(self) -> None:
        """Ask for the next rank. One at a time, so that it is known which launch a dying server had in hand."""
        if not (self._server and self._server.ready and self._queue and self._settled):
            return
        if self._asked is not None:
            return
        process = self._queue.popleft()
        self._asked = process
        process.server_pid = self._server.pid
        try:
            process.slot = self._free_slots.popleft()
            self._mutexes.reset(process.slot)
            with ExitStack() as ours:
                read_end, process.life_fd = life_line.create()
                ours.callback(os.close, read_end)
                self._tell(Asked(process.member, process.slot, self._server.pid), process.life_fd)
                # Not heard: the server is dead, and `server_exited` is about to deal with this launch.
                self._server.fork(Fork(process.member, process.slot), read_end, process.config_fd)
        except (IndexError, OSError) as error:
            self._asked = None
            self._fail(process, f"no mutex or pipe: {error}")
            self._ask()

    def _on_pidfd(self, process: _Process) -> None:
        self._loop.remove_reader(process.pidfd)
        process.gone_ns = time.monotonic_ns()
        self._notice(process, "pidfd", process.gone_ns)
        orphan = process.server_pid != self.server_pid  # nobody knows its exit status
        wait_s = 0.0 if orphan else self._timing.status_ms / 1000
        process.timer = self._loop.call_later(wait_s, self._gone, process, UNKNOWN_STATUS)

    def _notice(self, process: _Process, cause: str, at_ns: int) -> None:
        if not process.noticed:
            process.noticed = True
            self._tell(Died(process.member, cause, at_ns))

    def _gone(self, process: _Process, status: str) -> None:
        if self._forget(process):
            self._tell(Reaped(process.member, status, process.gone_ns or time.monotonic_ns()))
            self._stir()

    def _fail(self, process: _Process, reason: str) -> None:
        if self._forget(process):
            self._tell(LaunchFailed(process.member, reason))
            self._stir()

    def _forget(self, process: _Process) -> bool:
        """Release what belongs to the process; False if that was done before."""
        if self._processes.get(process.member) is not process:
            return False
        del self._processes[process.member]
        if process in self._queue:
            self._queue.remove(process)
        if process.timer is not None:
            process.timer.cancel()
        if process.pidfd >= 0:
            self._loop.remove_reader(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1
        self._cut(process)
        if process.config_fd >= 0:
            os.close(process.config_fd)
            process.config_fd = -1
        if process.slot >= 0 and process.slot not in self._death_watch.busy_slots:
            self._free_slots.append(process.slot)
        return True

    def _cut(self, process: _Process) -> None:
        """Close the life line: the kernel kills the process if it lives, also one that nobody has heard of."""
        if process.life_fd >= 0:
            os.close(process.life_fd)
            process.life_fd = -1

    def _stir(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _in_time(self, condition: Callable[[], bool]) -> None:
        with anyio.move_on_after(self._timing.close_ms / 1000):
            while not condition():
                await self._changed.wait()
