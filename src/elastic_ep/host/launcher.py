"""Starts, fences and watches rank processes; lives on the run process's event loop.

A rank's life, as seen here: queued -> asked for (one at a time) -> running -> dying -> gone. Four things speak
of its end: the robust mutex (first, but only once watched), the pidfd (the process is gone), the fork server's
word (adds the exit status), and the life line, which works the other way: closing it kills the rank.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import anyio

from elastic_ep.host import life_line
from elastic_ep.host.death_watch import DeathWatch
from elastic_ep.host.fork_client import ForkClient
from elastic_ep.host.fork_messages import (
    Exited,
    Fork,
    FromServer,
    LaunchOptions,
    SharedFiles,
)
from elastic_ep.host.launcher_events import (
    Died,
    Launched,
    LauncherEvent,
    LaunchFailed,
    Reaped,
    ServerLost,
    ServerReady,
)
from elastic_ep.host.peer_notices import NoticeSender
from elastic_ep.host.private_directory import Janitor
from elastic_ep.host.robust_mutex import RobustMutexes
from elastic_ep.host.server_process import ServerProcess
from elastic_ep.wire.messages import Member

UNKNOWN_STATUS = "unknown"


class ForkServerFailed(RuntimeError):
    """The fork server did not come up. Its own output says why."""


@dataclass(slots=True)
class _Process:
    """A rank's process, from the request for it until it is gone."""

    member: Member
    config_json: str
    slot: int = -1
    life_fd: int = -1
    pidfd: int = -1
    server_pid: int | None = None
    """Of the fork server that is its parent and will know its exit status."""
    noticed: bool = False
    gone_ns: int | None = None
    timer: asyncio.TimerHandle | None = None


class Launcher:
    """``async with Launcher(options, files) as launcher: await launcher.start(on_event)``.

    Ranks inherit `files`, and all children have `environment` besides this process's. `begun` is the first fork server's
    process if there is one already, in that environment. On exit all ranks are killed,
    and everything that was started is gone. Raises `NotPrivate` for a bad directory.
    """

    def __init__(
        self,
        options: LaunchOptions,
        files: SharedFiles,
        environment: Mapping[str, str] | None = None,
        begun: ServerProcess | None = None,
    ) -> None:
        self._options = options
        self._timing = options.timing
        self._files = files
        self._environment = environment or {}
        self._begun = begun
        self._on_event: Callable[[LauncherEvent], None] = _nobody_listens
        self._processes: dict[Member, _Process] = {}
        self._queue: deque[_Process] = deque()
        self._asked: _Process | None = None
        self._server: ForkClient | None = None
        self._closing = False
        self._changed = anyio.Event()

    async def __aenter__(self) -> Launcher:
        self._loop = asyncio.get_running_loop()
        # The fork server removes it too; this is for a run process that is killed while no fork server lives.
        directory, slots = Path(self._options.directory), self._options.mutexes
        self.janitor = Janitor(directory)
        self._free_slots = deque(range(slots))
        self._mutex_fd = RobustMutexes.create_file(slots)
        self._mutexes = RobustMutexes(self._mutex_fd, slots)
        self._death_watch = DeathWatch(self._mutexes, self._loop)
        self._notices = NoticeSender(directory)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        for process in list(self._queue):
            self._fail(process, "shutting down")
        for member in list(self._processes):
            self.kill(member)
        with anyio.move_on_after(self._timing.close_ms / 1000, shield=True):
            await self._until(lambda: not self._processes)
        if self._server is not None:
            if self._server.ready:
                self._server.hang_up()
            else:
                self._server.kill()  # it imports and does not listen; it has no ranks
            with anyio.move_on_after(self._timing.close_ms / 1000, shield=True):
                await self._until(lambda: self._server is None)
        if self._server is not None:
            self._server.kill()
            with anyio.CancelScope(shield=True):
                await self._until(lambda: self._server is None)
        for process in list(self._processes.values()):  # in uninterruptible sleep, if ever
            self._gone(process, UNKNOWN_STATUS)
        with anyio.move_on_after(self._timing.close_ms / 1000, shield=True):
            await self._until(lambda: not self._death_watch.busy_slots)
        self._notices.close()
        self.janitor.finish()
        os.close(self._mutex_fd)

    @property
    def server_pid(self) -> int | None:
        return self._server.pid if self._server else None

    async def start(self, on_event: Callable[[LauncherEvent], None]) -> None:
        """Start the fork server and wait until it is ready. Raises `ForkServerFailed`.

        `on_event` is called on the event loop and must not raise.
        """
        self._on_event = on_event
        if self._server is None:
            self._start_server()
        await self._until(lambda: self._server is None or self._server.ready)
        if self._server is None:
            raise ForkServerFailed("the fork server did not start; its output says why")

    def launch(self, member: Member, config_json: str) -> None:
        """`Launched` or `LaunchFailed` follows. A member can be launched once; ValueError if it was."""
        if member in self._processes:
            raise ValueError(f"{member} is launched already")
        process = self._processes[member] = _Process(member, config_json)
        self._queue.append(process)
        if self._closing:
            self._loop.call_soon(self._fail, process, "shutting down")
        elif self._server is None:
            self._start_server()
        else:
            self._loop.call_soon(self._ask)

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

    # Fork server

    def _start_server(self) -> None:
        files = (self._mutex_fd, *self._files)
        try:
            process = self._begun or ServerProcess(self._options.preload, self._environment)
            self._begun = None
            self._server = ForkClient(self._options, files, process, self._on_message, self._on_server_exit)
        except OSError as error:
            for waiting in list(self._queue):
                self._loop.call_soon(self._fail, waiting, f"no fork server: {error}")

    def _on_message(self, message: FromServer, fds: list[int]) -> None:
        match message:
            case ServerReady():
                self._on_event(message)
            case Launched(member):
                self._asked = None
                process = self._processes[member]
                process.pidfd = fds[0]
                self._loop.add_reader(process.pidfd, self._on_pidfd, process)
                self._on_event(message)
            case LaunchFailed(member, reason):
                self._asked = None
                self._fail(self._processes[member], reason)
            case Exited(member, status):
                if child := self._processes.get(member):
                    self._notice(child, "reaped", time.monotonic_ns())
                    self._gone(child, status)
        self._ask()
        self._stir()

    def _on_server_exit(self, status: str) -> None:
        assert self._server is not None
        pid, was_ready = self._server.pid, self._server.ready
        self._server = None
        self._on_event(ServerLost(pid, status))
        if self._asked is not None:
            process, self._asked = self._asked, None
            self._fail(process, f"fork server: {status}")
        for process in list(self._processes.values()):
            if process.gone_ns is not None:
                self._gone(process, UNKNOWN_STATUS)
        if was_ready and not self._closing:
            self._start_server()
        else:
            for process in list(self._queue):
                self._fail(process, f"fork server: {status}")
        self._stir()

    # Processes

    def _ask(self) -> None:
        """Ask for the next rank. One at a time, so that it is known which launch a dying server had in hand."""
        if not (self._server and self._server.ready and self._queue) or self._asked is not None:
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
                config_fd = _file_of(process.config_json)
                ours.callback(os.close, config_fd)
                # Not heard: the server is dead, and `_on_server_exit` is about to deal with this launch.
                self._server.fork(Fork(process.member, process.slot), read_end, config_fd)
        except (IndexError, OSError) as error:
            self._asked = None
            self._fail(process, f"no mutex, pipe or file: {error}")
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
            self._on_event(Died(process.member, cause, at_ns))

    def _gone(self, process: _Process, status: str) -> None:
        if self._forget(process):
            self._on_event(Reaped(process.member, status, process.gone_ns or time.monotonic_ns()))
            self._stir()

    def _fail(self, process: _Process, reason: str) -> None:
        if self._forget(process):
            self._on_event(LaunchFailed(process.member, reason))
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

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()


def _file_of(text: str) -> int:
    """A descriptor of a file in memory."""
    fd = os.memfd_create("config", os.MFD_CLOEXEC)
    with open(fd, "w", encoding="utf-8", closefd=False) as file:
        file.write(text)
    return fd


def _nobody_listens(_event: LauncherEvent) -> None:
    """Before `start` there is nothing to tell of."""
