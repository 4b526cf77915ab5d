"""This host's agent, as whoever has started it sees it.

The keeper starts the agent, and another one when that dies or does not answer. It is also the parent of the fork server,
and holds a second descriptor of all that must not be closed when an agent dies: the control socket of the fork server,
the file of the mutexes, the life line and the pidfd of each rank. With these the next agent goes on where the last one
was stopped (`Adopt`); nothing happens to the ranks meanwhile, but nobody is told of their deaths.

HAZARD: a rank lives as long as one of the two holds its life line. So this one cuts its own whenever the rank is to
die; and the agent is bound to the keeper by a life line of its own: with the keeper both are cut.
HAZARD: Yama lets only ancestors duplicate a process' descriptors. Ranks are the keeper's grandchildren, by the fork
server, and not the agent's: so device_guard.py belongs here.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import anyio
import structlog

from elastic_ep.host.agent_messages import (
    Adopt,
    AgentStarted,
    Alive,
    AllAdopted,
    Asked,
    Begin,
    Carry,
    Close,
    FromAgent,
    Ping,
    ServerBegun,
    ServerExited,
    ServerFailed,
    ServerWanted,
    ToAgent,
)
from elastic_ep.host.children import AgentProcess, Server, Spawned
from elastic_ep.host.fork_messages import LaunchOptions, SharedFiles, status_text
from elastic_ep.host.packets import PacketSocket
from elastic_ep.host.private_directory import Janitor
from elastic_ep.host.robust_mutex import RobustMutexes
from elastic_ep.host.server_process import ServerProcess
from elastic_ep.wire.host_messages import (
    AgentLost,
    AgentReady,
    Died,
    Fence,
    GiveUp,
    HostEvent,
    Launch,
    Launched,
    LaunchFailed,
    Links,
    Reach,
    Reaped,
    ServerLost,
    ServerReady,
    Watch,
)
from elastic_ep.wire.messages import Member

PING_S = 0.25
SILENT_PINGS = 12
"""An agent that has not answered when so many were due is ended. They are counted, not timed: a machine may sleep."""
STARTING_PINGS = 120
"""So many for one that starts."""
LEAST_PAUSE_S, MOST_PAUSE_S = 0.05, 5.0
"""Before the next agent, if one after the other dies before it has done anything."""
AGENT = "elastic_ep.host.agent"
T = TypeVar("T")
log = structlog.get_logger()


class ForkServerFailed(RuntimeError):
    """The fork server or the agent did not come up. Its own output says why."""


@dataclass(slots=True)
class _Rank:
    """What the next agent must know of a rank, from its launch until it is gone. The descriptors are the keeper's."""

    member: Member
    config_fd: int
    """Of its configuration, until it is asked for; then -1."""
    slot: int = -1
    server_pid: int = 0
    life_fd: int = -1
    pidfd: int = -1
    pid: int = 0
    watched: bool = False
    fenced: bool = False
    died: bool = False

    @property
    def asked(self) -> bool:
        return self.slot >= 0


class Keeper:
    """``async with Keeper(options, files) as host: await host.start(on_event)``.

    Ranks inherit `files`, and they and their fork server have `environment` besides this process's. `begun` is the first
    fork server's process if there is one already, in that environment; `agent` the module that agents run; `carries`:
    there are other hosts, and `carry` follows, perhaps late. On exit all ranks are killed, and everything that was
    started is gone. Raises `NotPrivate` for a bad directory.
    """

    def __init__(
        self,
        options: LaunchOptions,
        files: SharedFiles,
        environment: Mapping[str, str] | None = None,
        begun: ServerProcess | None = None,
        agent: str = AGENT,
        carries: bool = False,
    ) -> None:
        self._options = options
        self._timing = options.timing
        self._files = files
        self._environment = environment or {}
        self._begun = begun
        self._module = agent
        self._carries = carries
        self._on_event: Callable[[HostEvent], None] = _nobody_listens
        self._ranks: dict[Member, _Rank] = {}
        self._agent: AgentProcess | None = None
        self._link: PacketSocket | None = None
        self._server: Server | None = None
        self._server_coming = False
        self._spawning = 0
        self._was_ready = False
        self._failed: str | None = None
        self._pause_s = LEAST_PAUSE_S
        self._carried: Carry | None = None
        self._listener: socket.socket | None = None
        self._on_links: Callable[[Links], None] = lambda _links: None
        self._reached: dict[int, Reach] = {}
        self._given_up: dict[int, GiveUp] = {}
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._changed = anyio.Event()

    async def __aenter__(self) -> Keeper:
        self._loop = asyncio.get_running_loop()
        # The fork server removes it too; this is for a keeper that is killed while no fork server lives.
        self.janitor = Janitor(Path(self._options.directory))
        self._mutex_fd = RobustMutexes.create_file(self._options.mutexes)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        with anyio.CancelScope(shield=True):
            await self._until(lambda: not self._spawning)
            await self._end_agent()
            await self._end_server()
        for rank in list(self._ranks.values()):  # there was no agent to say so
            if rank.pid:
                self._tell(Reaped(rank.member, "unknown", 0))
            else:
                self._tell(LaunchFailed(rank.member, "shutting down"))
        self.janitor.finish()
        os.close(self._mutex_fd)

    @property
    def server_pid(self) -> int | None:
        return self._server.pid if self._server else None

    @property
    def agent_pid(self) -> int | None:
        return self._agent.popen.pid if self._agent else None

    async def start(self, on_event: Callable[[HostEvent], None]) -> None:
        """Start the agent, and wait until ranks can be launched. Raises `ForkServerFailed`.

        `on_event` is called on the event loop and must not raise.
        """
        self._on_event = on_event
        self._start_server()  # it imports for longest
        self._start_agent()
        self._beat()
        await self._until(lambda: self._was_ready or self._failed is not None)
        if self._failed is not None:
            raise ForkServerFailed(self._failed)

    def launch(self, member: Member, config_json: str) -> None:
        """`Launched` or `LaunchFailed` follows. A member can be launched once; ValueError if it was."""
        if member in self._ranks:
            raise ValueError(f"{member} is launched already")
        rank = self._ranks[member] = _Rank(member, _file_of(config_json))
        if self._closing:
            self._loop.call_soon(self._tell, LaunchFailed(member, "shutting down"))
        else:
            self._send(Launch(member), rank.config_fd)

    def watch(self, member: Member) -> None:
        """The rank says that it runs, so it holds its mutex: watch that. No effect if it is gone."""
        if rank := self._ranks.get(member):
            rank.watched = True
            self._send(Watch(member))

    def kill(self, member: Member) -> None:
        """Fence: SIGKILL, in whatever state it is, stopped ones included. Idempotent; unknown is no error."""
        if rank := self._ranks.get(member):
            rank.fenced = True
            self._cut(rank)
            self._send(Fence(member))

    def carry(self, told: Carry, listener: socket.socket, on_links: Callable[[Links], None]) -> None:
        """Ranks of other hosts take part. `listener` is where they are to dial, and stays the caller's."""
        self._carried, self._listener, self._on_links = told, listener, on_links
        self._send(told, listener.fileno())

    def reach(self, where: Reach) -> None:
        self._reached[where.host] = where
        self._send(where)

    def give_up(self, whom: GiveUp) -> None:
        self._given_up[whom.host] = whom
        self._send(whom)

    def hear(self) -> None:
        """Take what the agent has said by now."""
        if self._link is not None:
            self._link.hear()

    # The agent

    def _start_agent(self) -> None:
        self._timer = None
        self._spawn(lambda: Spawned(self._module), self._on_agent_spawned, self._agent_failed)

    def _on_agent_spawned(self, spawned: Spawned) -> None:
        self._agent = AgentProcess(spawned, self._on_agent_exit)
        self._link = PacketSocket(
            spawned.control, FromAgent, self._on_message, self._on_refused, lambda: None
        )

    def _spawn(self, make: Callable[[], T], then: Callable[[T], None], failed: Callable[[str], None]) -> None:
        """On a thread: whoever starts a process waits until that has had a processor."""

        def made(future: asyncio.Future[T]) -> None:
            self._spawning -= 1
            try:
                then(future.result())
            except OSError as error:
                failed(str(error))
            self._stir()

        self._spawning += 1
        self._loop.run_in_executor(None, make).add_done_callback(made)

    def _on_refused(self, why: str) -> None:
        log.error("the host's agent is not understood, and is ended", why=why)
        self._kill_agent()

    def _kill_agent(self) -> None:
        if self._agent is not None:
            self._agent.kill()

    def _on_agent_exit(self) -> None:
        assert self._agent is not None
        assert self._link is not None
        self._link.hear()  # what it said before it died
        self._link.close()
        agent, self._agent, self._link = self._agent, None, None
        self._on_links(Links((), known=False))
        status = status_text(agent.popen.returncode)
        if self._server is not None and not self._server.ready:
            # How far it is nobody knows, and while it imports a message would kill it. It has no ranks.
            self._server.kill()
            self._server = None
        if not self._closing:
            if agent.ready:
                log.warning(
                    "the host's agent has died; ranks live on, the next one adopts them", status=status
                )
                self._on_event(AgentLost(agent.popen.pid, status))
            self._agent_failed(status)
        self._stir()

    def _agent_failed(self, why: str) -> None:
        if not self._was_ready and self._pause_s > LEAST_PAUSE_S:
            self._failed = f"the host's agent does not start ({why}); its output says why"
            self._stir()
            return
        self._timer = self._loop.call_later(self._pause_s, self._start_agent)
        self._pause_s = min(2 * self._pause_s, MOST_PAUSE_S)

    def _beat(self) -> None:
        if self._closing:
            return
        self._loop.call_later(PING_S, self._beat)
        if self._agent is None:
            return
        self._agent.silent += 1
        if self._agent.silent > (SILENT_PINGS if self._agent.ready else STARTING_PINGS):
            self._agent.kill()
        elif self._agent.ready:
            self._send(Ping())

    def _on_message(self, message: FromAgent, fds: list[int]) -> None:
        match message:
            case AgentStarted():
                self._hand_over()
            case AgentReady():
                assert self._agent is not None
                self._agent.ready = True
                self._agent.silent = 0
                self._pause_s = LEAST_PAUSE_S
                self._on_event(message)
            case Alive():
                assert self._agent is not None
                self._agent.silent = 0
            case ServerWanted():
                self._start_server()
            case ServerReady(pid):
                if self._server is not None and self._server.pid == pid:
                    self._server.ready = self._was_ready = True
                self._on_event(message)
            case Asked(member, slot, server_pid):
                self._on_asked(self._ranks[member], slot, server_pid, fds[0])
            case Launched():
                rank = self._ranks[message.member]
                rank.pid, rank.pidfd = message.pid, fds[0]
                self._tell(message)
            case Died():
                self._on_died(message)
            case Reaped() | LaunchFailed():
                self._tell(message)
            case Links():
                self._on_links(message)
        self._stir()

    def _on_asked(self, rank: _Rank, slot: int, server_pid: int, life_fd: int) -> None:
        rank.slot, rank.server_pid = slot, server_pid
        os.close(rank.config_fd)
        rank.config_fd = -1
        rank.life_fd = life_fd
        if rank.fenced or self._closing:
            self._cut(rank)

    def _on_died(self, message: Died) -> None:
        rank = self._ranks.get(message.member)
        if rank is not None and not rank.died:  # else two threads of the agent have told it
            rank.died = True
            self._tell(message)

    def _hand_over(self) -> None:
        """The agent hears all that there is."""
        assert self._agent is not None
        self._agent.begun = True
        self._send(Begin(self._options, self._carries), self._mutex_fd, *self._files)
        if self._server is None:
            self._start_server()
        else:
            self._send_server(self._server)
        for rank in self._ranks.values():
            if rank.asked:
                fds = [fd for fd in (rank.life_fd, rank.pidfd) if fd >= 0]
                comes = (rank.life_fd >= 0, rank.pidfd >= 0)
                self._send(Adopt(rank.member, rank.slot, rank.server_pid, rank.pid, comes), *fds)
        # HAZARD: it imports for that, on a busy machine for long, and one that is ready must not be silent for so long.
        if self._carried is not None and self._listener is not None:
            self._send(self._carried, self._listener.fileno())
        self._send(AllAdopted())
        for whom in self._given_up.values():
            self._send(whom)
        for where in self._reached.values():
            self._send(where)
        for rank in self._ranks.values():
            if not rank.asked:
                self._send(Launch(rank.member), rank.config_fd)
            if rank.watched:
                self._send(Watch(rank.member))

    def _send(self, message: ToAgent, *fds: int) -> None:
        """Nobody there, or not yet: it hears all that matters by `_hand_over`."""
        if self._link is not None and self._agent is not None and self._agent.begun:
            self._link.send(message, *fds)

    # The fork server

    def _start_server(self) -> None:
        if self._begun is not None:
            begun, self._begun = self._begun, None
            self._on_server_spawned(begun)
        elif not self._server_coming:
            self._server_coming = True
            make = partial(ServerProcess, self._options.preload, self._environment)
            self._spawn(make, self._on_server_spawned, self._on_no_server)

    def _on_server_spawned(self, process: ServerProcess) -> None:
        self._server_coming = False
        self._server = Server(process, self._on_server_exit)
        self._send_server(self._server)

    def _on_no_server(self, why: str) -> None:
        self._server_coming = False
        self._failed = f"no fork server: {why}"
        self._send(ServerFailed(why))

    def _send_server(self, server: Server) -> None:
        self._send(ServerBegun(server.pid, server.ready), server.control.fileno(), server.pidfd)

    def _on_server_exit(self, server: Server, status: str) -> None:
        self.hear()
        if self._server is not server:
            return
        self._server = None
        self._on_event(ServerLost(server.pid, status))
        self._send(ServerExited(server.pid, status))
        if not self._was_ready:
            self._failed = "the fork server did not start; its output says why"
        self._stir()

    # The end

    async def _end_agent(self) -> None:
        for rank in self._ranks.values():
            self._cut(rank)
        if self._agent is None:
            return
        if self._agent.ready:
            self._send(Close())
        else:
            self._agent.kill()
        if self._server is not None and self._server.ready:
            self._server.control.close()  # the agent has the other one
        with anyio.move_on_after(4 * self._timing.close_ms / 1000):
            await self._until(lambda: self._agent is None)
        if self._agent is not None:
            self._agent.kill()
            await self._until(lambda: self._agent is None)

    async def _end_server(self) -> None:
        if self._server is None:
            return
        self._server.control.close()
        with anyio.move_on_after(self._timing.close_ms / 1000):
            await self._until(lambda: self._server is None)
        if self._server is not None:
            self._server.kill()
            await self._until(lambda: self._server is None)

    # Ranks

    def _tell(self, event: Launched | Died | Reaped | LaunchFailed) -> None:
        if isinstance(event, Reaped | LaunchFailed):
            rank = self._ranks.pop(event.member, None)
            if rank is None:
                return
            self._cut(rank)
            _close(fd for fd in (rank.config_fd, rank.pidfd) if fd >= 0)
        self._on_event(event)

    def _cut(self, rank: _Rank) -> None:
        """This end of the life line; the agent's is cut when it hears of it, or is no more."""
        if rank.life_fd >= 0:
            os.close(rank.life_fd)
            rank.life_fd = -1

    def _stir(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _file_of(text: str) -> int:
    """A descriptor of a file in memory."""
    fd = os.memfd_create("config", os.MFD_CLOEXEC)
    with open(fd, "w", encoding="utf-8", closefd=False) as file:
        file.write(text)
    return fd


def _nobody_listens(_event: HostEvent) -> None:
    """Before `start` there is nothing to tell of."""
